"""Gradient balancing on sharded models: one update of a fused table a step, and the same shares on any number of ranks."""

import functools

import numpy as np
import pytest
import torch
from torchrec.distributed.train_pipeline import TrainPipelineBase, TrainPipelineSparseDist
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from raysys.data.batch import Batch
from raysys.models.multitask.mmoe import MMoE
from raysys.models.ranking.shared_bottom import SharedBottom
from raysys.nn.collectives import rank, world_size
from raysys.objectives.multibalance import MultiBalance
from raysys.schema import FeatureSchema
from raysys.train.optimizers import DenseOptimizer, OptimizerSettings, build_optimizers
from raysys.train.plan import ShardingSettings, plan_tables
from raysys.train.plan_checks import TableSharding
from raysys.train.sharding import shard
from raysys.train.sparse_optimizers import SparseOptimizer
from raysys.train.step import TrainStep
from raysys.train.tables import find_tables, gather_table, table_weights
from raysys.train.timing import StepTimer, TimedOptimizer

ROWS, STEPS, LR = 24, 4, 0.1
HEADS = {"towers": None, "mmoe": functools.partial(MMoE, experts=3, widths=[[8]])}
SCHEMA = FeatureSchema.from_dict(
    {
        "tables": {"item": {"num_embeddings": 11, "embedding_dim": 8}},
        "dense": [{"name": "age"}],
        "sparse": [{"name": "item", "table": "item"}],
        "labels": [{"name": "click"}, {"name": "like", "required": False}, {"name": "share", "required": False}],
    }
)
SETTINGS = OptimizerSettings(
    sparse=SparseOptimizer(name="adagrad", lr=LR, eps=1e-8), dense=DenseOptimizer(name="sgd", lr=LR)
)


def train_step(head, device="meta") -> TrainStep:
    model = SharedBottom(
        SCHEMA,
        embedding_dim=8,
        bottom=[8],
        deep=[12],
        tower=[6],
        head=HEADS[head],
        init_scale=0.3,
        seed=1,
        device=device,
    )
    return TrainStep(model, MultiBalance(SCHEMA, rule="minnorm", warmup_steps=1))


