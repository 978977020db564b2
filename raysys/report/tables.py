"""The parts of the report that are tables: metrics, slices, embedding health, the sharding plan, the config."""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import Any

import yaml

from raysys.report.format import (
    ABSENT,
    METRICS,
    count,
    duration,
    in_order,
    metric_title,
    moment,
    number,
    share,
    size,
    timestamp,
)
from raysys.report.markup import Markup, join, table, tag
from raysys.report.plots import deviation, meter
from raysys.report.record import RunRecord

_SLICES_SHOWN = 25
_SLICE_TABLES_SHOWN = 40
_TABLES_SHOWN = 200
_RANKS_SHOWN = 64
_CHECKPOINTS_SHOWN = 20
_HOT_IDS_SHOWN = 5
_PREFERRED = ("test", "valid", "train")
_KEY = re.compile(r"^(\s*(?:- )*)([^\s:#'\"][^:]*)(:)(?=\s|$)")


def metrics(record: RunRecord) -> Markup | None:
    """Every metric of every task and split, with its interval where run.json has `intervals`."""
    found = record.metrics
    keys = in_order(
        list(dict.fromkeys(m for tasks in found.values() for row in tasks.values() for m in row)), tuple(METRICS)
    )
    keys = [key for key in keys if key not in ("rows", "base_rate")]
    rows: list[list[object]] = []
    for task in record.tasks:
        for split in (split for split in found if task in found[split]):
            values = found[split][task]
            cells = [_with_interval(values.get(key), interval(record, split, task, key)) for key in keys]
            facts = [share(values.get("base_rate")), count(values.get("rows"))]
            rows.append([task, tag("span", tag("i", class_=split), split, class_="legend"), *cells, *facts])
    header = ["task", "split", *map(metric_title, keys), "base rate", "rows"]
    return table(header, rows, text_columns=2) if rows else None


def interval(record: RunRecord, split: str, task: str, metric: str) -> tuple[float, float] | None:
    """The 95% interval (low, high) of a metric, from run.json's `intervals: {split: {task: {metric: [low, high]}}}`."""
    found = (record.run.get("intervals") or {}).get(split, {}).get(task, {}).get(metric)
    return None if found is None or None in found else (found[0], found[1])


def bayes(record: RunRecord) -> Markup | None:
    """The distance to the true probabilities, where the data is synthetic and run.json has `bayes`."""
    rows: list[list[object]] = []
    for split, tasks in (record.run.get("bayes") or {}).items():
        for task, optimum in tasks.items():
            ours = record.metrics.get(split, {}).get(task, {})
            cells: list[object] = []
            for key in ("ne", "auc"):
                value, best = ours.get(key), optimum.get(key)
                distance = None if value is None or best is None else value - best
                cells += [number(value), number(best), ABSENT if distance is None else f"{distance:+.4f}"]
            ne, best_ne = ours.get("ne"), optimum.get("ne")
            gain = None if ne is None or best_ne is None or best_ne >= 1 else (1 - ne) / (1 - best_ne)
            rows.append([task, split, *cells, share(gain)])
    header = [
        "task",
        "split",
        "NE",
        "Bayes NE",
        "distance",
        "AUC",
        "Bayes AUC",
        "distance",
        "share of the possible NE gain",
    ]
    return table(header, rows, text_columns=2) if rows else None


def slices(record: RunRecord) -> Markup | None:
    """For each slicing column and task the metrics of its most frequent values, with NE (or RMSE) against all rows."""
    newest = {event["split"]: event for event in record.evaluations if event.get("slices")}
    split = next(iter(in_order(list(newest), _PREFERRED)), None)
    if split is None:
        return None
    event = newest[split]
    pairs = [(column, task) for column in event["slices"] for task in record.tasks]
    found = {
        (column, task): {value: tasks[task] for value, tasks in event["slices"][column].items() if task in tasks}
        for column, task in pairs
    }
    blocks = [
        _slice_table(f"{column} · {task}", rows, event["tasks"].get(task) or {})
        for (column, task), rows in found.items()
        if rows
    ]
    notes = [f"{split} split at step {count(event['step'])}; bars compare with all rows of the split"]
    if len(blocks) > _SLICE_TABLES_SHOWN:
        notes.append(f"{len(blocks) - _SLICE_TABLES_SHOWN} of {len(blocks)} tables are left out")
    grid = tag("div", *blocks[:_SLICE_TABLES_SHOWN], class_="grid")
    return join([tag("p", "; ".join(notes), class_="note"), grid])


