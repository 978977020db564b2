"""A checkpoint is whole or not there, and loads under every plan and on every number of workers."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from raysys.errors import UserError
from raysys.hashed_folder import MANIFEST, read_manifest
from raysys.train.checkpoint import checkpoint_path, list_checkpoints, remove_old, take_latest, verify_checkpoint
from raysys.train.launch import Worker, _own_process_group
from raysys.train.loop import TrainLoop
from raysys.train.sharding import unwrap
from raysys.train.state import load_state, load_weights, save_state
from raysys.train.tables import gather_table, local_parts, table_weights
from raysys.train.trainer import fit, prepare

TYPES = {"TW": "table_wise", "CW": "column_wise", "RW": "row_wise", "DP": "data_parallel"}
WORKERS = (1, 2, 3)


def prepared_layout(tiny_config, kind, workers, optimizer):
    """Job and plan of a short run with all tables of one sharding type."""
    tables = "{" + ", ".join(f"{table}: {{min_partition: 4}}" for table in ("user", "item", "tag", "brand")) + "}"
    return prepare(
        tiny_config(
            f"train.sharding.sharding_types=[{TYPES[kind]}]",
            f"train.sharding.tables={tables}",
            f"train.optimizers.sparse.name={optimizer}",
            f"trainer={'local' if workers == 1 else 'ray'}",
            *([] if workers == 1 else [f"trainer.workers={workers}"]),
            "train.max_steps=2",
        )
    )


def make_loop(prepared, folder):
    job = dataclasses.replace(prepared.job, folder=folder)
    return TrainLoop(Worker(job, torch.device("cpu"), lambda event: None, lambda: False), prepared.plan)


def contents(loop):
    """All tables and their optimiser's state in one piece (on rank 0), the dense part, and this rank's predictions."""
    tables = {name: whole(value) for name, value in table_weights(loop.model).items()}
    states = {
        f"{table}.{name}": whole(value)
        for table, state in loop.optimizers.table_states().items()
        for name, value in state.items()
    }
    dense = {
        name: value.clone()
        for name, value in unwrap(loop.model).model.state_dict().items()
        if "embeddings.ids" not in name and "embeddings.bags" not in name
    }
    moments = {
        f"{parameter}.{name}": value.clone()
        for parameter, state in loop.optimizers.dense_states().items()
        for name, value in state.items()
    }
    return {
        "tables": tables,
        "states": states,
        "dense": dense,
        "moments": moments,
        "logits": predict(loop.job, loop.model),
    }


def whole(value):
    gathered = gather_table(value)
    return None if gathered is None else gathered.clone()  # what is whole on every rank is live memory


@torch.no_grad()
def predict(job, model):
    """Logits of the first rows of the validation split, the same rows on every rank."""
    batch = job.transforms.to_batch(job.log("valid").read()[:64])
    model.eval()
    logits = unwrap(model).model(batch).logits
    model.train()
    return logits


def save_layouts(prepared, folder):
    """Train and save one run for each sharding type; what each of them then holds."""
    saved = {}
    for kind, run in prepared.items():
        loop = make_loop(run, folder / f"{kind}{dist.get_world_size()}")
        loop.run()
        saved[kind] = contents(loop)
    return saved


def load_layouts(prepared, paths, folder):
    """Load each checkpoint under each sharding type; what the model then holds, and the last one saved again."""
    loaded = {}
    for kind, run in prepared.items():
        name = f"{kind}{dist.get_world_size()}"
        loop = make_loop(run, folder / name)
        for path in paths:
            forget(loop)
            load_state(path, verify_checkpoint(path), loop)
            loaded[name, path] = contents(loop)
        save_state(folder / name / "again", loop)
    return loaded


@torch.no_grad()
def forget(loop):
    """Whatever is not loaded shows as NaN."""
    states = loop.optimizers.table_states().values()
    for value in (*table_weights(loop.model).values(), *(value for state in states for value in state.values())):
        for part in local_parts(value):
            part.values.fill_(torch.nan)
    for parameter in unwrap(loop.model).parameters():
        parameter.fill_(torch.nan)
    for state in loop.optimizers.dense_states().values():
        for value in state.values():
            value.fill_(torch.nan)


@pytest.mark.parametrize("optimizer", ["adagrad", pytest.param("rowwise_adagrad", marks=pytest.mark.soak)])
def test_every_layout_loads_what_every_other_saved(gloo, tiny_config, tmp_path, optimizer):
    kinds = [kind for kind in TYPES if not (kind == "CW" and optimizer == "rowwise_adagrad")]
    layouts = {
        workers: {kind: prepared_layout(tiny_config, kind, workers, optimizer) for kind in kinds} for workers in WORKERS
    }
    saved, loaded = {}, {}
    for workers, prepared in layouts.items():
        for kind, content in gloo.run(workers, save_layouts, prepared, tmp_path)[0].items():
            saved[checkpoint_path(tmp_path / f"{kind}{workers}" / "checkpoints", 2)] = content
    for workers, prepared in layouts.items():
        answers = gloo.run(workers, load_layouts, prepared, list(saved), tmp_path)
        loaded |= answers[0]
        for other in answers[1:]:
            for key, content in other.items():
                torch.testing.assert_close(content["logits"], answers[0][key]["logits"], rtol=1e-6, atol=1e-6)
    assert len(loaded) == (12 if optimizer == "adagrad" else 9) ** 2
    job = layouts[1]["TW"].job
    plain = {path: plain_logits(job, path) for path in saved}
    for (layout, path), content in loaded.items():
        for part in ("tables", "states", "dense", "moments"):
            assert content[part].keys() == saved[path][part].keys()
            for name, value in content[part].items():
                assert torch.equal(value, saved[path][part][name]), (layout, path, name)
        torch.testing.assert_close(content["logits"], plain[path], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(saved[path]["logits"], plain[path], rtol=1e-6, atol=1e-6)
    for layout in {layout for layout, _ in loaded}:
        assert torch.equal(plain_logits(job, tmp_path / layout / "again"), plain[list(saved)[-1]])
    assert saved[next(iter(saved))]["states"]["item.sum"].ndim == (2 if optimizer == "adagrad" else 1)


def plain_logits(job, path):
    step = job.train_step("cpu")
    load_weights(path, step)
    return predict(job, step)


@pytest.fixture
def checkpoints(train_tiny):
    """The folder of the checkpoints of a run with three of them, at steps 2, 4 and 5."""
    folder, _, _ = train_tiny("train.max_steps=5", "train.checkpoint.every_steps=2", "train.checkpoint.keep=3")
    return folder / "checkpoints"


def test_a_checkpoint_holds_what_a_run_needs_to_go_on(checkpoints, tiny_data):
    path = checkpoint_path(checkpoints, 4)
    assert list_checkpoints(checkpoints) == [checkpoint_path(checkpoints, step) for step in (2, 4, 5)]
    names = set(read_manifest(path, 2))
    assert names == {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()} - {MANIFEST}
    assert names >= {
        ".metadata",
        "state.json",
        "window.safetensors",
        "transforms/transforms.json",
        "transforms/vocabulary/user.parquet",
    }
    state = verify_checkpoint(path)
    assert state["format_version"] == 2
    assert (state["step"], state["seed"], state["config"]["train"]["max_steps"]) == (4, 0, 5)
    assert (state["position"]["epoch"], state["position"]["step"], sum(state["position"]["cursors"])) == (0, 4, 600)
    assert state["tokens"][:4] == ["user", "item", "tags", "brand"]
    assert state["schema"]["labels"][0] == {"name": "click", "negative_keep_rate": 0.5}
    assert state["versions"]["torch"] == torch.__version__


def test_a_folder_without_manifest_does_not_exist(checkpoints):
    (checkpoint_path(checkpoints, 5) / MANIFEST).unlink()
    warnings = []
    assert [path.name for path in list_checkpoints(checkpoints)] == ["step_00000002", "step_00000004"]
    path, state = take_latest(checkpoints, warnings.append)
    assert (path.name, state["step"], warnings) == ("step_00000004", 4, [])


def change_a_byte(path):
    file = next(path.glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    return f"{file} does not match its hash"


def remove_a_file(path):
    (path / "transforms" / "transforms.json").unlink()
    return f"{path / 'transforms' / 'transforms.json'} is missing"


def cut_the_manifest(path):
    (path / MANIFEST).write_text((path / MANIFEST).read_text()[:100])
    return f"{path / MANIFEST}: not valid JSON"


@pytest.mark.parametrize("damage", [change_a_byte, remove_a_file, cut_the_manifest])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(checkpoints, damage):
    path, warnings = checkpoint_path(checkpoints, 5), []
    message = damage(path)
    with pytest.raises(UserError) as caught:
        verify_checkpoint(path)
    assert caught.value.message.startswith(message)
    found, state = take_latest(checkpoints, warnings.append)
    assert (found, state["step"]) == (checkpoint_path(checkpoints, 4), 4)
    assert len(warnings) == 1
    assert warnings[0].startswith(message)
    assert warnings[0].endswith(": taking an older checkpoint")
    assert [folder.name for folder in checkpoints.glob("damaged_*")] == ["damaged_step_00000005"]


def test_a_run_goes_on_from_the_one_before_a_damaged_one_and_writes_it_anew(train_tiny, tensors_of):
    options = ["run_id=a", "train.checkpoint.every_steps=3", "train.max_steps=5"]
    folder, _, _ = train_tiny(*options)
    path = checkpoint_path(folder / "checkpoints", 5)
    expected = tensors_of(path)
    change_a_byte(path)
    _, _, events = train_tiny(*options, "resume=auto")
    kinds = {event["event"]: event for event in events}
    assert "does not match its hash: taking an older checkpoint" in kinds["warning"]["message"]
    assert kinds["resumed"]["step"] == 3
    assert list_checkpoints(folder / "checkpoints") == [checkpoint_path(folder / "checkpoints", 3), path]
    verify_checkpoint(path)
    assert tensors_of(path) == expected


def test_old_checkpoints_and_leftovers_go_the_best_one_stays(tmp_path):
    for step in (1, 2, 3, 4, 5):
        checkpoint_path(tmp_path, step).mkdir()
        (checkpoint_path(tmp_path, step) / MANIFEST).touch()
    (checkpoint_path(tmp_path, 2) / MANIFEST).unlink()
    (tmp_path / "damaged_step_00000002").mkdir()
    remove_old(tmp_path, keep=2, best=checkpoint_path(tmp_path, 1))
    left = ["damaged_step_00000002", "step_00000001", "step_00000004", "step_00000005"]
    assert sorted(path.name for path in tmp_path.iterdir()) == left


KILLED = """
import json, sys, time
from raysys.train import checkpoint
from raysys.train.trainer import fit, prepare