def global_batch(step, rows=slice(0, ROWS)) -> Batch:
    generator = torch.Generator().manual_seed(step)
    ids, number = torch.randint(0, 11, (ROWS,), generator=generator), torch.arange(ROWS)
    labels = torch.randint(0, 2, (ROWS, 3), generator=generator).float()
    mask = torch.ones(ROWS, 3, dtype=torch.bool)
    mask[: ROWS // 2, 1] = False  # like: the second half only
    mask[:, 2] = step % 2 == 0  # share: not in every batch
    dense = torch.randn(ROWS, 1, generator=generator)
    sparse = KeyedJaggedTensor(["item"], ids[rows], lengths=torch.ones_like(ids[rows]))
    labels, mask, number = (labels * mask)[rows], mask[rows], number[rows]
    return Batch(dense[rows], sparse, labels, mask, mask.float(), number, number, number)


def sharded(head, pipeline, dense_parallel="ddp"):
    """Losses, state of the objective, table and Adagrad's state after some steps."""
    step, device = train_step(head), torch.device("cpu")
    placed = ShardingSettings(tables={"item": TableSharding(sharding_types=["table_wise"])})  # fused
    plan = plan_tables(step, world_size(), "cpu", ROWS, placed, SETTINGS)
    model = shard(step, plan, device, SETTINGS, dense_parallel=dense_parallel)
    optimizers = build_optimizers(model, SETTINGS, total_steps=STEPS)
    size = ROWS // world_size()
    batches = iter([global_batch(i, slice(rank() * size, (rank() + 1) * size)) for i in range(STEPS)])
    calls = []
    next(step.model.deep.parameters()).register_hook(lambda gradient: calls.append(1))

    kind = {"base": TrainPipelineBase, "sparse_dist": TrainPipelineSparseDist}[pipeline]
    runner = kind(model, TimedOptimizer(optimizers, StepTimer(), first_step=0), device)
    model.train()
    losses, shares = [], []
    for _ in range(STEPS):
        losses.append(float(runner.progress(batches)["losses"]["loss"]))
        shares.append(step.objective.shares.clone())
    (weight,), (states,) = table_weights(model).values(), optimizers.table_states().values()
    return {
        "losses": losses,
        "shares": torch.stack(shares),
        "buffers": {name: value.clone() for name, value in step.objective.named_buffers()},
        "table": gather_table(weight),
        "adagrad": gather_table(states["sum"]),
        "calls": len(calls),
    }


def plain(head):
    """The same in a plain loop with Adagrad on the table, each update from one gradient."""
    step = train_step(head, "cpu")
    (table,) = find_tables(step)
    dense = [p for name, p in step.named_parameters() if not name.startswith(f"{table.path}.")]
    dense_optimizer = torch.optim.SGD(dense, lr=LR)
    squares, losses, shares = torch.zeros_like(table.parameter), [], []
    for i in range(STEPS):
        step.zero_grad()
        loss, _ = step(global_batch(i))
        loss.backward()
        with torch.no_grad():
            squares += table.parameter.grad.square()
            table.parameter.sub_(LR * table.parameter.grad / (squares.sqrt() + 1e-8))
        dense_optimizer.step()
        losses.append(float(loss))
        shares.append(step.objective.shares.clone())
    return {"losses": losses, "shares": torch.stack(shares), "table": table.parameter.detach(), "adagrad": squares}


def check(found, expected):
    torch.testing.assert_close(found["shares"], expected["shares"], rtol=0, atol=1e-6)
    torch.testing.assert_close(found["table"], expected["table"], rtol=0, atol=2e-5)
    torch.testing.assert_close(found["adagrad"], expected["adagrad"], rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("pipeline", ["base", "sparse_dist"])
@pytest.mark.parametrize("head", HEADS)
def test_a_fused_table_is_updated_once_a_step(gloo, head, pipeline):
    (found,) = gloo.run(1, sharded, head, pipeline)
    expected = plain(head)
    assert found["calls"] == STEPS
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    check(found, expected)


@pytest.mark.parametrize("pipeline", ["base", "sparse_dist"])
@pytest.mark.parametrize("head", HEADS)
def test_two_ranks_find_the_shares_of_the_joint_batch(gloo, head, pipeline):
    first, second = gloo.run(2, sharded, head, pipeline)
    expected = plain(head)
    both = [(a + b) / 2 for a, b in zip(first["losses"], second["losses"], strict=True)]
    assert both == pytest.approx(expected["losses"], rel=1e-5)
    check(first, expected)
    for name, value in first["buffers"].items():
        assert torch.equal(value, second["buffers"][name]), name
    assert len({tuple(row) for row in first["shares"].tolist()}) == STEPS


@pytest.mark.parametrize("head", HEADS)
def test_fully_sharded_dense_parts_are_balanced_too(gloo, head):
    found, _ = gloo.run(2, sharded, head, "base", "fsdp")
    check(found, plain(head))


@pytest.mark.parametrize("objective", ["multibalance", "mgda", "pcgrad", "gradnorm", "uncertainty"])
def test_runs_keep_what_a_rule_remembers(train_tiny, tensors_of, objective):
    folder, outcome, events = train_tiny(f"objective={objective}", "train.max_steps=3", "train.log_every=3")
    assert outcome.status == "finished"
    (step,) = [event for event in events if event["event"] == "step"]
    saved = tensors_of(folder / "checkpoints/step_00000003")
    if objective == "uncertainty":
        assert set(step["parts"]) == {"click", "spend"}
        assert any(np.frombuffer(saved["dense.objective.log_variance"], np.float32))
    else:
        assert set(step["parts"]) == {"click", "spend", "weight_click", "weight_spend", "direction_norm"}
        assert step["parts"]["direction_norm"] > 0
        assert all(np.frombuffer(saved["dense.objective.weights"], np.float64))
    if objective == "multibalance":
        assert np.frombuffer(saved["dense.objective.seen"], np.float64).tolist() == [3, 3]
