"""Sharded models: initial weights, and tables and optimiser states as a checkpoint sees them."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from raysys.data.batch import Batch
from raysys.models.outputs import Embedded, Output
from raysys.models.ranking.dlrm import DLRM
from raysys.objectives.supervised import Supervised
from raysys.schema import FeatureSchema
from raysys.train.optimizers import DenseOptimizer, OptimizerSettings, build_optimizers
from raysys.train.plan import ShardingSettings, plan_tables
from raysys.train.plan_checks import TableSharding
from raysys.train.sharding import shard, unwrap
from raysys.train.sparse_optimizers import SparseOptimizer
from raysys.train.step import TrainStep
from raysys.train.tables import find_tables, gather_table, local_parts, table_weights

ROWS = 6
SCHEMA = FeatureSchema.from_dict(
    {
        "tables": {
            "user": {"num_embeddings": 10, "embedding_dim": 8},
            "item": {"num_embeddings": 9, "embedding_dim": 8},
        },
        "dense": [{"name": "age"}],
        "sparse": [{"name": "users", "table": "user", "max_length": 3}, {"name": "item", "table": "item"}],
        "sequences": [{"name": "history", "features": [{"name": "clicked", "table": "item"}], "max_length": 4}],
        "labels": [{"name": "click"}],
    }
)


def train_step(device: str = "meta") -> TrainStep:
    return TrainStep(DLRM(SCHEMA, embedding_dim=8, bottom=(8,), tower=(8,), seed=1, device=device), Supervised(SCHEMA))


def settings(name: str) -> OptimizerSettings:
    return OptimizerSettings(sparse=SparseOptimizer(name=name, lr=0.1), dense=DenseOptimizer(name="adam", lr=0.01))


def sharded(kind: str, name: str):
    """A model on the ranks of the process group with all tables of one sharding type, and its optimisers."""
    tables = {table: TableSharding((kind,)) for table in ("user", "item")}
    plan = plan_tables(
        train_step(), dist.get_world_size(), "cpu", ROWS, ShardingSettings(tables=tables), settings(name)
    )
    model = shard(train_step(), plan, torch.device("cpu"), settings(name))
    return model, build_optimizers(model, settings(name), total_steps=10)


def batch(step: int) -> Batch:
    """Rows of this rank, another one on each rank."""
    generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
    users = torch.randint(0, 4, (ROWS,), generator=generator)
    events = torch.randint(0, 5, (ROWS,), generator=generator)

    def ids(high: int, count: torch.Tensor) -> torch.Tensor:
        return torch.randint(0, high, (int(count.sum()),), generator=generator)

    one = torch.ones(ROWS, dtype=torch.long)
    sparse = KeyedJaggedTensor(
        ["users", "item"], torch.cat([ids(10, users), ids(9, one)]), lengths=torch.cat([users, one])
    )
    sequences = KeyedJaggedTensor(["clicked"], ids(9, events), lengths=events)
    labels = torch.randint(0, 2, (ROWS, 1), generator=generator).float()
    row = torch.arange(ROWS)
    dense = torch.randn(ROWS, 1, generator=generator)
    return Batch(dense, sparse, labels, labels >= 0, torch.ones(ROWS, 1), row, row, row, sequences=sequences)


def train(model, optimizers, steps: range) -> None:
    for step in steps:
        optimizers.zero_grad()
        model(batch(step))[0].backward()
        optimizers.step(step)


def gathered(model, optimizers) -> dict[str, torch.Tensor]:
    """All tables, their states and the dense optimiser's, whole (on rank 0)."""
    found = {f"tables/{key}": gather_table(value) for key, value in table_weights(model).items()}
    for key, state in optimizers.table_states().items():
        found |= {f"sparse_optimizer/{key}/{name}": gather_table(value) for name, value in state.items()}
    for key, state in optimizers.dense_states().items():
        found |= {f"dense_optimizer/{key}/{name}": value.clone() for name, value in state.items()}
    return found


def state_to_save(model, optimizers) -> dict:
    return {
        "tables": table_weights(model),
        "sparse_optimizer": optimizers.table_states(),
        "dense_optimizer": optimizers.dense_states(),
    }


