"""Plans: the same for the same input, true to the wishes, and refused with the key to change."""

import pickle

import pytest
import torch
from torch import nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from raysys.errors import UserError
from raysys.train.optimizers import OptimizerSettings
from raysys.train.plan import ShardingSettings, TablePlan, format_plan, plan_table, plan_tables
from raysys.train.plan_checks import TableSharding
from raysys.train.sparse_optimizers import SparseOptimizer


class Tables(nn.Module):
    """Bags `user` (1000 x 16) and `tag` (7 x 6), ids `item` (300 x 8), and a dense part of 400 bytes."""

    def __init__(self) -> None:
        super().__init__()
        bags = [("user", 1000, 16, ["user", "friends"]), ("tag", 7, 6, ["tag"])]
        self.bags = EmbeddingBagCollection(
            [EmbeddingBagConfig(name=n, num_embeddings=r, embedding_dim=d, feature_names=f) for n, r, d, f in bags],
            device=torch.device("meta"),
        )
        ids = EmbeddingConfig(name="item", num_embeddings=300, embedding_dim=8, feature_names=["item"])
        self.ids = EmbeddingCollection([ids], device=torch.device("meta"))
        self.dense = nn.Linear(99, 1)


def make_plan(
    world_size: int = 2, device: str = "cpu", name: str = "adagrad", batch_size: int = 64, **settings
) -> TablePlan:
    tables = {table: TableSharding(**wish) for table, wish in settings.pop("tables", {}).items()}
    sharding = ShardingSettings(**{"ddr_bytes": 10**9, "hbm_bytes": 10**9} | settings, tables=tables)
    optimizers = OptimizerSettings(sparse=SparseOptimizer(name=name))
    return plan_tables(Tables(), world_size, device, batch_size, sharding, optimizers)


def refused(**arguments) -> tuple[str, str]:
    with pytest.raises(UserError) as error:
        make_plan(**arguments)
    return error.value.message, error.value.hint


def test_wishes_are_met_and_bytes_counted_with_the_optimiser():
    tables = {"user": {"sharding_types": ("row_wise",)}, "tag": {"sharding_types": ("data_parallel",)}}
    plan = make_plan(world_size=3, tables=tables | {"item": {"sharding_types": ("column_wise",)}})
    found = {table["table"]: table for table in plan_table(plan)}
    assert found["user"] == {
        "table": "user",
        "rows": 1000,
        "width": 16,
        "sharding": "row_wise",
        "kernel": "fused",
        "ranks": [0, 1, 2],
        "bytes_per_rank": [2 * 4 * 16 * 334, 2 * 4 * 16 * 334, 2 * 4 * 16 * 332],
    }
    assert found["tag"]["ranks"] == [0, 1, 2]
    assert found["tag"]["bytes_per_rank"] == [2 * 4 * 7 * 6] * 3
    assert len(found["item"]["ranks"]) == 2  # 8 columns over 3 workers: two parts of 4
    assert found["item"]["bytes_per_rank"] == [2 * 4 * 300 * 4] * 2
    total = 2 * 4 * (1000 * 16 + 3 * 7 * 6 + 300 * 8)
    assert sum(plan.bytes_per_rank()) == total


def test_state_bytes_follow_the_optimiser():
    sizes = {name: sum(make_plan(1, name=name).bytes_per_rank()) for name in ("sgd", "adagrad", "rowwise_adagrad")}
    weights = 4 * (1000 * 16 + 7 * 6 + 300 * 8)
    assert sizes == {"sgd": weights, "adagrad": 2 * weights, "rowwise_adagrad": weights + 4 * (1000 + 7 + 300)}


def planned_text() -> str:
    return format_plan(make_plan())


def test_a_plan_is_the_same_in_another_process_and_after_a_pickle(gloo):
    plan = make_plan()
    assert gloo.run(1, planned_text) == [format_plan(plan)]  # another process has other string hashes
    assert format_plan(pickle.loads(pickle.dumps(plan))) == format_plan(plan)