write_manifest = checkpoint.write_manifest

def write_or_wait(folder, *rest):
    if folder.name == "step_00000004":
        (folder / "now").touch()
        time.sleep(600)
    write_manifest(folder, *rest)

checkpoint.write_manifest = write_or_wait
fit(prepare(json.loads(sys.argv[1])), [])
"""


def test_killed_while_a_checkpoint_is_written_a_run_goes_on_from_the_one_before(tiny_config, train_tiny, tensors_of):
    options = ["run_id=a", "train.max_steps=5", "train.checkpoint.every_steps=2"]
    config = tiny_config(*options)
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", KILLED, json.dumps(config)], cwd=Path(__file__).parents[2]
    )
    half = checkpoint_path(Path(config["runs_folder"]) / "a" / "checkpoints", 4)
    while not (half / "now").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (half / ".metadata").exists()
    assert (half / "state.json").exists()
    folder, _, events = train_tiny(*options, "resume=auto")
    assert next(event["step"] for event in events if event["event"] == "resumed") == 2
    undisturbed, _, _ = train_tiny(*options, "run_id=b")
    assert half.exists()
    for step in (4, 5):
        found, expected = (tensors_of(checkpoint_path(run / "checkpoints", step)) for run in (folder, undisturbed))
        assert found == expected


def test_weights_that_are_not_finite_are_never_saved(tiny_config):
    prepared = prepare(tiny_config("train.max_steps=2"))
    with _own_process_group(torch.device("cpu")):
        loop = make_loop(prepared, prepared.job.folder)
        weight = next(iter(table_weights(loop.model).values()))
        next(local_parts(weight)).values[3, 2] = torch.inf
        with pytest.raises(UserError, match=r"step 0: tables\.brand is not finite; no checkpoint was written"):
            loop.save("interval")
    assert list_checkpoints(prepared.job.checkpoints) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ["model.tower=[9]"],
            r"dense\.model\.towers\.\S+ has size \[.*8.*\] in the checkpoint, the model has size \[.*9",
        ),
        (
            ["model.layers=2"],
            r"model\.layers\.1\S+ has none in the checkpoint, the model has size .*\n  hint: it was made",
        ),
        (
            ["train.optimizers.sparse.name=sgd"],
            r"sparse_optimizer\.brand\.sum has size \[6, 16\] .*, the model has none",
        ),
        (["train.optimizers.dense.name=adagrad"], r"dense_optimizer\.\S+\.exp_avg has size"),
        (["model=user"], "token 4 of the model was 'dense' when the checkpoint was made, and is None now"),
    ],
    ids=["width", "depth", "sparse optimiser", "dense optimiser", "model"],
)
def test_another_model_or_optimiser_is_named(checkpoints, tiny_config, changes, message):
    prepared = prepare(tiny_config("run_id=other", f"resume={checkpoint_path(checkpoints, 5)}", *changes))
    with pytest.raises(UserError, match=message):
        fit(prepared, [])


def take_on_this_rank(folder):
    warnings = []
    path, state = take_latest(folder, warnings.append)
    return path, state["step"], warnings


def test_all_ranks_pass_over_a_damaged_checkpoint_together(gloo, checkpoints):
    messages = [cut_the_manifest(checkpoint_path(checkpoints, 5)), change_a_byte(checkpoint_path(checkpoints, 4))]
    answers = gloo.run(2, take_on_this_rank, checkpoints)
    for path, step, warnings in answers:
        assert (path, step) == (checkpoint_path(checkpoints, 2), 2)
        assert warnings[-1].startswith(messages[1])
    assert len(answers[0][2]) == 2  # rank 0 reports; the other may find the first one gone
    left = ["damaged_step_00000004", "damaged_step_00000005", "step_00000002"]
    assert sorted(path.name for path in checkpoints.iterdir()) == left
