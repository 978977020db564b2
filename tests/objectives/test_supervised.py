from __future__ import annotations

import datetime
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from raysys.errors import UserError
from raysys.models.outputs import Embedded, Output
from raysys.objectives.supervised import Supervised, squared_norms
from raysys.schema import FeatureSchema

RANKS, ROWS, LENGTH, WIDTH = 2, 12, 3, 4
SCHEMA = FeatureSchema.from_dict(
    {
        "labels": [
            {"name": "click"},
            {"name": "like", "required": False},
            {"name": "dwell", "kind": "regression", "required": False},
            {"name": "share", "required": False},
        ]
    }
)


class Tiny(nn.Module):
    """A table, a sequence over it and a linear head: enough for every term of the loss."""

    def __init__(self) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(1)
        self.table = nn.Parameter(torch.randn(10, WIDTH, generator=random))
        self.head = nn.Parameter(torch.randn(WIDTH, len(SCHEMA.tasks), generator=random))

    def embed(self, batch: SimpleNamespace) -> Embedded:
        real = (batch.example_id >= 0).float()[:, None, None]  # padding has empty bags
        events = self.table[batch.history] * batch.history_mask[..., None]
        return Embedded(
            self.table[batch.ids] * real, ("a", "b"), {"history": (events, batch.history_mask)}, torch.empty(0)
        )

    def interact(self, embedded: Embedded) -> Tensor:
        return embedded.tokens.sum(1) + embedded.sequences["history"][0].sum(1)

    def predict(self, shared: Tensor) -> Output:
        return Output(logits=shared @ self.head, shared=shared, hidden=shared)


def joint_batch() -> SimpleNamespace:
    """Labels of `like` are in the first rows only, `share` has none at all."""
    random = torch.Generator().manual_seed(2)
    mask = torch.ones(ROWS, 4, dtype=torch.bool)
    mask[5:, 1] = False
    mask[::2, 2] = False
    mask[:, 3] = False
    labels = torch.randint(0, 2, (ROWS, 4), generator=random).float()
    labels[:, 2] *= 3.5
    return SimpleNamespace(
        ids=torch.randint(0, 10, (ROWS, 2), generator=random),
        history=torch.randint(0, 10, (ROWS, LENGTH), generator=random),
        history_mask=torch.arange(LENGTH) < torch.arange(ROWS)[:, None] % (LENGTH + 1),
        labels=labels * mask,
        label_mask=mask,
        weight=(torch.rand(ROWS, 4, generator=random) + 0.5) * mask,
        example_id=torch.arange(ROWS),
    )


def batch_of_rank(rank: int) -> SimpleNamespace:
    """Seven rows for the first rank, five and two of padding for the second."""
    rows = [slice(0, 7), slice(7, ROWS)][rank]
    part = {name: column[rows] for name, column in vars(joint_batch()).items()}
    padding = 7 - len(part["labels"])
    fill = {name: torch.zeros(padding, *column.shape[1:], dtype=column.dtype) for name, column in part.items()}
    fill["example_id"] -= 1
    return SimpleNamespace(**{name: torch.cat([column, fill[name]]) for name, column in part.items()})


def objective() -> Supervised:
    return Supervised(SCHEMA, task_weights={"like": 0.5, "dwell": 2.0}, embedding_l2=0.3)


def gradients(batch: SimpleNamespace) -> tuple[Tensor, dict[str, Tensor], list[Tensor]]:
    model = Tiny()
    loss, _, parts = objective()(model, batch, model.embed(batch))
    loss.backward()
    return loss.detach(), parts, [parameter.grad for parameter in model.parameters()]


def work(rank: int, folder: Path) -> None:
    """One rank: the gradients that data-parallel training would apply."""
    limit = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=RANKS, timeout=limit)
    loss, parts, own = gradients(batch_of_rank(rank))
    for value in (loss, *parts.values(), *own):
        dist.all_reduce(value)
        value /= RANKS
    torch.save({"loss": loss, "parts": parts, "gradients": own}, folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_average_to_the_gradient_of_the_joint_batch(tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, __file__, tmp_path], env=environment, check=True, timeout=120)
    loss, parts, expected = gradients(joint_batch())
    for rank in range(RANKS):
        result = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(result["loss"], loss)
        torch.testing.assert_close(result["parts"], parts)
        torch.testing.assert_close(result["gradients"], expected, rtol=1e-5, atol=1e-6)
    assert all(gradient.abs().max() > 0.01 for gradient in expected)


