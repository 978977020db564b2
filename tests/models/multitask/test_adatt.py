from __future__ import annotations

import pytest
import torch

from raysys.errors import UserError
from raysys.models.multitask.adatt import AdaTT, AdaTTLevel
from raysys.models.multitask.mmoe import MMoE
from raysys.models.multitask.ple import PLE

FORMS = [(2, 0), (2, 1), (1, 0), (1, 1), (1, 2), ([1, 3], 0), ([1, 3], 2)]


def counts_of(task_experts, shared_experts):
    counts = [task_experts] * 2 if isinstance(task_experts, int) else task_experts
    return counts + [shared_experts] * (shared_experts > 0)


def by_loops(head, x, counts):
    """What the towers get, unit by unit: A + N, with one expert after another."""
    tasks = head.towers.logits.weight.shape[0]
    values = [x] * len(counts)
    for level in head.levels:
        experts, owner = [], []
        for unit, count in enumerate(counts):
            for _ in range(count):
                hidden = values[unit]
                for layer in level.experts.layers:
                    hidden = torch.relu(hidden @ layer.weight[len(experts)] + layer.bias[len(experts)])
                experts.append(hidden)
                owner.append(unit)
        gated = tasks if level is head.levels[-1] else len(counts)
        outputs = []
        for unit in range(gated):
            gate = torch.softmax(values[unit] @ level.gate.weight[unit] + level.gate.bias[unit], 1)
            fused = sum(gate[:, e, None] * experts[e] for e in range(len(experts)))
            native = [e for e in range(len(experts)) if owner[e] == unit]
            v = level.residual.v if max(counts) > 1 else torch.ones(len(experts))
            outputs.append(fused + sum(v[e] * experts[e] for e in native))
        values = outputs
    return torch.stack(values)


@pytest.mark.parametrize("widths", [[[5]], [[5, 4]], [[5], [4, 3], [4]]])
@pytest.mark.parametrize(("task_experts", "shared_experts"), FORMS)
def test_one_product_equals_gated_fusion_plus_native_residual(tasks, shake, x, task_experts, shared_experts, widths):
    arguments = {"task_experts": task_experts, "shared_experts": shared_experts, "widths": widths}
    head = shake(AdaTT(tasks(2), 6, **arguments, tower=(3,)))
    expected = head.towers(by_loops(head, x, counts_of(task_experts, shared_experts))).logits
    torch.testing.assert_close(head(x).logits, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("task_experts", "shared_experts"), FORMS)
def test_gates_sum_to_one_and_with_the_residual_to_one_plus_v(tasks, shake, x, task_experts, shared_experts):
    counts = counts_of(task_experts, shared_experts)
    head = shake(AdaTT(tasks(2), 6, task_experts=task_experts, shared_experts=shared_experts, widths=[[5], [4]]))
    level = head.levels[0]
    torch.testing.assert_close(level.gate(x).sum(2), torch.ones(len(counts), len(x)))
    v = level.residual.v.split(counts) if max(counts) > 1 else [torch.ones(count) for count in counts]
    expected = torch.stack([1 + own.sum() for own in v])
    assert level.weights(x).shape == (len(counts), len(x), sum(counts))
    torch.testing.assert_close(level.weights(x).sum(2), expected[:, None].expand(-1, len(x)))


def test_without_residual_one_level_is_mmoe(tasks, shake, x):
    adatt = shake(AdaTT(tasks(2), 6, shared_experts=0, widths=[[5, 4]], residual=False, tower=(3,)))
    mmoe = MMoE(tasks(2), 6, experts=4, widths=[[5, 4]], tower=(3,))
    names = {"levels.0.experts.": "experts.0.", "levels.0.gate.": "gates.0."}
    state = adatt.state_dict()
    for old, new in names.items():
        state = {name.replace(old, new): value for name, value in state.items()}
    mmoe.load_state_dict(state)
    torch.testing.assert_close(adatt(x).logits, mmoe(x).logits)


