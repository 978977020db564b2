"""SCR and LSPR: their formulas on linear models, and what they do with a real one."""

from __future__ import annotations

import copy
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from raysys.config import compose, instantiate
from raysys.data.batch import Batch
from raysys.errors import UserError
from raysys.models.outputs import Embedded, Output
from raysys.models.ranking.dlrm import DLRM
from raysys.objectives.perturbation import LSPR, SCR
from raysys.objectives.perturbed_rows import Perturbation
from raysys.objectives.supervised import Supervised
from raysys.schema import DenseFeature, FeatureSchema, Label

WIDTH = 20
DENSE = tuple(DenseFeature(f"x{place}") for place in range(WIDTH))
REGRESSION = FeatureSchema(dense=DENSE, labels=(Label("y", kind="regression"),))
BINARY = FeatureSchema(dense=DENSE, labels=(Label("y"),))


class Linear(nn.Module):
    """f(x) = w x + b of the dense columns."""

    def __init__(self, weight: Tensor | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(WIDTH) if weight is None else weight.clone())
        self.bias = nn.Parameter(torch.zeros(()))

    def interact(self, embedded: Embedded) -> Tensor:
        return embedded.dense @ self.weight[:, None] + self.bias

    def predict(self, shared: Tensor) -> Output:
        return Output(shared, shared, shared[:, None])


def dense_batch(x: Tensor, y: Tensor, labeled: Tensor | None = None) -> tuple[SimpleNamespace, Embedded]:
    mask = torch.ones(len(x), 1, dtype=torch.bool) if labeled is None else labeled[:, None]
    batch = SimpleNamespace(
        labels=y[:, None] * mask, label_mask=mask, weight=mask.float(), example_id=torch.arange(len(x))
    )
    return batch, Embedded(torch.zeros(len(x), 0, 1), (), {}, x)


@pytest.fixture
def make_batch():
    return full_batch


def full_batch(schema: FeatureSchema, rows: int, padding: int = 0) -> Batch:
    """Rows of `full_schema`, and rows of padding; `like` lacks labels."""
    random, total = torch.Generator().manual_seed(8), rows + padding

    def jagged(names: tuple[str, ...], longest: int) -> KeyedJaggedTensor:
        lengths = torch.zeros(len(names), total, dtype=torch.int32)
        lengths[:, :rows] = torch.randint(0, longest + 1, (len(names), rows), generator=random)
        if longest == 1:
            lengths[:, :rows] = 1
        ids = torch.randint(0, 20, (int(lengths.sum()),), generator=random)
        return KeyedJaggedTensor(list(names), ids, lengths=lengths.flatten())

    real = torch.arange(total) < rows
    mask = torch.stack([real, real & (torch.arange(total) % 2 == 0)], 1)
    dense = torch.zeros(total, schema.dense_width)
    dense[:rows, :2] = torch.randn(rows, 2, generator=random)
    labels = torch.zeros(total, 2)
    labels[:rows] = torch.randint(0, 2, (rows, 2), generator=random).float()
    ids = torch.arange(total).where(real, -1)
    sparse, sequences = jagged(("user_id", "item_id", "place"), 1), jagged(("clicked",), 5)
    return Batch(dense, sparse, labels * mask, mask, mask.float(), ids, ids, ids, sequences=sequences)


def perturbed(**keys) -> partial:
    return partial(Perturbation, **({"feature_mask": 0.0, "dense_noise": 0.0} | keys))


def gradients(objective: nn.Module, model: nn.Module, batch) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    torch.manual_seed(3)
    loss = objective(model, batch, model.embed(batch))[0]
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


OFF = [partial(LSPR, alpha=0.0), partial(LSPR, alpha=0.0, balance="ratio"), partial(SCR, lambda_=0.0)]


@pytest.mark.parametrize("kind", OFF)
def test_without_strength_it_is_the_plain_model_bit_by_bit(kind, make_batch, full_schema):
    model, batch = DLRM(full_schema, embedding_dim=8, bottom=[8], dropout=0.2), make_batch(full_schema, 9, padding=2)
    expected, plain = gradients(Supervised(full_schema), model, batch)
    loss, found = gradients(kind(full_schema), model, batch)
    assert torch.equal(loss, expected)
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


@pytest.mark.parametrize("alpha", [0.1, 0.5, 1.0])
def test_without_a_perturbation_lspr_is_the_plain_loss(alpha, make_batch, full_schema):
    model, batch = DLRM(full_schema, embedding_dim=8, bottom=[8]), make_batch(full_schema, 9, padding=2)
    expected, plain = gradients(Supervised(full_schema), model, batch)
    loss, found = gradients(LSPR(full_schema, alpha=alpha, perturbation=perturbed()), model, batch)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["mse_prob", "mse_logit", "kl"])
