"""Sharded training is the same training: every sharding type on 1, 2 and 3 workers against a plain torch loop."""

import functools

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torchrec.distributed.train_pipeline import TrainPipelineBase, TrainPipelineSparseDist
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from raysys.data.batch import Batch
from raysys.models.embeddings import Embeddings
from raysys.models.outputs import Output
from raysys.objectives.supervised import Supervised
from raysys.schema import FeatureSchema
from raysys.train.optimizers import DenseOptimizer, OptimizerSettings, build_optimizers
from raysys.train.plan import ShardingSettings, plan_tables
from raysys.train.plan_checks import TableSharding
from raysys.train.sharding import shard
from raysys.train.sparse_optimizers import SparseOptimizer
from raysys.train.step import TrainStep
from raysys.train.tables import find_tables, gather_table, table_weights

STEPS, ROWS, LR = 20, 24, 0.1
SCHEMA = FeatureSchema.from_dict(
    {
        "tables": {
            "user": {"num_embeddings": 11, "embedding_dim": 8},
            "tag": {"num_embeddings": 7, "embedding_dim": 8},
            "brand": {"num_embeddings": 5, "embedding_dim": 16},
            "item": {"num_embeddings": 13, "embedding_dim": 8},
        },
        "dense": [{"name": "price"}, {"name": "age"}],
        "sparse": [
            {"name": "user", "table": "user"},
            {"name": "tags", "table": "tag", "max_length": 4},
            {"name": "brands", "table": "brand", "max_length": 3, "pooling": "mean"},
            {"name": "item", "table": "item"},
        ],
        "sequences": [{"name": "history", "features": [{"name": "clicked", "table": "item"}], "max_length": 5}],
        "labels": [{"name": "click"}, {"name": "spend", "kind": "regression", "required": False}],
    }
)


class TinyModel(nn.Module):
    """The contract of a ranking model in a few lines: pooled bags, a single id and a sequence, two tasks."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.embeddings = Embeddings(SCHEMA, embedding_dim=8, seed=3, device=device, init_scale=0.3)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            self.body = nn.Linear(4 * 8 + 8 + 2, 12)
            self.head = nn.Linear(12, 2)

    def embed(self, batch):
        return self.embeddings(batch)

    def interact(self, embedded):
        events, mask = embedded.sequences["history"]
        history = (events * mask[..., None]).sum(1)
        return torch.tanh(self.body(torch.cat([embedded.tokens.flatten(1), history, embedded.dense], 1)))

    def predict(self, shared):
        return Output(logits=self.head(shared), shared=shared, hidden=shared[:, None])


def train_step(device: str = "meta", precision: str = "float32") -> TrainStep:
    return TrainStep(TinyModel(device), Supervised(SCHEMA), precision)


def global_batch(step: int, rows: slice = slice(0, ROWS)) -> Batch:
    """Rows of global batch `step`: ids with repetitions, empty bags, missing labels, weights, and padding at its end."""
    generator = torch.Generator().manual_seed(100 + step)

    def draw(high, *shape):
        return torch.randint(0, high, shape, generator=generator)

    def jagged(features):
        values, lengths = [], []
        for high, shortest, longest in features.values():
            count = shortest + draw(longest - shortest + 1, ROWS)
            ids = draw(high, ROWS, longest)
            count[-2:] = 0  # padding has no ids
            for row in range(*rows.indices(ROWS)):
                values.append(ids[row, : count[row]])
            lengths.append(count[rows])
        return KeyedJaggedTensor(list(features), torch.cat(values), lengths=torch.cat(lengths))

    sparse = jagged({"user": (11, 1, 1), "tags": (7, 0, 4), "brands": (5, 0, 3), "item": (13, 1, 1)})
    sequences = jagged({"clicked": (13, 0, 5)})
    dense = torch.randn(ROWS, 2, generator=generator)
    labels = torch.stack([draw(2, ROWS).float(), torch.randn(ROWS, generator=generator)], 1)
    mask = torch.stack([torch.ones(ROWS), draw(2, ROWS).float()], 1)
    weight = torch.rand(ROWS, 1, generator=generator) + 0.5
    weight[-2:] = 0
    ids = torch.arange(ROWS)
    parts = (dense, labels * mask, mask.bool(), weight * mask, ids, ids, ids)
    dense, labels, mask, weight, example, group, time = (part[rows] for part in parts)
    return Batch(dense, sparse, labels, mask, weight, example, group, time, sequences=sequences)


def settings(name: str, clip: float | None = None) -> OptimizerSettings:
    return OptimizerSettings(
        sparse=SparseOptimizer(name=name, lr=LR, eps=1e-8),
        dense=DenseOptimizer(name="sgd", lr=LR),
        clip={} if clip is None else {"model": clip},
    )


class PlainRowWiseAdagrad:
    """Row-wise Adagrad as the paper writes it, on gradients of a plain `nn.Embedding`."""

    def __init__(self, parameters) -> None:
        self.parameters = list(parameters)
        self.sums = [torch.zeros(len(parameter)) for parameter in self.parameters]

    @torch.no_grad()
    def step(self) -> None:
        for parameter, total in zip(self.parameters, self.sums, strict=True):
            total += (parameter.grad**2).sum(1) / parameter.shape[1]
            parameter -= LR * parameter.grad / (total.sqrt() + 1e-8)[:, None]


@functools.cache
def plain_training(name: str, clip: float | None = None) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and final weights of the unsharded model in an ordinary torch loop on whole batches."""
    step = train_step("cpu")
    tables = [table.parameter for table in find_tables(step)]
    dense = [parameter for parameter in step.parameters() if all(parameter is not table for table in tables)]
    kinds = {
        "sgd": lambda: torch.optim.SGD(tables, lr=LR),
        "adagrad": lambda: torch.optim.Adagrad(tables, lr=LR, eps=1e-8),
        "rowwise_adagrad": lambda: PlainRowWiseAdagrad(tables),
    }
    optimizers = [kinds[name](), torch.optim.SGD(dense, lr=LR)]
    losses = []
    for i in range(STEPS):
        step.zero_grad()
        loss, _ = step(global_batch(i))
        loss.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(dense, clip)
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
    return losses, {name: value.detach().clone() for name, value in step.state_dict().items()}


