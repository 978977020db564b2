"""Optimisers: fused and dense ones do the same, rates and clipping reach them, their state can be loaded into."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from raysys.errors import UserError
from raysys.train.optimizers import DenseOptimizer, OptimizerSettings, build_optimizers, clip_gradients, clip_groups
from raysys.train.plan import ShardingSettings, plan_tables
from raysys.train.plan_checks import TableSharding
from raysys.train.schedules import Schedule
from raysys.train.sharding import shard
from raysys.train.sparse_optimizers import RowWiseAdagrad, SparseOptimizer
from raysys.train.tables import gather_table, table_weights

ROWS = 8


class Tables(nn.Module):
    """A table of bags, a table of ids and a dense part; the loss is quadratic in what is looked up."""

    def __init__(self) -> None:
        super().__init__()
        meta = torch.device("meta")
        user = EmbeddingBagConfig(name="user", num_embeddings=ROWS, embedding_dim=4, feature_names=["user"])
        item = EmbeddingConfig(name="item", num_embeddings=ROWS, embedding_dim=4, feature_names=["item"])
        self.bags = EmbeddingBagCollection([user], device=meta)
        self.ids = EmbeddingCollection([item], device=meta)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.tower = nn.Linear(8, 3)

    def forward(self, features: KeyedJaggedTensor) -> torch.Tensor:
        item = self.ids(features)["item"].values()  # one id per row
        return self.tower(torch.cat([self.bags(features)["user"], item], 1)).square().sum()


def features(step: int) -> KeyedJaggedTensor:
    users = {0: [[0, 0, 1], [2]], 1: [[], [2, 3]], 2: [[1], [1]]}[step % 3]
    items = {0: [0, 1], 1: [1, 1], 2: [5, 0]}[step % 3]
    values = [i for bag in users for i in bag] + items
    return KeyedJaggedTensor(
        ["user", "item"], torch.tensor(values), lengths=torch.tensor([*(len(bag) for bag in users), 1, 1])
    )


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def build(kind: str, settings: OptimizerSettings, total_steps: int = 10):
    tables = {table: TableSharding((kind,)) for table in ("user", "item")}
    plan = plan_tables(Tables(), 1, "cpu", 2, ShardingSettings(tables=tables), settings)
    model = shard(Tables(), plan, torch.device("cpu"), settings)
    return model, build_optimizers(model, settings, total_steps)


def train(model, optimizers, steps: range) -> dict[str, torch.Tensor]:
    for step in steps:
        optimizers.zero_grad()
        model(features(step)).backward()
        optimizers.step(step)
    return {key: gather_table(value) for key, value in table_weights(model).items()}


@pytest.mark.parametrize(
    "sparse",
    [
        SparseOptimizer(name="sgd", lr=0.05),
        SparseOptimizer(name="adagrad", lr=0.1, eps=1e-3),
        SparseOptimizer(name="rowwise_adagrad", lr=0.1, eps=1e-3),
        SparseOptimizer(name="adagrad", lr=0.1, schedule=Schedule("linear", warmup_steps=3)),
    ],
    ids=["sgd", "adagrad", "rowwise", "schedule"],
)
@pytest.mark.usefixtures("one_rank")
def test_the_dense_twin_does_what_the_fused_optimiser_does(sparse):
    settings = OptimizerSettings(sparse=sparse)
    fused, fused_optimizers = build("table_wise", settings)
    dense, dense_optimizers = build("data_parallel", settings)
    before = train(fused, fused_optimizers, range(0))
    for steps in (range(1), range(1, 6)):
        after, twin = train(fused, fused_optimizers, steps), train(dense, dense_optimizers, steps)
        for key in ("user", "item"):
            torch.testing.assert_close(after[key], twin[key], rtol=1e-5, atol=1e-6)
    assert torch.equal(after["user"][4:], before["user"][4:])  # never looked up
    assert not torch.isclose(after["user"][:4], before["user"][:4]).any()
    for key, state in fused_optimizers.table_states().items():
        for name, value in state.items():
            other = dense_optimizers.table_states()[key][name]
            torch.testing.assert_close(gather_table(value), gather_table(other), rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("one_rank")
def test_rates_reach_the_fused_optimiser_in_their_step():
    warm_up = SparseOptimizer(name="sgd", lr=0.1, schedule=Schedule("constant", warmup_steps=4))
    model, optimizers = build("table_wise", OptimizerSettings(sparse=warm_up))
    moves = []
    for step in range(6):
        before = gather_table(table_weights(model)["item"])
        item = model.module.ids(features(2))["item"].values()  # items 5 and 0
        item.sum().backward()  # a gradient of 1 in every step
        moves.append((before - gather_table(table_weights(model)["item"]))[5])
        assert optimizers.learning_rates()["sparse"] == pytest.approx(0.1 * min((step + 1) / 4, 1))
        optimizers.step(step)
    expected = torch.tensor([0.025, 0.05, 0.075, 0.1, 0.1, 0.1])
    torch.testing.assert_close(torch.stack(moves), expected[:, None].expand(6, 4), rtol=1e-5, atol=1e-7)


@pytest.mark.usefixtures("one_rank")
def test_a_resumed_run_continues_the_schedule():
    settings = OptimizerSettings(
        sparse=SparseOptimizer(name="sgd", lr=0.1, schedule=Schedule("cosine")),
        dense=DenseOptimizer(name="sgd", lr=0.1, schedule=Schedule("linear", warmup_steps=5)),
    )
    undisturbed, optimizers = build("table_wise", settings)
    train(undisturbed, optimizers, range(4))
    resumed, others = build("table_wise", settings)
    resumed.load_state_dict(undisturbed.state_dict())
    others.set_step(4)
    assert others.learning_rates() == optimizers.learning_rates()
    expected, found = train(undisturbed, optimizers, range(4, 6)), train(resumed, others, range(4, 6))
    assert torch.equal(found["user"], expected["user"])
    assert torch.equal(found["item"], expected["item"])


def test_schedules():
    linear = Schedule("linear", warmup_steps=2, final=0.2)
    assert [linear.factor(step, 6) for step in range(6)] == pytest.approx([0.5, 1.0, 0.8, 0.6, 0.4, 0.2])
    cosine = Schedule("cosine", warmup_steps=2)
    expected = [0.5, 1.0, *(0.5 * (1 + math.cos(math.pi * share)) for share in (0.25, 0.5, 0.75, 1))]
    assert [cosine.factor(step, 6) for step in range(6)] == pytest.approx(expected)
    root = Schedule("inverse_sqrt", warmup_steps=4)
    assert [root.factor(step, 99) for step in (0, 3, 15)] == pytest.approx([0.25, 1.0, 0.5])
    assert [Schedule().factor(step, 3) for step in range(3)] == [1.0] * 3
    assert Schedule("linear").factor(0, 1) == 1.0
    assert Schedule("linear").factor(7, 5) == 0.0  # a run that goes on past its planned end


@pytest.mark.usefixtures("one_rank")
def test_the_whole_state_of_the_dense_optimiser_is_there_before_the_first_step():
    model, optimizers = build("table_wise", OptimizerSettings(dense=DenseOptimizer(name="adam", weight_decay=0.1)))
    torch.testing.assert_close(dict(model.named_parameters())["tower.weight"], Tables().tower.weight, rtol=0, atol=0)
    states = optimizers.dense_states()
    assert {name: set(state) for name, state in states.items()} == {
        name: {"step", "exp_avg", "exp_avg_sq"} for name in ("tower.weight", "tower.bias")
    }
    assert all(not value.any() for state in states.values() for value in state.values())
    train(model, optimizers, range(2))
    assert states["tower.weight"]["step"] == 2  # the tensors are the live ones
    assert states["tower.weight"]["exp_avg"].any()


@pytest.mark.parametrize("name", ["adamw", "adam", "adagrad", "sgd"])
@pytest.mark.usefixtures("one_rank")
def test_dense_optimisers_are_those_of_torch(name):
    dense = DenseOptimizer(name=name, lr=0.02, weight_decay=0.1)
    model, optimizers = build("table_wise", OptimizerSettings(dense=dense, sparse=SparseOptimizer(name="sgd", lr=0.0)))
    plain = nn.Linear(8, 3)
    plain.load_state_dict(Tables().tower.state_dict())
    kinds = {
        "adamw": torch.optim.AdamW,
        "adam": torch.optim.Adam,
        "adagrad": torch.optim.Adagrad,
        "sgd": torch.optim.SGD,
    }
    extra = {"eps": 1e-8} if name == "adagrad" else {}
    reference = kinds[name](plain.parameters(), lr=0.02, weight_decay=0.1, **extra)
    weights = train(model, optimizers, range(0))
    for step in range(3):
        reference.zero_grad()
        batch = features(step).to_dict()
        bags = torch.stack([weights["user"][bag].sum(0) for bag in batch["user"].to_dense()])
        plain(torch.cat([bags, weights["item"][batch["item"].values()]], 1)).square().sum().backward()
        reference.step()
    train(model, optimizers, range(3))
    torch.testing.assert_close(dict(model.named_parameters())["tower.weight"], plain.weight, rtol=1e-5, atol=1e-6)


def test_row_wise_adagrad_by_hand():
    table = nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    table.grad = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    optimizer = RowWiseAdagrad([table], lr=0.5, eps=1e-12)
    optimizer.step()
    root = math.sqrt((9 + 16) / 2)
    torch.testing.assert_close(table.detach(), torch.tensor([[1 - 1.5 / root, 2 - 2 / root], [3.0, 4.0]]))
    torch.testing.assert_close(optimizer.state[table]["sum"], torch.tensor([12.5, 0.0]))
    decayed = nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    decayed.grad = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    RowWiseAdagrad([decayed], lr=0.5, eps=1e-12, weight_decay=0.1).step()
    root = math.sqrt((3.1**2 + 4.2**2) / 2)
    expected = torch.tensor([[1 - 0.5 * 3.1 / root, 2 - 0.5 * 4.2 / root], [3.0, 4.0]])
    torch.testing.assert_close(decayed.detach(), expected)  # a row without a gradient is not decayed


def test_a_parameter_belongs_to_the_longest_prefix():
    names = ["model.tower.weight", "model.tower.bias", "model.towers.weight", "objective.temperature"]
    parameters = {name: nn.Parameter(torch.zeros(1)) for name in names}
    groups = clip_groups(parameters, {"model": 1.0, "model.tower": 2.0})
    assert groups["model"] == [parameters["model.towers.weight"]]
    assert groups["model.tower"] == [parameters["model.tower.weight"], parameters["model.tower.bias"]]
    with pytest.raises(UserError) as error:
        clip_groups(parameters, {"model.tover": 1.0})
    assert error.value.message == "train.optimizers.clip names 'model.tover', which no dense parameter has"
    assert error.value.hint == "did you mean 'model.tower'?"


def test_clipping_scales_a_group_to_its_norm():
    first, second = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))
    first.grad, second.grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
    clip_gradients([first, second, nn.Parameter(torch.zeros(1))], max_norm=10.0)
    assert first.grad.tolist() == [3.0, 0.0]
    clip_gradients([first, second], max_norm=1.0)
    torch.testing.assert_close(torch.cat([first.grad, second.grad]), torch.tensor([0.6, 0.0, 0.8]))


@pytest.mark.usefixtures("one_rank")
def test_clipping_acts_on_the_group_in_a_step():
    plain = OptimizerSettings(dense=DenseOptimizer(name="sgd", lr=1.0), sparse=SparseOptimizer(name="sgd", lr=0.01))
    clipped = OptimizerSettings(dense=plain.dense, sparse=plain.sparse, clip={"tower": 1e-3})
    tables = []
    for settings, largest in ((plain, None), (clipped, 1e-3)):
        model, optimizers = build("table_wise", settings)
        tables.append(train(model, optimizers, range(1))["user"])
        tower = dict(model.named_parameters())
        changes = [(tower[f"tower.{name}"] - p).flatten() for name, p in Tables().tower.named_parameters()]
        change = torch.cat(changes).norm().item()
        assert change > 0.01 if largest is None else change == pytest.approx(largest, rel=1e-2)
    assert torch.equal(*tables)  # embeddings are not clipped


@pytest.mark.parametrize(
    ("optimizer", "message", "hint"),
    [
        (
            SparseOptimizer(name="lamb"),
            "train.optimizers.sparse.name is 'lamb', which fbgemm has on CUDA only",
            "on a CPU: sgd, adagrad, rowwise_adagrad",
        ),
        (
            SparseOptimizer(name="adagrad", weight_decay=0.1),
            "train.optimizers.sparse.weight_decay is 0.1, which fused adagrad ignores on cpu",
            "set it to 0 (objective.embedding_l2 works everywhere); on CUDA these have it: rowwise_adagrad, adam, "
            "partial_rowwise_adam, lamb",
        ),
    ],
)
def test_what_fbgemm_does_not_have_is_refused(optimizer, message, hint):
    with pytest.raises(UserError) as error:
        optimizer.check("cpu")
    assert (error.value.message, error.value.hint) == (message, hint)
    SparseOptimizer(name="lamb").check("cuda")


@pytest.mark.parametrize("kind", ["table_wise", "data_parallel"])
@pytest.mark.usefixtures("one_rank")
def test_an_id_outside_of_its_table_is_an_error(kind):
    model, _ = build(kind, OptimizerSettings())
    outside = KeyedJaggedTensor(["user", "item"], torch.tensor([0, 1, ROWS]), lengths=torch.tensor([1, 0, 1, 1]))
    with pytest.raises((RuntimeError, IndexError), match=r"outside of its table|idx < num_rows|nvalid index"):
        model(outside)