def test_without_a_perturbation_scr_has_no_term_and_no_gradient(kind, make_batch, full_schema):
    model, batch = DLRM(full_schema, embedding_dim=8, bottom=[8]), make_batch(full_schema, 9, padding=2)
    expected, plain = gradients(Supervised(full_schema), model, batch)
    loss, found = gradients(SCR(full_schema, lambda_=5.0, kind=kind, perturbation=perturbed()), model, batch)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("build", [partial(SCR, lambda_=0.3, kind="mse_logit"), partial(LSPR, alpha=0.3)])
def test_on_a_linear_model_noise_is_a_ridge_penalty(build):
    random = torch.Generator().manual_seed(1)
    x = torch.randn(100_000, WIDTH, generator=random)
    x = (x - x.mean(0)) / x.std(0, correction=0)
    truth = torch.randn(WIDTH, generator=random)
    y, variance = x @ truth + 0.5 * torch.randn(len(x), generator=random), 0.7**2
    strength = 0.3 * variance
    ridge = torch.linalg.solve(x.T @ x / len(x) + strength * torch.eye(WIDTH), x.T @ y / len(x))
    model, objective = Linear(ridge), build(REGRESSION, perturbation=perturbed(dense_noise=0.7))
    batch, embedded = dense_batch(x, y)
    loss = objective(model, batch, embedded)[0]
    loss.backward()
    expected = (x @ ridge - y).square().mean() + strength * ridge.square().sum()
    assert float(loss) == pytest.approx(float(expected), rel=0.02)
    assert float(model.weight.grad.norm()) < 0.04 * float((2 * strength * ridge).norm())  # the optimum of ridge


def train(objective: nn.Module, x: Tensor, y: Tensor, steps: int, lr: float) -> Linear:
    """Adam on the whole batch with a new perturbation in each step."""
    model, (batch, embedded) = Linear(), dense_batch(x, y)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        optimizer.zero_grad()
        objective(model, batch, embedded)[0].backward()
        optimizer.step()
    return model


@pytest.mark.parametrize(
    ("probability", "strength", "scr", "lspr"),
    [(0.1, 0.5, 0.956, 1.004), (0.3, 0.5, 0.869, 0.997), (0.5, 0.5, 0.799, 0.994), (0.5, 0.9, 0.686, 0.984)],
)
def test_masking_shrinks_the_weights_of_scr_and_not_those_of_lspr(probability, strength, scr, lspr):
    random = torch.Generator().manual_seed(5)
    x, truth = torch.randn(400, WIDTH, generator=random), torch.randn(WIDTH, generator=random)
    y, masked = x @ truth + 0.5 * torch.randn(400, generator=random), perturbed(feature_mask=probability)
    objectives = {
        "scr": SCR(REGRESSION, lambda_=strength, perturbation=masked),
        "lspr": LSPR(REGRESSION, alpha=strength, perturbation=masked),
    }
    trained = {name: train(objective, x, y, 250, 0.1) for name, objective in objectives.items()}
    ratio = {name: float(model.weight.detach().norm() / truth.norm()) for name, model in trained.items()}
    error = {name: float((model.weight.detach() - truth).norm() / truth.norm()) for name, model in trained.items()}
    assert ratio["scr"] == pytest.approx(scr, abs=0.03)
    assert ratio["lspr"] == pytest.approx(
        lspr, abs=0.05
    )  # another sample of rows than the table's, with an error of 0.11
    assert error["lspr"] < error["scr"]