def sharded_training(
    kinds: dict[str, str],
    name: str,
    pipeline: str = "base",
    dense_parallel: str = "ddp",
    clip: float | None = None,
) -> dict:
    """The same on the ranks of the process group, each with its share of the rows (interleaved, as readers do)."""
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    tables = {
        table: TableSharding((kind,), min_partition=4 if "column" in kind else None) for table, kind in kinds.items()
    }
    optimizer_settings = settings(name, clip)
    plan = plan_tables(train_step(), world_size, "cpu", ROWS, ShardingSettings(tables=tables), optimizer_settings)
    device = torch.device("cpu")
    model = shard(train_step(), plan, device, optimizer_settings, dense_parallel=dense_parallel)
    optimizers = StepCounter(build_optimizers(model, optimizer_settings, STEPS))
    batches = iter([global_batch(i, slice(rank, ROWS, world_size)) for i in range(STEPS)])
    if pipeline == "base":
        pipe = TrainPipelineBase(model, optimizers, device)
    else:
        pipe = TrainPipelineSparseDist(model, optimizers, device, pipeline_postproc=True)
    model.train()
    losses = [pipe.progress(batches)["losses"]["loss"].item() for _ in range(STEPS)]
    parameters = dict(model.named_parameters())
    dense = {key: value.detach() for key, value in parameters.items() if key.split(".")[-2] not in TABLES}
    whole = {key: value.full_tensor() if isinstance(value, DTensor) else value for key, value in dense.items()}
    return {
        "losses": losses,
        "weights": {key: gather_table(value) for key, value in table_weights(model).items()} | whole,
        "looked_up_ahead": len(getattr(pipe, "_pipelined_modules", ())),
        "sharded_dense": [key for key, value in dense.items() if isinstance(value, DTensor)],
    }


class StepCounter:
    """What a pipeline takes for an optimiser."""

    def __init__(self, optimizers) -> None:
        self.optimizers, self.done = optimizers, 0

    def zero_grad(self) -> None:
        self.optimizers.zero_grad()

    def step(self) -> None:
        self.optimizers.step(self.done)
        self.done += 1