def test_with_gates_of_zero_and_one_expert_the_tasks_are_separate_networks(tasks, shake, separate, x):
    head = shake(AdaTT(tasks(3), 6, task_experts=1, shared_experts=0, widths=[[5], [4]], tower=(3,)))
    for level in head.levels:
        level.gate.register_forward_hook(lambda module, arguments, output: torch.zeros_like(output))
    for task in range(3):
        expected = separate([level.experts for level in head.levels], head.towers, x, task)
        torch.testing.assert_close(head(x).logits[:, task], expected)
        head.zero_grad()
        head(x).logits[:, task].sum().backward()
        for level in head.levels:
            trained = level.experts.layers[0].weight.grad.abs().sum((1, 2)) > 0
            assert trained.tolist() == [unit == task for unit in range(3)]


def test_without_residual_and_with_gates_on_own_and_shared_experts_it_is_ple(tasks, shake, x):
    ple = shake(PLE(tasks(2), 6, task_experts=2, shared_experts=1, widths=[[5], [4]], tower=(3,)))
    adatt = shake(AdaTT(tasks(2), 6, task_experts=2, shared_experts=1, widths=[[5], [4]], residual=False, tower=(3,)))
    adatt.towers.load_state_dict(ple.towers.state_dict())
    with torch.no_grad():
        for to, of in zip(adatt.levels, ple.levels, strict=True):
            to.experts.load_state_dict(of.experts.state_dict())
            to.gate.bias.fill_(-torch.inf)  # a masked expert: its weight is exactly 0 after the softmax
            for task, seen in enumerate(([0, 1, 4], [2, 3, 4])):
                to.gate.weight[task, :, seen] = of.task_gates.weight[task]
                to.gate.bias[task, 0, seen] = of.task_gates.bias[task, 0]
            if of.shared_gate is not None:
                to.gate.weight[2], to.gate.bias[2] = of.shared_gate.weight[0], of.shared_gate.bias[0]
    torch.testing.assert_close(adatt(x).logits, ple(x).logits)


def test_with_gates_of_biases_only_fusion_is_a_fixed_combination_of_experts(tasks, shake, x):
    level = shake(AdaTT(tasks(2), 6, widths=[[5], [4]])).levels[0]
    with torch.no_grad():
        level.gate.weight.zero_()
    weights = level.weights(x)  # [U, B, M]
    assert torch.equal(weights, weights[:, :1].expand_as(weights))
    expected = torch.einsum("um,mbd->ubd", weights[:, 0], level.experts(x))
    torch.testing.assert_close(level(x), expected)


@pytest.mark.parametrize(
    ("task_experts", "shared_experts", "widths"),
    [(2, 1, [[5], [4]]), (2, 0, [[5], [4], [3]]), (1, 1, [[5], [4]]), (1, 0, [[5]])],
)
def test_every_task_trains_every_expert(tasks, x, task_experts, shared_experts, widths):
    torch.manual_seed(0)
    arguments = {"task_experts": task_experts, "shared_experts": shared_experts, "widths": widths}
    head = AdaTT(tasks(3), 6, **arguments, activation="silu")
    for task in range(3):
        head.zero_grad()
        head(x).logits[:, task].sum().backward()
        for level in head.levels:
            assert (level.experts.layers[0].weight.grad.abs().sum((1, 2)) > 0).all()


@pytest.mark.parametrize(("shared_experts", "gates"), [(0, [3, 3, 3]), (1, [4, 4, 3])])
def test_number_of_gates(tasks, shared_experts, gates):
    head = AdaTT(tasks(3), 6, shared_experts=shared_experts, widths=[[5], [4], [3]])
    assert [len(level.gate.weight) for level in head.levels] == gates
    assert [len(level.residual.native) for level in head.levels] == gates


@pytest.mark.parametrize(("shared_experts", "total"), [(0, 21_170), (1, 27_069)])
@pytest.mark.parametrize("residual", [True, False])
def test_number_of_parameters(tasks, count_parameters, shared_experts, total, residual):
    """Two experts a task, widths 32 and 16, on the 135 inputs of Census G1: 21.2 k, and 27.1 k with a shared expert."""
    arguments = {"shared_experts": shared_experts, "widths": [[32], [16]], "tower": (8,), "residual": residual}
    experts, expected = 4 + shared_experts, 2 * (16 * 8 + 8 + 8 + 1)
    for inputs, width, gated in ((135, 32, 2 + shared_experts), (32, 16, 2)):
        expected += experts * (inputs * width + width) + gated * (inputs * experts + experts)
        expected += residual * (4 + shared_experts * (gated > 2))
    found = count_parameters(AdaTT(tasks(2), 135, **arguments))
    assert found == expected
    assert found == total - (0 if residual else 8 + shared_experts)