def test_the_text_lists_the_largest_table_first():
    wishes = {table: {"sharding_types": ("data_parallel",)} for table in ("user", "tag", "item")}
    lines = format_plan(make_plan(tables=wishes)).splitlines()
    assert lines[0].split() == ["table", "rows", "width", "sharding", "kernel", "workers", "MB", "per", "worker"]
    assert lines[1].split() == ["user", "1,000", "16", "data_parallel", "dense", "0,", "1", "0.13"]
    assert [line.split()[0] for line in lines[1:4]] == ["user", "item", "tag"]
    assert lines[4] == "tables and optimiser state: worker 0: 0.15 MB, worker 1: 0.15 MB"


def test_defaults_leave_out_what_a_table_cannot_become():
    plan = make_plan(name="rowwise_adagrad", sharding_types=("column_wise", "table_wise"))
    assert {table.sharding for table in plan.tables} == {"table_wise"}
    plan = make_plan(sharding_types=("table_row_wise", "data_parallel"))
    assert {table.table: table.sharding for table in plan.tables}["item"] == "data_parallel"  # looked up per id
    message, hint = refused(name="rowwise_adagrad", sharding_types=("column_wise",))
    assert message.startswith("train.sharding.sharding_types leaves nothing for table 'user': rowwise_adagrad updates")
    assert hint == "take row_wise or table_wise, or train.optimizers.sparse.name=adagrad"


def test_on_a_cpu_tables_stay_whole_while_they_fit():
    assert {table.sharding for table in make_plan(3).tables} <= {"table_wise", "data_parallel"}
    tight = {table.table: table.sharding for table in make_plan(3, ddr_bytes=120_000).tables}
    assert tight["user"] in ("row_wise", "column_wise")  # 137,216 bytes as a whole


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_one_worker_has_no_exchange_that_replicas_would_save(device):
    several, one = (make_plan(workers, device=device, batch_size=4096) for workers in (2, 1))
    assert "data_parallel" in {table.sharding for table in several.tables}
    assert {table.sharding for table in one.tables} == {"table_wise"}


def test_a_model_without_tables_has_an_empty_plan():
    plan = plan_tables(nn.Linear(2, 2), 2, "cpu", 8, ShardingSettings(), OptimizerSettings())
    assert (plan.plan, plan_table(plan), plan.bytes_per_rank()) == ({}, [], [0, 0])


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (
            {"tables": {"usr": {}}},
            "train.sharding.tables names 'usr', which the model does not have",
            "did you mean 'user'?",
        ),
        (
            {"tables": {"user": {"sharding_types": ("rowise",)}}},
            "train.sharding.tables.user.sharding_types has 'rowise', which is no sharding type",
            "did you mean 'row_wise'?",
        ),
        (
            {"sharding_types": ("replicated",)},
            "train.sharding.sharding_types has 'replicated', which is no sharding type",
            "known: column_wise, data_parallel, grid_shard, row_wise, table_column_wise, table_row_wise, table_wise",
        ),
        (
            {"tables": {"item": {"sharding_types": ("table_row_wise",)}}},
            "train.sharding.tables.item.sharding_types has 'table_row_wise': TorchRec does not have it for "
            "EmbeddingCollection on cpu",
            "take one of: data_parallel, table_wise, column_wise, row_wise",
        ),
        (
            {"tables": {"user": {"sharding_types": ("table_wise", "column_wise")}}, "name": "rowwise_adagrad"},
            "train.sharding.tables.user.sharding_types has 'column_wise': rowwise_adagrad updates whole rows, parts of a "
            "row would each go their own way",
            "take row_wise or table_wise, or train.optimizers.sparse.name=adagrad",
        ),
        (
            {"tables": {"tag": {"sharding_types": ("column_wise",)}}},
            "train.sharding.tables.tag.sharding_types has 'column_wise': its width 6 cannot be cut into parts of 4 columns",
            "take row_wise or table_wise, or a width that is a multiple of 4",
        ),
        (
            {"tables": {"user": {"sharding_types": ("column_wise",), "min_partition": 6}}},
            "train.sharding.tables.user.sharding_types has 'column_wise': its width 16 cannot be cut into parts of 6 columns",
            "set train.sharding.tables.user.min_partition to one of: 4, 8, 16",
        ),
        (
            {"tables": {"tag": {"sharding_types": ("row_wise",)}}, "world_size": 5},
            "train.sharding.tables.tag.sharding_types has 'row_wise': its 7 rows in parts of 2 leave one of 5 workers "
            "without any",
            "take table_wise or data_parallel for so small a table",
        ),
        (
            {"tables": {"user": {"compute_kernels": ("fused_uvm_caching",)}}},
            "train.sharding.tables.user.compute_kernels has 'fused_uvm_caching', which TorchRec does not have on cpu",
            "take one of: dense, fused",
        ),
        (
            {"tables": {"user": {"compute_kernels": ("fussed",)}}},
            "train.sharding.tables.user.compute_kernels has 'fussed'",
            "did you mean 'fused'?",
        ),
        (
            {"tables": {"user": {"pooling_factors": (1.0,)}}},
            "train.sharding.tables.user.pooling_factors has 1 values, the table has 2 features",
            "one for each of: user, friends",
        ),
        (
            {"name": "adam"},
            "train.optimizers.sparse.name is 'adam', which fbgemm has on CUDA only",
            "on a CPU: sgd, adagrad, rowwise_adagrad",
        ),
        (
            {"name": "adam", "device": "cuda", "tables": {"tag": {"sharding_types": ("data_parallel",)}}},
            "train.sharding.tables.tag.sharding_types has 'data_parallel': fused adam changes only the rows that are looked "
            "up, a dense one all of them",
            "take another sharding type, or train.optimizers.sparse.name adagrad, rowwise_adagrad or sgd",
        ),
    ],
)
def test_what_cannot_be_is_named_with_its_key(arguments, message, hint):
    assert refused(**arguments) == (message, hint)


