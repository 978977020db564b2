"""The CETNet loss: labels, fused prediction and peers."""

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
from torch import nn
from torch.nn import functional as F

from raysys.errors import UserError
from raysys.models.outputs import Embedded, Output
from raysys.nn.fusion import confidence_log_weights, fuse
from raysys.objectives.collaborative import Collaborative
from raysys.objectives.supervised import Supervised
from raysys.schema import FeatureSchema

RANKS, ROWS, MODELS = 2, 12, 3
SCHEMA = FeatureSchema.from_dict(
    {"labels": [{"name": "click"}, {"name": "dwell", "kind": "regression", "required": False}]}
)
KEYS = {"fused_share": 0.3, "peer_weight": 0.7, "ramp": 0, "task_weights": {"dwell": 2.0}}


class Tiny(nn.Module):
    """Linear members on the dense columns."""

    def __init__(self, models: int = MODELS) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(models, 4, 2, generator=torch.Generator().manual_seed(1)))

    def embed(self, batch):
        return Embedded(batch.dense[:, :0, None], (), {}, batch.dense)

    def interact(self, embedded):
        return embedded.dense

    def predict(self, shared):
        logits = shared @ self.weight  # [M, B, T]
        members = {f"m{i}": Output(logits=z, shared=shared, hidden=shared) for i, z in enumerate(logits.unbind())}
        z = logits.movedim(0, 2)
        click = fuse(z[:, 0], confidence_log_weights(z[:, 0]).detach())
        return Output(torch.stack([click, z[:, 1].mean(1)], 1), shared, shared, members=members)


def joint_batch() -> SimpleNamespace:
    random = torch.Generator().manual_seed(2)
    mask = torch.ones(ROWS, 2, dtype=torch.bool)
    mask[::3, 1] = False
    labels = torch.stack(
        [torch.randint(0, 2, (ROWS,), generator=random).float(), torch.randn(ROWS, generator=random)], 1
    )
    return SimpleNamespace(
        dense=torch.randn(ROWS, 4, generator=random),
        labels=labels * mask,
        label_mask=mask,
        weight=(torch.rand(ROWS, 2, generator=random) + 0.5) * mask,
    )


def batch_of_rank(rank: int) -> SimpleNamespace:
    """Seven rows for the first rank, five and two of padding for the second."""
    rows = [slice(0, 7), slice(7, ROWS)][rank]
    part = {name: column[rows] for name, column in vars(joint_batch()).items()}
    return SimpleNamespace(
        **{
            name: torch.cat([column, column.new_zeros(7 - len(column), *column.shape[1:])])
            for name, column in part.items()
        }
    )


def run(batch, objective=None, models=MODELS):
    model = Tiny(models)
    objective = objective or Collaborative(SCHEMA, **KEYS)
    loss, output, parts = objective(model, batch, model.embed(batch))
    loss.backward()
    return loss.detach(), output, parts, model.weight.grad


def test_the_loss_by_hand():
    batch = joint_batch()
    loss, output, parts, _ = run(batch)
    z = torch.stack([member.logits for member in output.members.values()]).double()  # [M, B, T]
    y, w = batch.labels.double(), batch.weight.double()

    def mean(values, task):
        return float((w[:, task] * values).sum() / w[:, task].sum())

    def losses(logits, task):
        cross_entropy = F.binary_cross_entropy_with_logits(logits, y[:, task], reduction="none")
        return cross_entropy if task == 0 else (logits - y[:, task]).square()

    pairs = [(i, j) for i in range(MODELS) for j in range(i)]
    total = 0.0
    for task, name in enumerate(SCHEMA.tasks):
        fused = mean(losses(output.logits.double()[:, task], task), task)
        members = [mean(losses(z[i, :, task], task), task) for i in range(MODELS)]
        apart = [z[i, :, task] - z[j, :, task] for i, j in pairs]
        means = z[:, :, 0].sigmoid() if task == 0 else z[:, :, 1]
        peers = [0.5 * (means[i] - means[j]) * d for (i, j), d in zip(pairs, apart, strict=True)]
        peer = sum(mean(value, task) for value in peers) / len(pairs)
        errors = means - y[:, task]
        correlations = torch.cov(errors, aweights=w[:, task], correction=0)
        scale = correlations.diagonal().sqrt()
        correlations = correlations / scale[:, None] / scale
        expected = {
            name: 0.3 * fused + 0.7 * sum(members) / MODELS + 0.7 * peer,
            f"{name}.fused": fused,
            f"{name}.peers": peer,
            f"{name}.distance": sum(mean(d.abs(), task) for d in apart) / len(pairs),
            f"{name}.error_correlation": float(sum(correlations[i, j] for i, j in pairs) / len(pairs)),
        }
        for i in range(MODELS):
            expected |= {f"{name}.m{i}": members[i], f"{name}.m{i}.bias": mean(errors[i], task)}
        found = {key: float(value) for key, value in parts.items() if key.split(".")[0] == name}
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)
        total += expected[name] * (1.0, 2.0)[task]
    assert float(loss) == pytest.approx(total, rel=1e-5)
    assert not any(part.requires_grad for part in parts.values())


