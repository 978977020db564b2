"""TrainStep: what the train loop gets, in both precisions, directly and traced by TorchRec's pipeline."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from raysys.data.batch import Batch
from raysys.models.outputs import Output
from raysys.models.ranking.dlrm import DLRM
from raysys.objectives.supervised import Supervised
from raysys.schema import FeatureSchema
from raysys.train.optimizers import OptimizerSettings, build_optimizers
from raysys.train.plan import ShardingSettings, plan_tables
from raysys.train.sharding import shard
from raysys.train.step import TrainStep
from raysys.train.timing import StepTimer, TimedOptimizer

ROWS = 16
SCHEMA = FeatureSchema.from_dict(
    {
        "tables": {
            "item": {"num_embeddings": 20, "embedding_dim": 8},
            "tag": {"num_embeddings": 5, "embedding_dim": 8},
        },
        "dense": [{"name": "age"}],
        "sparse": [{"name": "item", "table": "item"}, {"name": "tag", "table": "tag"}],
        "sequences": [{"name": "history", "features": [{"name": "clicked", "table": "item"}], "max_length": 3}],
        "labels": [{"name": "click"}, {"name": "like"}],
    }
)


def train_step(precision: str = "float32", device: str = "cpu") -> TrainStep:
    return TrainStep(
        DLRM(SCHEMA, bottom=(8,), tower=(8,), embedding_dim=8, seed=2, device=device), Supervised(SCHEMA), precision
    )


def batch(seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    one, row = torch.ones(ROWS, dtype=torch.long), torch.arange(ROWS)
    ids = torch.cat(
        [torch.randint(0, 20, (ROWS,), generator=generator), torch.randint(0, 5, (ROWS,), generator=generator)]
    )
    sparse = KeyedJaggedTensor(["item", "tag"], ids, lengths=torch.cat([one, one]))
    sequences = KeyedJaggedTensor(["clicked"], torch.randint(0, 20, (2 * ROWS,), generator=generator), lengths=2 * one)
    labels = torch.randint(0, 2, (ROWS, 2), generator=generator).float()
    dense = torch.randn(ROWS, 1, generator=generator)
    return Batch(dense, sparse, labels, labels >= 0, torch.ones(ROWS, 2), row, row, row, sequences=sequences)


def test_outputs_are_detached_and_complete():
    loss, outputs = train_step()(batch())
    assert set(outputs) == {"losses", "logits", "batch"}
    assert outputs["logits"].shape == (ROWS, 2)
    assert set(outputs["losses"]) == {"loss", "click", "like"}
    assert loss.requires_grad
    assert not any(value.requires_grad for value in (outputs["logits"], *outputs["losses"].values()))
    assert outputs["losses"]["loss"] == loss
    assert torch.equal(outputs["batch"].example_id, torch.arange(ROWS))


def test_bfloat16_is_used_inside_and_float32_comes_out():
    exact, rounded = train_step()(batch()), train_step("bfloat16")(batch())
    assert rounded[1]["logits"].dtype == rounded[0].dtype == torch.float32
    assert not torch.equal(exact[1]["logits"], rounded[1]["logits"])
    torch.testing.assert_close(exact[1]["logits"], rounded[1]["logits"], rtol=0.05, atol=0.02)  # 8 bits of mantissa


class Shifted(nn.Module):
    """An objective with a parameter of its own and with Python control flow on values, which no tracer could follow."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(1))

    def forward(self, model, batch, embedded):
        output = model.predict(model.interact(embedded))
        logits = output.logits + self.shift
        if logits.sum() > 1e9:
            raise AssertionError("never")
        loss = nn.functional.binary_cross_entropy_with_logits(logits, batch.labels)
        return loss, Output(logits, output.shared, output.hidden), {f"part{i}": loss for i in range(int(loss >= 0) + 1)}


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.usefixtures("one_rank")
def test_the_pipeline_traces_around_the_objective(precision):
    step = train_step(precision, device="meta")
    step.objective = Shifted()
    settings, device = OptimizerSettings(), torch.device("cpu")
    model = shard(step, plan_tables(step, 1, "cpu", ROWS, ShardingSettings(), settings), device, settings)
    optimizers = build_optimizers(model, settings, total_steps=4)

    optimizer = TimedOptimizer(optimizers, StepTimer(), first_step=0)
    pipeline = TrainPipelineSparseDist(model, optimizer, device, pipeline_postproc=True)
    model.train()
    batches = iter([batch(0)] * 4)
    losses = [pipeline.progress(batches)["losses"] for _ in range(4)]
    assert set(losses[0]) == {"loss", "part0", "part1"}
    assert [module.forward.name for module in pipeline._pipelined_modules] == [
        "model.embeddings.bags",
        "model.embeddings.ids_8",
    ]
    assert losses[3]["loss"] < losses[0]["loss"]
    assert step.objective.shift.item() != 0
