"""What a synthetic log holds: its columns and how strongly each kind of effect moves the click."""

from __future__ import annotations

from dataclasses import dataclass

from raysys.errors import UserError, nearest
from raysys.schema import DenseFeature, FeatureSchema, Label, Sequence, SequenceFeature, SparseFeature, Table

TRUTH = "_true_probability"
"""Ending of the columns with the true probability of a task. They are in the files, but never in a schema."""

STRENGTHS = ("dense", "effects", "pairwise", "heterogeneous", "third_order", "history", "order")
"""The planted kinds, each a field of `SyntheticSpec`: the standard deviation that it gives to every task's logit."""


@dataclass(frozen=True)
class SyntheticSpec:
    """The whole description of a log: same spec, same rows (on one kind of CPU and version of numpy).

    The columns are `user_id`, `item_id`, `c0`, `c1`, ... (ids, drawn independently of each other), `d0`, `d1`, ...
    (dense, standard normal), `history` (item ids, oldest first), `time` and one label per task.
    Logit of a task = constant + the kinds below, each with mean 0 and the given standard deviation over the rows.
    """

    seed: int = 0  # of the planted effects and of the rows
    num_users: int = 50_000  # ids of user_id
    num_items: int = 20_000  # ids of item_id and of the events of history
    cardinalities: tuple[int, ...] = (10, 20, 50, 100, 100, 200, 500, 1000, 2000, 5000)  # ids of c0, c1, ...
    exponent: float = 1.1  # Zipf exponent of all ids; id 0 is the most frequent one; 0 = uniform
    num_dense: int = 8  # columns d0, d1, ...
    history_length: int = 20  # histories have 0 to so many events, all lengths equally often; 0 = no history
    missing: float = 0.05  # share of nulls in every d and c column, at random; a null adds nothing to a logit
    embedding_dim: int = 16  # width of the tables in schema.yaml

    tasks: tuple[str, ...] = ("click", "conversion", "like")  # names of the labels
    base_rates: tuple[float, ...] = (0.2, 0.1, 0.05)  # mean true probability of each task, to a few percent
    correlation: float = 0.5  # of any two tasks' logits over the rows, within each kind
    funnel: tuple[tuple[str, str], ...] = (("click", "conversion"),)  # (first, then): `then` is null unless first = 1
    entire_space: bool = False  # besides, for all rows, whether first and then happened: "click_and_conversion"

    dense: float = 0.4  # linear in the dense columns
    effects: float = 0.7  # one effect per id of every id column
    drift: float = 0.2  # 1 - correlation of the id effects at the first row with those at the last row
    pairwise: float = 0.5  # dot products of the two ids' factors, one for each of some pairs of c columns
    num_pairs: int = 6  # how many pairs
    heterogeneous: float = 0.6  # factor x matrix x factor with a matrix of its own for each of other pairs
    num_heterogeneous: int = 6  # how many pairs, none of them among the `num_pairs`
    third_order: float = 0.6  # sums of products of three ids' factors; the mean logit given any two is the same
    num_triples: int = 4  # how many triples of c columns
    history: float = 0.4  # affinity between the item and the bag of items in the history
    order: float = 0.4  # affinity to recent minus old events: 0 on average over the orders of a history

    def __post_init__(self) -> None:
        # Configs come with lists; tuples make the spec hashable, which keeps its planted effects in a cache.
        for name in ("cardinalities", "tasks", "base_rates"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "funnel", tuple((first, then) for first, then in self.funnel))
        _check_ranges(self)
        _check_tasks(self)

    @property
    def fields(self) -> dict[str, int]:
        """Cardinality by id column, in schema order."""
        context = {f"c{number}": cardinality for number, cardinality in enumerate(self.cardinalities)}
        return {"user_id": self.num_users, "item_id": self.num_items} | context

    @property
    def funnel_paths(self) -> dict[str, tuple[str, ...]]:
        """By label of `entire_space` the tasks that all have to happen for it: the end of a funnel and what is before it."""
        before: dict[str, set[str]] = {}
        for task in self.tasks:  # in order, so that what is before the first step is known at the second
            firsts = [first for first, then in self.funnel if then == task]
            before[task] = set(firsts).union(*(before[first] for first in firsts))
        paths = [tuple(t for t in self.tasks if t in before[task] | {task}) for task in self.tasks if before[task]]
        return {"_and_".join(path): path for path in paths} if self.entire_space else {}

    def missing_share(self, column: str) -> float:
        """The share of nulls in a column: `user_id` and `item_id` are always there."""
        return 0.0 if column in ("user_id", "item_id") else self.missing

    def schema(self) -> FeatureSchema:
        """The columns that a model may see; the true probabilities are not among them."""
        tables = {"user_id": "user", "item_id": "item"} | {f"c{n}": f"c{n}" for n in range(len(self.cardinalities))}
        sides = {"user_id": "user", "item_id": "item"}
        history = Sequence("history", (SequenceFeature("history", "item", "index"),), "user", self.history_length)
        then = {name for _, name in self.funnel}
        return FeatureSchema(
            tables=tuple(Table(tables[name], rows, self.embedding_dim) for name, rows in self.fields.items()),
            dense=tuple(DenseFeature(f"d{number}") for number in range(self.num_dense)),
            sparse=tuple(
                SparseFeature(name, table, sides.get(name, "context"), "index")  # type: ignore[arg-type]
                for name, table in tables.items()
            ),
            sequences=(history,) if self.history_length else (),
            labels=(*(Label(task, required=task not in then) for task in self.tasks), *map(Label, self.funnel_paths)),
            example_id="example_id",
            group_id="user_id",
            time="time",
        )


