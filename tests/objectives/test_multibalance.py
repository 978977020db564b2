"""Balancing on models: which gradient reaches trunk, tables and heads, and what the rules remember."""

from __future__ import annotations

import functools
import inspect

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from raysys.config import compose, locate
from raysys.data.batch import Batch
from raysys.errors import UserError
from raysys.models.multitask.mmoe import MMoE
from raysys.models.ranking.shared_bottom import SharedBottom
from raysys.objectives.multibalance import MultiBalance
from raysys.objectives.supervised import Supervised
from raysys.objectives.weighting import MGDA, GradNorm, PCGrad, Uncertainty
from raysys.schema import FeatureSchema

ROWS = 24
HEADS = {"towers": None, "mmoe": functools.partial(MMoE, experts=3, widths=[[8]])}
RULES = ("minnorm", "moco", "normeq", "metabalance", "sum")


def schema_of(*labels) -> FeatureSchema:
    return FeatureSchema.from_dict(
        {
            "tables": {"item": {"num_embeddings": 20, "embedding_dim": 8}},
            "dense": [{"name": "age"}],
            "sparse": [{"name": "item", "table": "item"}],
            "labels": [{"name": name, "required": False} for name in labels],
        }
    )


THREE, ONE = schema_of("click", "like", "share"), schema_of("click")


def batch_of(schema, seed=0, without=()):
    generator, tasks = torch.Generator().manual_seed(seed), len(schema.tasks)
    rows = torch.arange(ROWS)
    sparse = KeyedJaggedTensor(["item"], torch.randint(0, 20, (ROWS,), generator=generator), lengths=rows * 0 + 1)
    labels = torch.randint(0, 2, (ROWS, tasks), generator=generator).float()
    mask = torch.ones(ROWS, tasks, dtype=torch.bool)
    mask[:, list(without)] = False
    dense = torch.randn(ROWS, 1, generator=generator)
    return Batch(dense, sparse, labels * mask, mask, mask.float(), rows, rows, rows)


def model_of(schema, head="towers"):
    return SharedBottom(schema, embedding_dim=8, bottom=[8], deep=[12], tower=[6], head=HEADS[head], seed=1)


def rules_of(schema, **keys):
    """Every objective that balances, without warm-up."""
    balanced = [MultiBalance(schema, rule=rule, warmup_steps=0, **keys) for rule in RULES]
    return [*balanced, MGDA(schema, **keys), PCGrad(schema, **keys), GradNorm(schema, warmup_steps=0, **keys)]


def gradients(objective, model, batch):
    """Loss, parts and the gradient of every parameter."""
    model.zero_grad()
    loss, output, parts = objective(model, batch, model.embed(batch))
    assert output.shared.dim() == 2
    loss.backward()
    return loss.detach(), parts, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def trunk(found):
    return torch.cat([value.flatten() for name, value in found.items() if not name.startswith("towers")])


def heads(found):
    return torch.cat([value.flatten() for name, value in found.items() if name.startswith("towers")])


def at_shared(model, batch, objective):
    """The g_i [T, B, H] and J: what a direction at the shared representation becomes in the trunk."""
    shared = model.interact(model.embed(batch))
    per_task = objective.task_losses(model.predict(shared).logits, batch).per_task
    found = torch.stack([torch.autograd.grad(loss, shared, retain_graph=True)[0] for loss in per_task])

    def through_trunk(direction):
        parameters = [p for name, p in model.named_parameters() if not name.startswith("towers")]
        pulled = torch.autograd.grad(shared, parameters, direction, retain_graph=True)
        return torch.cat([value.flatten() for value in pulled])

    return found, through_trunk


@pytest.mark.parametrize("head", HEADS)
def test_the_trunk_gets_the_weighted_sum_and_heads_their_own_gradients(head):
    batch, model = batch_of(THREE), model_of(THREE, head)
    loss, parts, plain = gradients(Supervised(THREE), model, batch)
    for objective in rules_of(THREE):
        found, through_trunk = at_shared(model, batch, objective)
        balanced_loss, balanced_parts, balanced = gradients(objective, model, batch)
        torch.testing.assert_close(balanced_loss, loss)
        torch.testing.assert_close({task: balanced_parts[task] for task in THREE.tasks}, parts)
        torch.testing.assert_close(heads(balanced), heads(plain))
        direction = torch.einsum("t,tbh->bh", objective.weights.float(), found)
        torch.testing.assert_close(trunk(balanced), through_trunk(direction), rtol=1e-4, atol=1e-7)
        if getattr(objective, "rule", "") != "sum":
            assert float(balanced_parts["direction_norm"]) == pytest.approx(float(direction.norm()), rel=1e-5)
            assert float(balanced_parts["weight_like"]) == float(objective.weights[1])