def _slice_table(title: str, values: dict[str, dict[str, float | None]], overall: dict[str, float | None]) -> Markup:
    keys = [key for key in METRICS if key not in ("log_loss", "ece") and any(key in row for row in values.values())]
    shown = sorted(values.items(), key=lambda item: -(item[1].get("rows") or 0))[:_SLICES_SHOWN]
    main = keys[0]
    sign = 1 if METRICS[main].better == "higher" else -1
    differences = {value: _difference(row.get(main), overall.get(main)) for value, row in shown}
    scale = max((abs(d) for d in differences.values() if d is not None), default=0.0)
    rows: list[list[object]] = []
    for value, row in shown:
        d = differences[value]
        bar = None if d is None else deviation(d, scale, good=sign * d > 0)
        facts = [count(row.get("rows")), share(row.get("base_rate"))]
        rows.append(
            [
                value,
                *facts,
                *(join([bar, number(row.get(key))]) if key == main else number(row.get(key)) for key in keys),
            ]
        )
    left_out = len(values) - len(shown)
    more = tag("p", f"{left_out} less frequent values are left out", class_="note") if left_out else None
    body = table(["value", "rows", "base rate", *map(metric_title, keys)], rows)
    return tag("figure", tag("figcaption", tag("h3", title)), body, more)


def health(record: RunRecord) -> Markup | None:
    """The newest embedding health of each table: norms, rows that were never trained, ids that take most look-ups."""
    if not record.health:
        return None
    rows: list[list[object]] = []
    tables = sorted(record.health[-1]["tables"].items(), key=lambda item: -(item[1].get("rows") or 0))
    for name, facts in tables[:_TABLES_SHOWN]:
        untrained = facts.get("never_trained_share")
        hot = join(_hot_id(one) for one in (facts.get("hot_ids") or [])[:_HOT_IDS_SHOWN])
        cells = [count(facts.get("rows")), number(facts.get("norm_mean"), 3), number(facts.get("norm_p99"), 3)]
        bar = None if untrained is None else meter(untrained)
        rows.append([name, *cells, join([bar, share(untrained)]), tag("span", hot, class_="chips")])
    header = ["table", "rows", "mean norm", "99% norm", "never trained", "hottest ids (share of look-ups)"]
    note = f"at step {count(record.health[-1]['step'])}{_left_out(len(tables))}"
    return join([tag("p", note, class_="note"), table(header, rows, class_="wide-last")])


def plan(record: RunRecord) -> Markup | None:
    """The sharding plan, largest tables first, and the bytes of the tables by rank."""
    if not record.plan:
        return None
    tables = sorted(record.plan, key=lambda one: -sum(one["bytes_per_rank"]))
    rows = [_plan_row(one) for one in tables[:_TABLES_SHOWN]]
    header = ["table", "sharding", "kernel", "ranks", "rows", "width", "bytes a rank", "bytes"]
    by_rank: dict[int, int] = {}
    for one in record.plan:
        for rank, held in zip(one["ranks"], one["bytes_per_rank"], strict=True):
            by_rank[rank] = by_rank.get(rank, 0) + held
    largest = max(by_rank.values(), default=0) or 1
    loads: list[list[object]] = [
        [f"rank {rank}", join([meter(held / largest), size(held)])] for rank, held in sorted(by_rank.items())
    ]
    note = f"bytes are of weights and optimiser state{_left_out(len(tables))}"
    loads_table = tag("div", table(["", "embedding tables"], loads[:_RANKS_SHOWN]), class_="narrow")
    return join([tag("p", note, class_="note"), table(header, rows, text_columns=4), loads_table])