def clicks(rows: int, seed: int = 11) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training rows, and 20,000 test rows with the same weights."""
    random = torch.Generator().manual_seed(seed)
    weight = 0.7 * torch.randn(WIDTH, generator=random)
    x = torch.randn(rows + 20_000, WIDTH, generator=random)
    y = torch.bernoulli((x @ weight - 1.5).sigmoid(), generator=random)
    return x[:rows], y[:rows], x[rows:], y[rows:]


def normalized_entropy(model: Linear, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        logits, base = x @ model.weight + model.bias, y.mean()
        loss = nn.functional.binary_cross_entropy_with_logits(logits, y)
    return float(loss / -(base * base.log() + (1 - base) * (1 - base).log()))


def test_a_strong_scr_makes_predictions_constant_and_lspr_does_not():
    x, y, test_x, _ = clicks(400)
    masked, spread = perturbed(feature_mask=0.3), {}
    objectives = {"scr": SCR(BINARY, lambda_=1000.0, perturbation=masked)}
    objectives["lspr"] = LSPR(BINARY, alpha=1.0, perturbation=masked)
    for name, objective in objectives.items():
        model = train(objective, x, y, 200, 0.1)
        spread[name] = float((test_x @ model.weight + model.bias).sigmoid().std())
    assert spread["scr"] < 0.01
    assert spread["lspr"] > 0.2


@pytest.mark.experiment
def test_with_few_labels_lspr_halves_the_test_loss(record_figure):
    x, y, test_x, test_y = clicks(100)
    entropy = {}
    for name, objective in {
        "none": Supervised(BINARY),
        "lspr": LSPR(BINARY, alpha=0.5, perturbation=perturbed(feature_mask=0.3)),
    }.items():
        entropy[name] = normalized_entropy(train(objective, x, y, 2000, 0.3), test_x, test_y)
        record_figure(f"{name}_ne", entropy[name])
    assert entropy["lspr"] < 0.5 * entropy["none"]


@pytest.mark.parametrize("build", [SCR, LSPR])
def test_a_step_looks_up_once_and_evaluation_perturbs_nothing(build, make_batch, monkeypatch, full_schema):
    model, batch = DLRM(full_schema, embedding_dim=8, bottom=[8]), make_batch(full_schema, 9)
    objective = build(full_schema)
    calls, sizes, lookup, interact = [], [], model.embeddings.forward, model.interact
    monkeypatch.setattr(model.embeddings, "forward", lambda batch: calls.append(batch) or lookup(batch))
    monkeypatch.setattr(model, "interact", lambda e: sizes.append(len(e.dense)) or interact(e))
    loss, output, parts = objective(model, batch, model.embed(batch))
    loss.backward()
    assert (len(calls), sizes) == (1, [18])
    assert [len(value) for value in (output.logits, output.shared, output.hidden)] == [9, 9, 9]
    torch.testing.assert_close(output.logits, model(batch).logits)
    assert set(parts) == {"click", "like", "perturbed" if build is LSPR else "consistency"}
    sizes.clear()
    objective.eval()(model, batch, model.embed(batch))
    assert sizes == [9]


def test_the_ratio_has_no_gradient_of_its_own():
    x, y, *_ = clicks(50)
    weight = torch.randn(WIDTH, generator=torch.Generator().manual_seed(2))
    batch, embedded = dense_batch(x, y)
    found = {}
    for name, balance, alpha in (("clean", "convex", 0.0), ("copies", "convex", 1.0), ("ratio", "ratio", 0.4)):
        torch.manual_seed(0)
        model = Linear(weight)
        objective = LSPR(BINARY, alpha=alpha, balance=balance, perturbation=perturbed(feature_mask=0.5))
        loss = objective(model, batch, embedded)[0]
        loss.backward()
        found[name] = (loss.detach(), model.weight.grad)
    clean, copies, ratio = found["clean"], found["copies"], found["ratio"]
    share = clean[0] / copies[0]
    assert abs(float(share) - 1) > 0.01
    torch.testing.assert_close(ratio[1], clean[1] + 0.4 * share * copies[1], rtol=1e-5, atol=1e-6)
    assert float(ratio[0]) == pytest.approx(1.4 * float(clean[0]), rel=1e-5)  # 1 : alpha, whatever their sizes


@pytest.mark.parametrize("padding", [0, 3])
def test_a_ratio_of_each_group_balances_it_alone(make_batch, padding, full_schema):
    model, batch = DLRM(full_schema, embedding_dim=8, bottom=[8]), make_batch(full_schema, 60, padding=padding)
    batch.sparse = KeyedJaggedTensor(
        batch.sparse.keys(), batch.sparse.values() % 3, lengths=batch.sparse.lengths()
    )  # user_id 0, 1, 2, and padding has none
    objective = LSPR(
        full_schema, alpha=0.4, balance="ratio", balance_groups="user_id", perturbation=perturbed(feature_mask=0.6)
    )
    _, found = gradients(objective, model, batch)
    embedded = model.embed(batch)
    counted = (batch.example_id >= 0).float()
    _, copies = perturbed(feature_mask=0.6)(full_schema)(embedded, counted)  # with the seed as it was
    clean, moved = (
        objective._row_losses(model.predict(model.interact(e)).logits, batch.labels) for e in (embedded, copies)
    )
    expected, group = 0.0, batch.sparse["user_id"].values()
    for task in range(2):
        weight = batch.weight[:60, task]
        total, copied = (weight * clean[:60, task]).sum(), 0.0
        for rows in (group == value for value in range(3)):
            first, second = ((weight * losses[:60, task])[rows].sum() for losses in (clean, moved))
            ratio = (first / second).detach()
            assert 0.1 < ratio < 10
            copied = copied + ratio * second
        expected = expected + (total + 0.4 * copied) / weight.sum()
    wanted = torch.autograd.grad(expected, list(model.parameters()))
    torch.testing.assert_close(found, list(wanted), rtol=1e-4, atol=1e-6)
    _, at_once = gradients(
        LSPR(full_schema, alpha=0.4, balance="ratio", perturbation=perturbed(feature_mask=0.6)), model, batch
    )
    assert max(float((a - b).abs().max()) for a, b in zip(found, at_once, strict=True)) > 1e-4


def test_rows_without_a_label_count_in_scr_where_asked_for_and_never_in_lspr():
    x, y, *_ = clicks(30)
    labeled = torch.arange(30) < 20
    masked, weight = perturbed(feature_mask=0.3), torch.ones(WIDTH)

    def consistency(objective: nn.Module, moved: float) -> float:
        rows = torch.where(labeled[:, None], x, x + moved)
        torch.manual_seed(0)
        _, _, parts = objective(Linear(weight), *dense_batch(rows, y, labeled))
        return float(next(value for name, value in parts.items() if name != "y"))

    assert consistency(SCR(BINARY, perturbation=masked), 0.0) == consistency(SCR(BINARY, perturbation=masked), 1.0)
    assert consistency(LSPR(BINARY, perturbation=masked), 0.0) == consistency(LSPR(BINARY, perturbation=masked), 1.0)
    asked = SCR(BINARY, unlabeled=True, perturbation=masked)
    assert consistency(asked, 0.0) != consistency(asked, 1.0)


def test_padding_never_counts(make_batch, full_schema):
    model, objective = DLRM(full_schema, embedding_dim=8, bottom=[8]), SCR(full_schema, unlabeled=True, lambda_=1.0)
    objective.perturbation = perturbed(feature_mask=0.999)(full_schema)  # copies of all rows are the same
    losses = [gradients(copy.deepcopy(objective), model, make_batch(full_schema, 9, padding=n))[0] for n in (0, 5)]
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("name", ["scr", "lspr"])
def test_the_yaml_file_has_the_defaults_of_the_class(name, full_schema):
    given = instantiate(compose([f"objective={name}"])["objective"], schema=full_schema)
    default = {"scr": SCR, "lspr": LSPR}[name](full_schema)
    for left, right in ((given, default), (given.perturbation, default.perturbation)):
        plain = {key: value for key, value in vars(left).items() if isinstance(value, float | bool | str | tuple)}
        assert plain == {key: vars(right)[key] for key in plain}


GROUPS = "objective.balance_groups is '{}': balance=ratio and a sparse feature with max_length 1 are expected"


@pytest.mark.parametrize(
    ("build", "message", "hint"),
    [
        (partial(SCR, lambda_=-1.0), "objective.lambda_ is -1.0", "a number of at least 0 is expected"),
        (partial(SCR, kind="mse"), "objective.kind is 'mse'", None),
        (partial(LSPR, alpha=1.5), "objective.alpha is 1.5", "a number of 0 to 1 is expected"),
        (partial(LSPR, balance="ratios"), "objective.balance is 'ratios'", "did you mean 'ratio'?"),
        (partial(LSPR, balance="ratio", balance_groups="user"), GROUPS.format("user"), "did you mean 'user_id'?"),
        (partial(LSPR, balance_groups="user_id"), GROUPS.format("user_id"), None),
        (
            partial(SCR, perturbation=perturbed(id_drop=1.0)),
            "objective.perturbation.id_drop is 1.0",
            "a number of at least 0 and below 1 is expected",
        ),
        (
            partial(SCR, perturbation=perturbed(exclude=["user"])),
            "objective.perturbation.exclude: no feature 'user' in schema",
            "did you mean 'user_id'?",
        ),
        (
            partial(SCR, perturbation=perturbed(feature_mask=1.0)),
            "objective.perturbation.feature_mask is 1.0",
            "a number of at least 0 and below 1 is expected",
        ),
    ],
)
def test_wrong_settings_are_named(build, message, hint, full_schema):
    with pytest.raises(UserError) as error:
        build(full_schema)
    assert error.value.message == message
    assert hint is None or error.value.hint == hint


def test_kl_by_hand():
    first, second = torch.tensor([[0.3]]), torch.tensor([[-1.2]])
    p, q = 1 / (1 + math.exp(-0.3)), 1 / (1 + math.exp(1.2))
    expected = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert float(SCR(BINARY, kind="kl")._difference(first, second)) == pytest.approx(expected, rel=1e-5)