@pytest.mark.parametrize(("counts", "learned"), [([1, 1], 0), ([1, 1, 1], 0), ([1, 2], 3), ([1, 1, 2], 4)])
def test_v_is_learned_by_all_units_where_one_has_several_experts(counts, learned):
    v = AdaTTLevel(6, [5], counts, len(counts)).residual.v
    assert (0 if v is None else len(v)) == learned


def test_v_starts_uniform_by_the_unit_or_at_its_mean():
    counts = [1, 4, 400]
    v = AdaTTLevel(6, [2], counts, 3).residual.v.detach().split(counts)
    for values, count in zip(v, counts, strict=True):
        assert values.abs().max() <= count**-0.5
    assert v[2].std() == pytest.approx((400 * 3) ** -0.5, rel=0.1)
    mean = AdaTTLevel(6, [2], counts, 3, v_init="mean").residual.v.split(counts)
    for values, count in zip(mean, counts, strict=True):
        torch.testing.assert_close(values, torch.full((count,), 1 / count))


def test_one_task_with_one_expert_doubles_it_at_each_level(tasks, shake, x):
    head = shake(AdaTT(tasks(1), 6, task_experts=1, shared_experts=0, widths=[[5], [4]]))
    value = x
    for level in head.levels:
        expert = level.experts(value)
        torch.testing.assert_close(level(value), 2 * expert)
        value = level(value)


@pytest.mark.parametrize("shared_experts", [0, 2])
def test_permuting_tasks_with_their_parameters_permutes_the_outputs(tasks, shake, x, shared_experts):
    arguments = {"shared_experts": shared_experts, "widths": [[5], [4]], "tower": (3,)}
    head, other = shake(AdaTT(tasks(3), 6, **arguments)), AdaTT(tasks(3), 6, **arguments)
    order = [2, 0, 1]
    experts = [2 * task + e for task in order for e in range(2)] + [6, 7][:shared_experts]
    units = [*order, 3]
    state = {}
    for name, value in head.state_dict().items():
        if ".experts." in name or name.endswith(".v"):
            value = value[experts[: len(value)]]
        elif ".gate." in name:
            value = value[units[: len(value)]][:, :, experts]
        else:
            value = value[order]
        state[name] = value
    other.load_state_dict(state)
    torch.testing.assert_close(other(x).logits, head(x).logits[:, order])


def test_layer_norm_keeps_the_scale_of_deep_networks(tasks, count_parameters, x):
    deep = {"widths": [[8]] * 8, "v_init": "mean"}
    plain, normed = (AdaTT(tasks(2), 6, **deep, layer_norm=flag) for flag in (False, True))
    assert count_parameters(plain) == count_parameters(normed)
    hidden = normed(x).hidden  # [B, T, 8], the last level itself as there is no tower
    torch.testing.assert_close(hidden.mean(2), torch.zeros(9, 2), rtol=0, atol=1e-5)
    torch.testing.assert_close(hidden.square().mean(2), torch.ones(9, 2), rtol=0.01, atol=0)


def test_keys_that_do_not_fit_are_errors(tasks):
    with pytest.raises(UserError, match=r"unknown v_init 'meen'\n  hint: did you mean 'mean'"):
        AdaTT(tasks(2), 6, v_init="meen")
    with pytest.raises(UserError, match="task_experts has 3 numbers for 2 tasks"):
        AdaTT(tasks(2), 6, task_experts=[1, 2, 3])
    with pytest.raises(UserError, match=r"task_experts is 0\n  hint: at least 1"):
        AdaTT(tasks(2), 6, task_experts=[1, 0])
    with pytest.raises(UserError, match="shared_experts is -1"):
        AdaTT(tasks(2), 6, shared_experts=-1)