def _plan_row(one: dict[str, Any]) -> list[object]:
    held = one["bytes_per_rank"]
    text = [one["table"], tag("code", one["sharding"]), tag("code", one["kernel"]), _ranges(one["ranks"])]
    return [*text, count(one["rows"]), count(one["width"]), _spread(held), size(sum(held))]


def checkpoints(record: RunRecord) -> Markup | None:
    """What was saved, when and why; the newest ones of many."""
    rows: list[list[object]] = []
    for one in record.checkpoints[-_CHECKPOINTS_SHOWN:]:
        text = [tag("code", PurePath(one["path"]).name), one.get("reason") or ABSENT]
        rows.append([*text, count(one["step"]), size(one.get("bytes")), duration(one.get("seconds"))])
    left_out = len(record.checkpoints) - len(rows)
    more = tag("p", f"{left_out} earlier ones are left out", class_="note") if left_out else None
    header = ["folder", "reason", "step", "size", "time to save"]
    return join([more, table(header, rows, text_columns=2)]) if rows else None


def config(record: RunRecord) -> Markup | None:
    """The resolved config as YAML."""
    if not record.config:
        return None
    text = yaml.safe_dump(record.config, sort_keys=False, allow_unicode=True, width=110)
    return tag("pre", join(_highlighted(line) for line in text.splitlines(keepends=True)))


def facts(record: RunRecord) -> Markup | None:
    """Where and with what it ran: seeds, hashes, versions, machine, paths."""
    machine = dict(record.run.get("machine") or {})
    if "memory_bytes" in machine:
        machine["memory"] = size(machine.pop("memory_bytes"))
    rows: list[tuple[str, Any]] = [
        ("started", moment(timestamp(record.run.get("started")) or record.first_time)),
        ("seed", record.get("seed")),
        ("config hash", record.run.get("config_hash")),
        ("schema hash", record.run.get("schema_hash")),
        ("rows an epoch", count(record.started.get("rows_per_epoch"))),
        *((f"machine: {key}", value) for key, value in machine.items()),
        *(record.run.get("versions") or {}).items(),
        *((f"path: {key}", value) for key, value in (record.run.get("paths") or {}).items()),
    ]
    known = [join([tag("dt", name), tag("dd", value)]) for name, value in rows if value not in (None, ABSENT)]
    return tag("dl", *known) if known else None


def _left_out(tables: int) -> str:
    return f"; {tables - _TABLES_SHOWN} smaller tables are left out" if tables > _TABLES_SHOWN else ""


def _with_interval(value: float | None, bounds: tuple[float, float] | None) -> object:
    if bounds is None:
        return number(value)
    return join([number(value), tag("small", f"{number(bounds[0])} … {number(bounds[1])}")])


def _difference(value: float | None, reference: float | None) -> float | None:
    return None if value is None or reference is None else value - reference


def _hot_id(one: dict[str, Any]) -> Markup:
    value = one.get("value")
    name = str(one.get("id")) if value is None else str(value)
    return tag("span", name, " ", tag("b", share(one.get("share"))), title=f"id {one.get('id')}")


def _spread(held: list[int]) -> str:
    if not held:
        return ABSENT
    return size(max(held)) if min(held) == max(held) else f"{size(min(held))} … {size(max(held))}"


def _ranges(ranks: list[int]) -> str:
    """[0, 1, 2, 5] as "0-2, 5"."""
    pieces: list[list[int]] = []
    for rank in sorted(set(ranks)):
        if pieces and rank == pieces[-1][1] + 1:
            pieces[-1][1] = rank
        else:
            pieces.append([rank, rank])
    return ", ".join(f"{low}" if low == high else f"{low}-{high}" for low, high in pieces)


def _highlighted(line: str) -> Markup:
    match = _KEY.match(line)
    if match is None:
        return join([line])
    return join([match[1], tag("span", match[2], class_="key"), line[match.end(2) :]])
