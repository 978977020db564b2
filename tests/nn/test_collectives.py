from __future__ import annotations

import datetime
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from raysys.nn import collectives
from raysys.nn.collectives import gather_rows, gather_with_grad, global_max, global_sum, on_first_rank

RANKS = 3


def loss_of_rank(rank: int, own: torch.Tensor, everyone: torch.Tensor) -> torch.Tensor:
    """A loss that differs per rank and reads every rank's rows, as in-batch negatives do."""
    return (rank + 1) * torch.logsumexp(own @ everyone.T, dim=1).sum()


def rows_of_rank(rank: int) -> torch.Tensor:
    return torch.randn(2, 4, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)


def work(rank: int, folder: Path) -> None:
    """What each rank of the process group does; it leaves its results in a file."""
    limit = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=RANKS, timeout=limit)
    collectives._CHUNK_BYTES = 64  # several pieces
    own = rows_of_rank(rank).requires_grad_()
    everyone = gather_with_grad(own)
    loss_of_rank(rank, own, everyone).backward()
    value = torch.tensor([rank + 1.0, 1.0], requires_grad=True)
    total = global_sum(value)
    uneven = [torch.arange(20).reshape(10, 2), torch.empty(0, 2, dtype=torch.int64), torch.tensor([[7, 8]])][rank]
    try:
        on_first_rank(lambda: [][0])
        error = None
    except IndexError as caught:
        error = str(caught)
    result = {
        "gathered": everyone.detach(),
        "gradient": own.grad,
        "sum": total,
        "max": global_max(torch.tensor([rank, -rank])),
        "sum_requires_grad": total.requires_grad,
        "value": value.detach(),
        "rows": gather_rows(uneven),
        "empty": gather_rows(torch.empty(0, 3)),
        "first": on_first_rank(lambda: {"rank": rank}),
        "error": error,
        "place": (collectives.is_distributed(), collectives.rank(), collectives.world_size()),
        "device": str(collectives.communication_device()),
    }
    torch.save(result, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, __file__, folder], env=environment, check=True, timeout=120)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


def test_every_rank_knows_its_place(results):
    assert [result["place"] for result in results] == [(True, rank, RANKS) for rank in range(RANKS)]
    assert results[0]["device"] == "cpu"


def test_gather_with_grad_equals_one_process(results):
    rows = [rows_of_rank(rank).requires_grad_() for rank in range(RANKS)]
    everyone = torch.cat(rows)
    sum(loss_of_rank(rank, own, everyone) for rank, own in enumerate(rows)).backward()
    for own, result in zip(rows, results, strict=True):
        torch.testing.assert_close(result["gathered"], everyone.detach(), rtol=0, atol=0)
        torch.testing.assert_close(result["gradient"], own.grad, rtol=1e-12, atol=1e-12)


def test_global_max_is_that_of_each_element(results):
    assert all(result["max"].tolist() == [RANKS - 1, 0] for result in results)
    assert global_max(torch.tensor([3])).tolist() == [3]


def test_global_sum_is_the_same_everywhere_and_leaves_its_input(results):
    for rank, result in enumerate(results):
        assert result["sum"].tolist() == [6.0, 3.0]
        assert result["value"].tolist() == [rank + 1.0, 1.0]
        assert not result["sum_requires_grad"]


def test_rows_of_unequal_ranks_arrive_at_the_first_in_order(results):
    expected = torch.cat([torch.arange(20).reshape(10, 2), torch.tensor([[7, 8]])])
    assert torch.equal(results[0]["rows"], expected)
    assert results[0]["empty"].shape == (0, 3)
    assert results[1]["rows"] is None
    assert results[2]["rows"] is None


def test_the_first_rank_speaks_for_all_and_its_error_reaches_all(results):
    assert [result["first"] for result in results] == [{"rank": 0}] * RANKS
    assert [result["error"] for result in results] == ["list index out of range"] * RANKS


def test_without_a_process_group_all_are_the_identity():
    value = torch.tensor([1.0, 2.0], requires_grad=True)
    assert (collectives.is_distributed(), collectives.rank(), collectives.world_size()) == (False, 0, 1)
    assert gather_with_grad(value) is value
    assert torch.equal(gather_rows(value.detach()), value)
    assert not global_sum(value).requires_grad
    assert torch.equal(global_sum(value), value)
    assert on_first_rank(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        on_first_rank(lambda: 1 // 0)


if __name__ == "__main__":  # one process imports torch for all ranks; nothing has started a thread yet, so it may fork
    mp.start_processes(work, args=(Path(sys.argv[1]),), nprocs=RANKS, start_method="fork")