def _check_ranges(spec: SyntheticSpec) -> None:
    for name, cardinality in {**spec.fields, "num_users": spec.num_users, "num_items": spec.num_items}.items():
        _check(2 <= cardinality < 2**31, f"cardinality of {name}", cardinality, "2 to 2,147,483,647 ids")
    _check(0 <= spec.missing < 1, "missing", spec.missing, "a share in [0, 1)")
    _check(0 <= spec.drift <= 1, "drift", spec.drift, "a number in [0, 1]")
    _check(spec.exponent >= 0, "exponent", spec.exponent, "a number that is not negative")
    _check(spec.history_length >= 0, "history_length", spec.history_length, "a number that is not negative")
    for name in STRENGTHS:
        _check(getattr(spec, name) >= 0, name, getattr(spec, name), "a standard deviation, not negative")


def _check_tasks(spec: SyntheticSpec) -> None:
    _check(len(spec.tasks) > 0, "tasks", spec.tasks, "at least one name")
    if len(spec.base_rates) != len(spec.tasks):
        raise UserError(
            f"synthetic: {len(spec.tasks)} tasks, but {len(spec.base_rates)} base_rates", "give one rate per task"
        )
    for rate in spec.base_rates:
        _check(0 < rate < 1, "base_rates", rate, "rates in (0, 1)")
    lowest = -1 / max(len(spec.tasks) - 1, 1)
    _check(
        lowest <= spec.correlation <= 1,
        "correlation",
        spec.correlation,
        f"a number in [{lowest:.3g}, 1], as no {len(spec.tasks)} tasks can be less correlated with each other",
    )
    for first, then in spec.funnel:
        for name in (first, then):
            if name not in spec.tasks:
                raise UserError(
                    f"synthetic: funnel names task {name!r}, which does not exist", nearest(name, spec.tasks)
                )
        if spec.tasks.index(first) >= spec.tasks.index(then):
            raise UserError(f"synthetic: funnel ({first}, {then}) runs backwards", f"list {first!r} first in tasks")


def _check(valid: bool, name: str, value: object, expected: str) -> None:
    if not valid:
        raise UserError(f"synthetic: {name} is {value!r}", f"expected {expected}")