def test_both_ways_to_the_gradients_agree():
    class Opaque(SharedBottom):
        def predict(self, shared):  # the same towers, but nothing tells that
            return super().predict(shared)

    batch, fan_out, one_by_one = batch_of(THREE), model_of(THREE), model_of(THREE)
    one_by_one.__class__ = Opaque
    for first, second in zip(rules_of(THREE), rules_of(THREE), strict=True):
        _, _, expected = gradients(first, fan_out, batch)
        _, _, found = gradients(second, one_by_one, batch)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("head", HEADS)
def test_the_sum_is_the_unbalanced_gradient(head):
    batch, model = batch_of(THREE), model_of(THREE, head)
    _, _, expected = gradients(Supervised(THREE), model, batch)
    for objective in (MultiBalance(THREE, rule="sum"), MultiBalance(THREE), GradNorm(THREE)):  # the others warm up
        _, _, found = gradients(objective, model, batch)
        torch.testing.assert_close(trunk(found), trunk(expected), rtol=1e-6, atol=1e-7)
    _, _, found = gradients(MultiBalance(THREE, rule="metabalance", relax=0.0, warmup_steps=0), model, batch)
    torch.testing.assert_close(trunk(found), trunk(expected), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("head", HEADS)
def test_one_task_is_ordinary_training(head):
    batch, model = batch_of(ONE), model_of(ONE, head)
    _, _, expected = gradients(Supervised(ONE), model, batch)
    for objective in rules_of(ONE):
        for _ in range(3):
            _, _, found = gradients(objective, model, batch)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_of_identical_tasks_every_rule_makes_the_sum():
    batch, model = batch_of(THREE), model_of(THREE)
    batch.labels[:] = batch.labels[:, :1]
    with torch.no_grad():
        for parameter in model.towers.parameters():
            parameter.copy_(parameter[:1].expand_as(parameter))
    _, _, expected = gradients(Supervised(THREE), model, batch)
    for objective in rules_of(THREE):
        if isinstance(objective, MGDA):
            continue  # a convex combination, by definition
        _, _, found = gradients(objective, model, batch)
        torch.testing.assert_close(trunk(found), trunk(expected), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rule", ["minnorm", "moco", "normeq"])
def test_opposite_tasks_stop_the_trunk_and_not_the_heads(rule):
    labels = [{"name": name, "kind": "regression"} for name in ("up", "down")]
    schema = FeatureSchema.from_dict(THREE.to_dict() | {"labels": labels})
    batch, model = batch_of(schema), model_of(schema)
    with torch.no_grad():
        for parameter in model.towers.parameters():
            parameter.copy_(parameter[:1].expand_as(parameter))
        batch.labels.copy_(model(batch).logits + torch.tensor([1.0, -1.0]))
    objective = MultiBalance(schema, rule=rule, warmup_steps=0)
    _, _, found = gradients(objective, model, batch)
    _, _, plain = gradients(Supervised(schema, task_weights={"down": 0}), model, batch)
    assert objective.shares.tolist() == pytest.approx([0.5, 0.5], abs=1e-6)
    assert trunk(found).norm() < 1e-5 * trunk(plain).norm()
    assert heads(found).norm() > heads(plain).norm()


@pytest.mark.parametrize("rule", ["minnorm", "moco", "normeq"])
def test_shares_are_on_the_simplex_over_the_active_tasks(rule):
    model, objective = model_of(THREE), MultiBalance(THREE, rule=rule, warmup_steps=0)
    for step, without in enumerate([(), (1,), (), (0, 2), (0, 1, 2), ()]):
        batch = batch_of(THREE, step, without)
        before = objective.magnitudes()
        gradients(objective, model, batch)
        active = torch.tensor([task not in without for task in range(3)])
        shares = objective._adjusted_shares(active)
        assert float(shares.min()) >= 0
        assert float(shares.sum()) == pytest.approx(1.0 if active.any() else 0.0, abs=1e-6)
        assert shares[~active].abs().sum() == 0
        assert torch.equal(objective.magnitudes()[~active], before[~active])
    assert objective.seen.tolist() == [4, 4, 4]


@pytest.mark.parametrize("objective", rules_of(THREE), ids=lambda objective: type(objective).__name__)
def test_tasks_without_labels_neither_stop_the_trunk_nor_break_anything(objective):
    model = model_of(THREE)
    for step, without in enumerate([(1,), (0, 1, 2), (0,)]):
        _, parts, found = gradients(objective, model, batch_of(THREE, step, without))
        assert all(value.isfinite() for value in parts.values())
        assert (trunk(found).abs().max() > 0) == (len(without) < 3)
    assert all(buffer.isfinite().all() for buffer in objective.buffers())


def test_a_factor_of_a_loss_changes_neither_shares_nor_direction():
    model, batches = model_of(THREE), [batch_of(THREE, seed) for seed in range(40)]
    for beta, steps in ((0.0, 2), (0.9, 40)):
        one, scaled = (
            MultiBalance(THREE, beta=beta, warmup_steps=0, task_weights=weights) for weights in ({}, {"like": 50.0})
        )
        for batch in batches[:steps]:
            _, _, expected = gradients(one, model, batch)
            _, _, found = gradients(scaled, model, batch)
        torch.testing.assert_close(scaled.shares, one.shares, rtol=0, atol=1e-5)
        cosine = torch.nn.functional.cosine_similarity(trunk(found), trunk(expected), dim=0)
        assert float(cosine) == pytest.approx(1, abs=1e-6)


def test_magnitudes_are_bias_corrected_moving_averages():
    model, objective = model_of(THREE), MultiBalance(THREE, beta=0.9)
    norms = []
    for seed in range(3):
        found, _ = at_shared(model, batch_of(THREE, seed), objective)
        norms.append(found.flatten(1).norm(dim=1).double())
        gradients(objective, model, batch_of(THREE, seed))
    weights = torch.tensor([0.81, 0.9, 1.0], dtype=torch.float64)
    expected = (torch.stack(norms) * weights[:, None]).sum(0) / weights.sum()
    torch.testing.assert_close(objective.magnitudes(), expected, rtol=1e-5, atol=0)


def test_norms_of_large_batches_are_exact():
    """To rounding in float32 (6e-8): as one sum over a million numbers they would be off by some 1e-5."""
    objective, found = MultiBalance(THREE), torch.randn(3, 4096, 256, generator=torch.Generator().manual_seed(0))
    objective.direction(found, torch.ones(3))
    expected = found.double().flatten(1).norm(dim=1)
    torch.testing.assert_close(objective.magnitudes(), expected, rtol=1e-7, atol=0)


def test_normeq_and_metabalance_are_their_formulas():
    batch, model = batch_of(THREE), model_of(THREE)
    normeq = MultiBalance(THREE, rule="normeq", warmup_steps=0)
    meta = MultiBalance(THREE, rule="metabalance", warmup_steps=0, target="like", relax=0.7)
    for objective in (normeq, meta):
        gradients(objective, model, batch)
    norms = normeq.magnitudes()
    torch.testing.assert_close(normeq.weights, norms.mean() / norms, rtol=1e-5, atol=0)
    torch.testing.assert_close(meta.weights, 0.7 * norms[1] / norms + 0.3, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("normalize", "shares"), [("none", [16, 4, 1]), ("l2", [1, 1, 1]), ("loss", [1, 1, 1]), ("loss+", [1, 4, 16])]
)
def test_mgda_divides_gradients_where_it_chooses(normalize, shares):
    """Norms and losses are (1, 2, 4): of gradients at right angles a share is one over the square of what is left."""
    gram = torch.diag(torch.tensor([1.0, 4.0, 16.0], dtype=torch.float64))
    found = MGDA(THREE, normalize=normalize).weigh(gram, torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64))
    assert found.tolist() == pytest.approx([share / sum(shares) for share in shares], abs=1e-5)  # ROUNDING is 1e-6


def test_floor_and_priorities():
    gram = torch.diag(torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64))
    gram[0, 1] = gram[1, 0] = -0.9
    plain, raised, preferred = (
        MultiBalance(THREE, beta=0.0, warmup_steps=0, **keys)
        for keys in ({}, {"floor": 0.2}, {"priorities": {"click": 2.0}})
    )
    for objective in (plain, raised, preferred):
        objective.weigh(gram, torch.ones(3))
    assert float(plain.shares[2]) < 0.2
    every = torch.ones(3, dtype=torch.bool)
    raised_shares = raised._adjusted_shares(every)
    assert float(raised_shares[2]) == pytest.approx(0.2 / float(raised.shares[:2].sum() + 0.2))
    ratio = preferred._adjusted_shares(every) / plain._adjusted_shares(every)
    assert float(ratio[0] / ratio[1]) == pytest.approx(2)
    assert float(ratio[1]) == pytest.approx(float(ratio[2]))