@pytest.mark.parametrize(
    ("fused_share", "peer_weight", "kl_mode"), [(0.5, 0.1, "symmetric"), (1, 5, "forward_detached")]
)
def test_with_one_member_it_is_the_supervised_loss(fused_share, peer_weight, kl_mode):
    batch = joint_batch()
    objective = Collaborative(SCHEMA, fused_share=fused_share, peer_weight=peer_weight, ramp=0, kl_mode=kl_mode)
    loss, _, parts, gradient = run(batch, objective, models=1)
    expected, _, supervised, expected_gradient = run(batch, Supervised(SCHEMA), models=1)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, expected_gradient)
    for name, part in supervised.items():
        torch.testing.assert_close(parts[name], part)
        assert parts[f"{name}.peers"] == parts[f"{name}.error_correlation"] == 0


def test_detached_peers_pull_with_the_difference_of_probabilities():
    def gradient(kl_mode):
        batch = joint_batch()
        z = torch.randn(2, ROWS, 2, generator=torch.Generator().manual_seed(3), requires_grad=True)
        objective = Collaborative(SCHEMA, kl_mode=kl_mode)
        means = torch.where(objective.binary, z.sigmoid(), z)
        rows = objective._peer_rows(means, z)
        assert rows.shape == batch.labels.shape
        return z.detach()[:, :, 0], torch.autograd.grad(rows.sum(), z)[0][:, :, 0]

    (first, second), (found, other) = gradient("forward_detached")
    torch.testing.assert_close(found, first.sigmoid() - second.sigmoid())
    torch.testing.assert_close(other, -found)
    p, symmetric = first.sigmoid(), gradient("symmetric")[1][0]
    torch.testing.assert_close(symmetric, 0.5 * (p - second.sigmoid() + p * (1 - p) * (first - second)))


def test_the_peer_weight_rises_with_the_step():
    batch, objective = joint_batch(), Collaborative(SCHEMA, peer_weight=0.8, ramp=0.1)
    without = run(batch, Collaborative(SCHEMA, peer_weight=0, ramp=0))[0]
    whole = run(batch, Collaborative(SCHEMA, peer_weight=0.8, ramp=0))[0]
    torch.testing.assert_close(run(batch, objective)[0], without)
    for step, share in ((0, 0.0), (5, 0.25), (20, 1.0), (21, 1.0), (200, 1.0), (10, 0.5)):
        objective.after_step(step, 200)
        torch.testing.assert_close(run(batch, objective)[0], torch.lerp(without, whole, share))


def test_a_batch_without_labels_of_a_task_and_rows_without_weight():
    batch = joint_batch()
    batch.label_mask[:, 1] = False
    batch.weight[:, 1] = 0
    loss, _, parts, gradient = run(batch)
    assert loss.isfinite()
    assert all(value == 0 for name, value in parts.items() if name.startswith("dwell"))
    assert (gradient[:, :, 0] != 0).all()
    assert (gradient[:, :, 1] == 0).all()


def test_extreme_logits_are_finite():
    batch = joint_batch()
    batch.dense *= 100
    loss, _, parts, gradient = run(batch)
    assert loss.isfinite()
    assert gradient.isfinite().all()
    assert all(part.isfinite() for part in parts.values())


def work(rank: int, folder: Path) -> None:
    limit = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=RANKS, timeout=limit)
    loss, _, parts, gradient = run(batch_of_rank(rank))
    for value in (loss, *parts.values(), gradient):
        dist.all_reduce(value)
        value /= RANKS
    torch.save({"loss": loss, "parts": parts, "gradient": gradient}, folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_average_to_the_joint_batch(tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, __file__, tmp_path], env=environment, check=True, timeout=120)
    loss, _, parts, gradient = run(joint_batch())
    for rank in range(RANKS):
        result = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(result, {"loss": loss, "parts": parts, "gradient": gradient}, rtol=1e-5, atol=1e-6)


class NoMembers(Tiny):
    def predict(self, shared):
        return Output(logits=shared @ self.weight[0], shared=shared, hidden=shared)


def test_a_model_without_members_is_an_error():
    batch, model = joint_batch(), NoMembers()
    with pytest.raises(UserError, match=r"the model has none\n  hint: take model=cetnet, or objective=supervised"):
        Collaborative(SCHEMA)(model, batch, model.embed(batch))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fused_share": 1.5}, "objective.fused_share is 1.5"),
        ({"ramp": -1}, "objective.ramp is -1"),
        ({"peer_weight": -0.1}, "objective.peer_weight is -0.1"),
        ({"kl_mode": "symetric"}, "unknown objective.kl_mode 'symetric'"),
        ({"task_weights": {"clicks": 1}}, "objective.task_weights: no task 'clicks' in schema"),
    ],
)
def test_wrong_settings_are_named(options, message):
    with pytest.raises(UserError) as caught:
        Collaborative(SCHEMA, **options)
    assert caught.value.message == message


if __name__ == "__main__":
    mp.start_processes(work, args=(Path(sys.argv[1]),), nprocs=RANKS, start_method="fork")