def initial_tables(kind: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(7)
    model, _ = sharded(kind, "adagrad")
    drawn = torch.rand(1)
    torch.manual_seed(7)
    assert torch.equal(drawn, torch.rand(1))  # sharding has drawn nothing
    return {key: gather_table(value) for key, value in table_weights(model).items()}


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("kind", ["table_wise", "column_wise", "row_wise", "data_parallel"])
def test_initial_tables_are_those_of_the_plain_model(gloo, kind, world_size):
    plain = {key: value.detach() for key, value in table_weights(train_step("cpu")).items()}
    tables = gloo.run(world_size, initial_tables, kind)[0]
    assert set(tables) == {"user", "item"}
    for key, table in tables.items():
        assert torch.equal(table, plain[key])


def train_and_save(kind: str, name: str, folder: str) -> dict[str, torch.Tensor]:
    model, optimizers = sharded(kind, name)
    train(model, optimizers, range(3))
    dcp.save(state_to_save(model, optimizers), checkpoint_id=folder)
    return gathered(model, optimizers)


def load(kind: str, name: str, folder: str) -> tuple[dict[str, torch.Tensor], list[float]]:
    model, optimizers = sharded(kind, name)
    dcp.load(state_to_save(model, optimizers), checkpoint_id=folder)
    optimizers.set_step(3)
    return gathered(model, optimizers)


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("adagrad", [("data_parallel", 1), ("column_wise", 3), ("table_wise", 2)]),
        ("rowwise_adagrad", [("data_parallel", 2), ("table_wise", 3)]),
        ("sgd", [("data_parallel", 2), ("column_wise", 2)]),
    ],
)
@pytest.mark.parametrize("source", ["row_wise", "data_parallel"])
def test_tables_and_states_move_to_another_plan_bit_for_bit(gloo, tmp_path, source, name, targets):
    saved = gloo.run(2, train_and_save, source, name, str(tmp_path))[0]
    states = {key.rpartition("/")[0] for key in saved if key.startswith("sparse_optimizer")}
    assert states == (set() if name == "sgd" else {"sparse_optimizer/user", "sparse_optimizer/item"})
    if name != "sgd":
        assert saved["sparse_optimizer/user/sum"].shape == ((10,) if name == "rowwise_adagrad" else (10, 8))
    for kind, world_size in targets:
        loaded = gloo.run(world_size, load, kind, name, str(tmp_path))[0]
        assert loaded.keys() == saved.keys()
        for key in saved:
            assert torch.equal(loaded[key], saved[key]), (key, kind, world_size)


def states_on_each_rank(kind: str) -> tuple[list[str], int]:
    _, optimizers = sharded(kind, "rowwise_adagrad")
    states = optimizers.table_states()
    return sorted(states), sum(part.values.numel() for state in states.values() for part in local_parts(state["sum"]))


def test_a_rank_without_a_part_of_a_table_still_lists_its_state(gloo):
    ranks = gloo.run(3, states_on_each_rank, "table_wise")
    assert [keys for keys, _ in ranks] == [["item", "user"]] * 3
    assert sorted(held for _, held in ranks) == [0, 9, 10]


class TwoTowers(nn.Module):
    """Two parts with a table of one name each, in collections that are not ours."""

    def __init__(self) -> None:
        super().__init__()
        config = EmbeddingBagConfig(name="user", num_embeddings=4, embedding_dim=8, feature_names=["user"])
        self.left = EmbeddingBagCollection([config], device=torch.device("meta"))
        self.right = EmbeddingBagCollection([config], device=torch.device("meta"))


def foreign_tables() -> dict[str, torch.Tensor]:
    step = TrainStep(TwoTowers(), nn.Identity())
    plan = plan_tables(step, dist.get_world_size(), "cpu", ROWS, ShardingSettings(), settings("adagrad"))
    model = shard(step, plan, torch.device("cpu"), settings("adagrad"), seed=5)
    assert unwrap(model) is step
    return {key: gather_table(value) for key, value in table_weights(model).items()}


def test_tables_of_one_name_and_foreign_collections(gloo):
    one, two = gloo.run(1, foreign_tables)[0], gloo.run(2, foreign_tables)[0]
    assert set(one) == {"model.left.user", "model.right.user"}
    for key, table in one.items():
        assert torch.equal(table, two[key])
        assert 0 < table.abs().max() <= 0.5  # ± 1/√rows


class Doubled(nn.Module):
    """An objective without a table in sight."""

    def forward(self, model, batch, embedded):
        output = Output(logits=2 * model.tower(embedded.dense), shared=embedded.dense, hidden=embedded.dense)
        return output.logits.square().mean(), output, {}


class NoTables(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Linear(1, 1)

    def embed(self, batch):
        return Embedded(tokens=batch.dense, names=(), sequences={}, dense=batch.dense)


def train_without_tables() -> tuple[float, float]:
    step = TrainStep(NoTables(), Doubled())
    plan = plan_tables(step, dist.get_world_size(), "cpu", ROWS, ShardingSettings(), settings("adagrad"))
    model = shard(step, plan, torch.device("cpu"), settings("adagrad"))
    optimizers = build_optimizers(model, settings("adagrad"), total_steps=50)
    before = model(batch(0))[0].item()
    train(model, optimizers, range(50))
    assert (table_weights(model), optimizers.table_states()) == ({}, {})
    return before, model(batch(0))[0].item()


def test_a_model_without_tables_trains(gloo):
    for before, after in gloo.run(2, train_without_tables):
        assert after < before


def averages_gradients() -> bool:
    model = sharded("table_wise", "adagrad")[0]
    return any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules())


def test_one_worker_has_nobody_to_average_gradients_with(gloo):
    assert gloo.run(1, averages_gradients) == [False]
    assert gloo.run(2, averages_gradients) == [True, True]


def test_tables_of_a_plain_model():
    assert [(table.key, table.path, table.parameter_name) for table in find_tables(train_step())] == [
        ("user", "model.embeddings.bags", "embedding_bags.user.weight"),
        ("item", "model.embeddings.ids_8", "embeddings.item.weight"),
    ]