def test_a_gradient_that_is_not_finite_changes_no_state_and_takes_the_plain_sum():
    objective = MultiBalance(THREE, warmup_steps=0)
    objective.direction(torch.randn(3, 4, 5), torch.ones(3))
    before = {name: value.clone() for name, value in objective.named_buffers()}
    broken = torch.randn(3, 4, 5)
    broken[1, 0, 0] = torch.inf
    objective.direction(broken, torch.ones(3))
    for name in ("magnitude", "seen"):
        assert torch.equal(getattr(objective, name), before[name]), name
    assert objective.weights.tolist() == [1, 1, 1]


def test_gradnorm_takes_the_initial_losses_after_the_warm_up():
    objective = GradNorm(ONE, warmup_steps=2)
    gram = torch.ones(1, 1, dtype=torch.float64)
    for loss in (5.0, 4.0, 3.0, 2.0):
        assert objective.weigh(gram, torch.tensor([loss], dtype=torch.float64)).tolist() == [1]
    assert objective.initial_losses.tolist() == [3]


def test_uncertainty_converges_to_the_logarithm_of_the_loss():
    labels = [{"name": "click"}, {"name": "dwell", "kind": "regression"}, {"name": "none", "required": False}]
    schema = FeatureSchema.from_dict(THREE.to_dict() | {"labels": labels})
    objective, batch, model = Uncertainty(schema), batch_of(schema, without=[2]), model_of(schema)
    output = model(batch)
    output.logits = output.logits.detach()
    losses = objective.task_losses(output.logits, batch)
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.5)
    for _ in range(300):
        optimizer.zero_grad()
        objective.weighted(losses).backward()
        optimizer.step()
    click, dwell, _ = losses.per_task
    expected = torch.stack([(2 * click).log(), dwell.log(), torch.tensor(0.0)])
    torch.testing.assert_close(objective.log_variance.detach(), expected, rtol=0, atol=1e-4)
    weights = (objective.halves * torch.exp(-objective.log_variance)).detach()[:2]
    torch.testing.assert_close(weights, 1 / (2 * losses.per_task[:2]), rtol=1e-3, atol=0)