def test_a_table_that_does_not_fit_is_named_with_the_missing_bytes():
    weights_and_state = 2 * 4 * 1000 * 16
    batch = 2 * 64 * 2 * (8 + 16 * 4)  # ids and embeddings of 2 features and 64 rows from both workers
    needed, free = weights_and_state + batch, 50_000 - 1600  # less four times the dense part
    message, hint = refused(ddr_bytes=50_000, reserve=0.0, tables={"user": {"sharding_types": ("table_wise",)}})
    assert message == (
        f"table 'user' needs {needed:,} bytes of a worker as table_wise, a worker has {free:,} left for tables "
        f"(train.sharding.ddr_bytes less train.sharding.reserve and the dense part): {needed - free:,} bytes are missing"
    )
    assert hint.startswith("set train.sharding.ddr_bytes to 1")
    assert hint.endswith(", or allow row_wise in train.sharding.tables.user.sharding_types, or take more workers")


@pytest.mark.parametrize("wish", [{}, {"user": {"sharding_types": ("table_wise",)}}])
def test_the_proposed_budget_is_enough_and_not_much_more(wish):
    _, hint = refused(ddr_bytes=50_000, tables=wish)
    enough = int(hint.removeprefix("set train.sharding.ddr_bytes to ").partition(", or")[0].replace(",", ""))
    make_plan(ddr_bytes=enough, tables=wish)
    refused(ddr_bytes=int(0.98 * enough), tables=wish)


def test_tables_that_do_not_fit_together_are_counted():
    message, hint = refused(ddr_bytes=80_000, reserve=0.0)
    assert message.startswith("the tables do not fit together, a worker has 78,400 left for tables ")
    assert message.endswith(" bytes are missing; the largest is 'user' with 74,240 bytes of a worker")
    assert hint.startswith("set train.sharding.ddr_bytes to ")


def test_a_gpu_that_is_not_there_cannot_be_asked_for_its_memory(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert refused(device="cuda", hbm_bytes=None) == (
        "train.sharding.hbm_bytes is not set and this machine has no GPU to ask",
        "set it to the bytes of a worker's GPU",
    )