def check_against_plain(results: list[dict], name: str, clip: float | None = None) -> None:
    plain_losses, plain_weights = plain_training(name, clip)
    losses = torch.tensor([result["losses"] for result in results]).mean(0)
    torch.testing.assert_close(losses, torch.tensor(plain_losses), rtol=1e-5, atol=0)
    weights = {PLAIN_NAMES.get(key, key): value for key, value in results[0]["weights"].items()}
    assert weights.keys() == plain_weights.keys()
    # Adagrad divides by the gradients' own size, and so keeps their relative error: where a gradient is what is left of terms
    # a hundred times larger, that is a hundred roundings of float32, of a step as large as the rate.
    atol = 100 * LR * 2**-23 if name == "adagrad" else 1e-6
    for key, value in weights.items():
        torch.testing.assert_close(value, plain_weights[key], rtol=1e-5, atol=atol)


TABLES = ("user", "tag", "brand", "item")
PLAIN_NAMES = {table: f"model.embeddings.bags.embedding_bags.{table}.weight" for table in TABLES}
PLAIN_NAMES["item"] = "model.embeddings.ids_8.embeddings.item.weight"
LAYOUTS = [
    (kind, world_size, name)
    for name in ("adagrad", "sgd", "rowwise_adagrad")
    for kind in ("table_wise", "column_wise", "row_wise", "data_parallel")
    for world_size in (1, 2, 3)
    if not (kind == "column_wise" and name == "rowwise_adagrad")
]


@pytest.mark.parametrize(("kind", "world_size", "name"), LAYOUTS)
def test_a_sharding_type_trains_as_plain_torch_does(gloo, kind, world_size, name):
    results = gloo.run(world_size, sharded_training, dict.fromkeys(TABLES, kind), name)
    check_against_plain(results, name)


@pytest.mark.parametrize("pipeline", ["base", "sparse_dist"])
def test_both_pipelines_train_a_mixed_plan_as_plain_torch_does(gloo, pipeline):
    kinds = {"user": "row_wise", "tag": "data_parallel", "brand": "column_wise", "item": "row_wise"}
    results = gloo.run(2, sharded_training, kinds, "adagrad", pipeline)
    check_against_plain(results, "adagrad")
    assert results[0]["looked_up_ahead"] == (
        2 if pipeline == "sparse_dist" else 0
    )  # bags and ids are both looked up ahead


def test_pipelines_give_the_same_losses_bit_for_bit(gloo):
    kinds = dict(zip(TABLES, ("table_wise", "row_wise", "data_parallel", "table_wise"), strict=True))
    base, ahead = (gloo.run(2, sharded_training, kinds, "adagrad", pipeline) for pipeline in ("base", "sparse_dist"))
    assert [result["losses"] for result in base] == [result["losses"] for result in ahead]


def test_table_row_wise_bags_train_as_plain_torch_does(gloo):
    kinds = dict(zip(TABLES, ("table_row_wise", "table_row_wise", "table_wise", "table_wise"), strict=True))
    check_against_plain(gloo.run(2, sharded_training, kinds, "adagrad"), "adagrad")


@pytest.mark.parametrize(
    ("dense_parallel", "pipeline", "world_size", "workers_per_host"),
    [("ddp", "base", 2, 2), ("fsdp", "base", 3, 3), ("fsdp", "sparse_dist", 2, 2), ("hsdp", "sparse_dist", 4, 2)],
)
def test_a_sharded_dense_part_trains_and_is_clipped_as_plain_torch_does(
    gloo, dense_parallel, pipeline, world_size, workers_per_host
):
    arguments = (dict.fromkeys(TABLES, "table_wise"), "adagrad", pipeline, dense_parallel, 0.05)
    results = gloo.run(world_size, sharded_training, *arguments, local_world_size=workers_per_host)
    check_against_plain(results, "adagrad", clip=0.05)
    sharded = ["model.body.bias", "model.body.weight", "model.head.bias", "model.head.weight"]
    projection = "model.embeddings.assembly.projections.16.weight"
    assert sorted(results[0]["sharded_dense"]) == ([] if dense_parallel == "ddp" else sorted([*sharded, projection]))


@pytest.mark.parametrize("name", ["adagrad", "sgd", "rowwise_adagrad"])
def test_every_table_moves(name):
    before, after = train_step("cpu").state_dict(), plain_training(name)[1]
    for key in PLAIN_NAMES.values():
        assert (before[key] != after[key]).any(1).float().mean() > 0.5