def test_uncertainty_begins_as_ordinary_training():
    batch, model = batch_of(ONE), model_of(ONE)
    _, parts, expected = gradients(Supervised(ONE), model, batch)
    _, found_parts, found = gradients(Uncertainty(ONE), model, batch)
    torch.testing.assert_close(found, expected)
    assert found_parts == parts


@pytest.mark.parametrize("head", HEADS)
def test_the_trunk_is_gone_through_once(head):
    batch, model, calls = batch_of(THREE), model_of(THREE, head), []
    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda gradient, name=name: calls.append(name))
    gradients(MultiBalance(THREE, warmup_steps=0), model, batch)
    assert sorted(calls) == sorted(name for name, _ in model.named_parameters())


def test_the_fan_out_costs_the_gram_matrix_and_one_sum_more():
    batch, model, counts = batch_of(THREE), model_of(THREE), []
    for objective in (MultiBalance(THREE, rule="sum"), MultiBalance(THREE, warmup_steps=0)):
        with FlopCounterMode(display=False) as counter:
            gradients(objective, model, batch)
        counts.append(counter.get_total_flops())
    size, tasks = ROWS * 12, 3
    assert counts[1] - counts[0] <= 2 * tasks**2 * size + 2 * tasks * size + 1000


@pytest.mark.parametrize("head", HEADS)
def test_bfloat16_autocast_is_close_and_finite(head):
    batch, model = batch_of(THREE), model_of(THREE, head)
    exact, rounded = MultiBalance(THREE, warmup_steps=0), MultiBalance(THREE, warmup_steps=0)
    _, _, expected = gradients(exact, model, batch)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss, output, _ = rounded(model, batch, model.embed(batch))
    assert output.logits.dtype == torch.bfloat16
    loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert torch.nn.functional.cosine_similarity(trunk(found), trunk(expected), dim=0) > 0.99
    torch.testing.assert_close(rounded.magnitudes(), exact.magnitudes(), rtol=0.05, atol=0)


