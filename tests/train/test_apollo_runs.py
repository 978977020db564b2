"""APOLLO in training: the same on two ranks as on one, and from a checkpoint of a run as if nothing had happened."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from raysys.train.apollo import LowRank
from raysys.train.optimizers import DenseOptimizer

STEPS, ROWS = 7, 12


def data_parallel(name: str) -> tuple[list[Tensor], list[Tensor]]:
    """Weights after some steps, each rank with its share of the rows, and what the optimiser remembers."""
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(64, 80), nn.Tanh(), nn.Linear(80, 66)))
    torch.manual_seed(dist.get_rank())  # what else a rank draws must not matter
    low_rank = LowRank(update_gap=3)
    optimizer = DenseOptimizer(name=name, lr=0.01, low_rank=low_rank).build(list(model.parameters()))
    share = slice(dist.get_rank(), ROWS, dist.get_world_size())
    for step in range(STEPS):
        x, y = torch.randn(2, ROWS, 66, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (model(x[share, :64]) - y[share]).square().mean().backward()
        optimizer.step()
    remembered = [value for state in optimizer.state.values() for value in state.values()]
    return [parameter.detach() for parameter in model.parameters()], remembered


@pytest.mark.parametrize("name", ["apollo", "apollo_mini"])
def test_two_ranks_train_as_one(gloo, name):
    (alone,) = gloo.run(1, data_parallel, name)
    first, second = gloo.run(2, data_parallel, name)
    for weights, others in zip(first, second, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))
    # A step is at most about lr a weight; the gradients of the two ways differ by rounding.
    torch.testing.assert_close(first[0], alone[0], rtol=0, atol=STEPS * 0.01 * 1e-4)
    initial = nn.Linear(64, 80)
    assert (first[0][0] - initial.weight).abs().max() > 0.01


@pytest.mark.parametrize("name", ["apollo", "apollo_mini"])
def test_a_run_goes_on_from_its_checkpoint_with_the_same_bits(train_tiny, tensors_of, name):
    dense = "{" + f"name: {name}, lr: 0.01, low_rank: {{min_dim: 8, update_gap: 2}}" + "}"
    options = [f"train.optimizers.dense={dense}", "train.max_steps=6", "train.checkpoint={every_steps: 3, keep: 2}"]
    folder, outcome, _ = train_tiny(*options, "run_id=undisturbed")
    assert outcome.status == "finished"
    resumed, _, events = train_tiny(*options, "run_id=resumed", f"resume={folder}/checkpoints/step_00000003")
    assert next(event["step"] for event in events if event["event"] == "resumed") == 3
    expected = tensors_of(folder / "checkpoints/step_00000006")
    assert any(key.endswith(".seed") for key in expected)  # a matrix is covered
    assert tensors_of(resumed / "checkpoints/step_00000006") == expected