def test_the_loss_by_hand():
    batch, model = joint_batch(), Tiny()
    embedded = model.embed(batch)
    loss, output, parts = objective()(model, batch, embedded)
    p, y, w = output.logits.double().sigmoid(), batch.labels.double(), batch.weight.double()
    expected = {
        task: (w[:, i] * -(y[:, i] * p[:, i].log() + (1 - y[:, i]) * (1 - p[:, i]).log())).sum() / w[:, i].sum()
        for i, task in enumerate(["click", "like"])
    }
    expected["dwell"] = (w[:, 2] * (output.logits[:, 2] - y[:, 2]) ** 2).sum() / w[:, 2].sum()
    expected["share"] = torch.tensor(0.0)
    expected["embedding_l2"] = 0.5 * 0.3 * squared_norms(embedded).mean()
    assert list(parts) == list(expected)
    for name, part in parts.items():
        assert float(part) == pytest.approx(float(expected[name]), rel=1e-5)
        assert not part.requires_grad
    total = expected["click"] + 0.5 * expected["like"] + 2 * expected["dwell"] + expected["embedding_l2"]
    assert float(loss) == pytest.approx(float(total), rel=1e-5)


def test_squared_norms_count_a_sequence_once_and_members_too():
    tokens = torch.tensor([[[1.0, 2.0], [0.0, 3.0]], [[0.0, 0.0], [1.0, 0.0]]])
    events = torch.tensor([[[2.0, 0.0], [0.0, 4.0]], [[7.0, 7.0], [7.0, 7.0]]])
    mask = torch.tensor([[True, True], [False, False]])
    member = Embedded(tokens, ("a", "b"), {}, torch.empty(2, 0))
    embedded = Embedded(tokens, ("a", "b"), {"h": (events, mask)}, torch.empty(2, 0), {"m": member})
    assert squared_norms(embedded).tolist() == [14 + (4 + 16) / 2 + 14, 1 + 0 + 1]


def test_a_batch_without_any_label_has_loss_and_gradient_zero():
    batch = joint_batch()
    batch.label_mask[:], batch.weight[:], batch.labels[:] = False, 0, 0
    loss, parts, found = gradients(batch)
    assert float(loss) == 0
    assert all(float(part) == 0 for part in parts.values())
    assert all(torch.count_nonzero(gradient) == 0 for gradient in found)


def test_padding_changes_nothing():
    batch = batch_of_rank(1)
    short = SimpleNamespace(**{name: column[:5] for name, column in vars(batch).items()})
    loss, parts, expected = gradients(short)
    padded_loss, padded_parts, found = gradients(batch)
    torch.testing.assert_close(padded_loss, loss)
    torch.testing.assert_close(padded_parts, parts)
    torch.testing.assert_close(found, expected)


def test_no_regulariser_unless_asked_for():
    batch, model = joint_batch(), Tiny()
    loss, _, parts = Supervised(SCHEMA)(model, batch, model.embed(batch))
    assert list(parts) == list(SCHEMA.tasks)
    torch.testing.assert_close(loss.detach(), sum(parts.values()))


def test_under_autocast_the_loss_itself_is_float32():
    batch, model = joint_batch(), Tiny()
    expected = objective()(model, batch, model.embed(batch))[2]["embedding_l2"]
    with torch.autocast("cpu", torch.bfloat16):
        loss, output, parts = objective()(model, batch, model.embed(batch))
    assert output.logits.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    torch.testing.assert_close(parts["embedding_l2"], expected)


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        (
            {"task_weights": {"clicks": 1.0}},
            "objective.task_weights: no task 'clicks' in schema",
            "did you mean 'click'?",
        ),
        ({"task_weights": {"like": -1.0}}, "objective.task_weights.like is -1.0", "a number of at least 0 is expected"),
        ({"embedding_l2": -0.1}, "objective.embedding_l2 is -0.1", "a number of at least 0 is expected"),
    ],
)
def test_wrong_settings_are_named(options, message, hint):
    with pytest.raises(UserError) as error:
        Supervised(SCHEMA, **options)
    assert (error.value.message, error.value.hint) == (message, hint)


if __name__ == "__main__":  # one process imports torch for all ranks; nothing has started a thread yet, so it may fork
    mp.start_processes(work, args=(Path(sys.argv[1]),), nprocs=RANKS, start_method="fork")