def test_the_embedding_regulariser_is_added_to_the_balanced_gradient():
    batch, model = batch_of(THREE), model_of(THREE)
    _, _, without = gradients(MultiBalance(THREE, warmup_steps=0), model, batch)
    _, parts, found = gradients(MultiBalance(THREE, warmup_steps=0, embedding_l2=0.3), model, batch)
    _, _, supervised = gradients(Supervised(THREE), model, batch)
    _, _, regularised = gradients(Supervised(THREE, embedding_l2=0.3), model, batch)
    assert float(parts["embedding_l2"]) > 0
    torch.testing.assert_close(trunk(found) - trunk(without), trunk(regularised) - trunk(supervised))


def test_without_gradients_it_is_the_plain_loss_and_state_comes_back():
    batch, model, objective = batch_of(THREE), model_of(THREE), MultiBalance(THREE, rule="moco", warmup_steps=0)
    for seed in range(3):
        gradients(objective, model, batch_of(THREE, seed))
    state = {name: value.clone() for name, value in objective.state_dict().items()}
    with torch.no_grad():
        loss, _, parts = objective(model, batch, model.embed(batch))
    assert list(parts) == list(THREE.tasks)
    torch.testing.assert_close(loss, sum(parts.values()))
    assert all(torch.equal(value, state[name]) for name, value in objective.state_dict().items())
    again = MultiBalance(THREE, rule="moco", warmup_steps=0)
    again.load_state_dict(state)
    _, _, expected = gradients(objective, model, batch)
    _, _, found = gradients(again, model, batch)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("build", "message", "hint"),
    [
        (lambda: MultiBalance(THREE, rule="minnrom"), "objective.rule is 'minnrom'", "did you mean 'minnorm'?"),
        (lambda: MultiBalance(THREE, beta=1.0), "objective.beta is 1.0", "a number from 0 to below 1 is expected"),
        (
            lambda: MultiBalance(THREE, floor=0.5),
            "objective.floor is 0.5",
            "a number from 0 to 1 / 3 tasks is expected",
        ),
        (lambda: MultiBalance(THREE, eps=0.0), "objective.eps is 0.0", "a number above 0 is expected"),
        (
            lambda: MultiBalance(THREE, target="clic"),
            "objective.target: no task 'clic' in schema",
            "did you mean 'click'?",
        ),
        (
            lambda: MultiBalance(THREE, priorities={"clic": 2}),
            "objective.priorities: no task 'clic' in schema",
            "did you mean 'click'?",
        ),
        (
            lambda: MultiBalance(THREE, priorities={"click": 0}),
            "objective.priorities.click is 0",
            "a number above 0 is expected",
        ),
        (lambda: MGDA(THREE, normalize="l1"), "objective.normalize is 'l1'", "did you mean 'l2'?"),
        (lambda: GradNorm(THREE, alpha=-1.0), "objective.alpha is -1.0", "a number of at least 0 is expected"),
    ],
)
def test_wrong_settings_are_named(build, message, hint):
    with pytest.raises(UserError) as error:
        build()
    assert error.value.message == message
    assert error.value.hint.startswith(hint)


@pytest.mark.parametrize("name", ["multibalance", "mgda", "pcgrad", "gradnorm", "uncertainty"])
def test_files_hold_the_defaults_of_the_classes(name):
    node = compose([f"objective={name}", "data=synthetic", "model=dlrm"])["objective"]
    objective = locate(node.pop("_target_"))
    defaults = {
        key: parameter.default
        for key, parameter in inspect.signature(objective).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    assert {key: value or None for key, value in node.items()} == {key: v or None for key, v in defaults.items()}
    assert list(node) == list(defaults)
