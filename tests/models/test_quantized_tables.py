"""Quantised tables are as close as their step allows, take the bytes that they should, and are looked up as they are."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from raysys.errors import UserError
from raysys.models.embeddings import Embeddings
from raysys.models.quantized_tables import FORMATS, quantize_tables

SEEDS = (0, 1, 2)
KINDS = ("int8", "int4")


def to_float(rows, kind):
    """Rows [N, bytes] as the weights [N, D] that they stand for, by the other way that fbgemm has."""
    if kind == "int8":
        return torch.ops.fbgemm.Fused8BitRowwiseQuantizedToFloat(rows)
    return torch.ops.fbgemm.FusedNBitRowwiseQuantizedSBHalfToFloat(rows, 4)


def tables_of(model):
    return {
        path: module.weight
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.EmbeddingBag | torch.nn.Embedding)
    }


def rounded(model, kind):
    """A copy whose fp32 tables hold what the quantised ones stand for."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for weight in tables_of(model).values():
            weight.copy_(to_float(FORMATS[kind].quantize(weight), kind))
    return model


def quantized(model, kind):
    model = copy.deepcopy(model)
    quantize_tables(model, kind)
    return model


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shift", [0.0, 1.0003])
def test_no_weight_of_an_int8_row_is_off_by_more_than_half_a_step(seed, shift):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(500, 16, generator=generator) * torch.logspace(-6, 2, 500)[:, None] + shift
    weight[0] = shift  # a row of one value has no step
    found = to_float(FORMATS["int8"].quantize(weight), "int8").double()
    low, high = weight.double().aminmax(dim=1, keepdim=True)
    # fbgemm divides by the range + 1e-8, which moves a weight by up to 1e-8; scale, bias, q and their sum are rounded.
    rounding = 1e-8 + 4 * torch.finfo(torch.float32).eps * torch.maximum(low.abs(), high.abs())
    assert ((found - weight).abs() <= (high - low) / 255 / 2 + rounding).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_no_weight_of_an_int4_row_is_off_by_more_than_half_a_step_and_the_rounding_of_its_bias(seed):
    weight = torch.randn(500, 16, generator=torch.Generator().manual_seed(seed))
    found = to_float(FORMATS["int4"].quantize(weight), "int4").double()
    low, high = weight.double().aminmax(dim=1, keepdim=True)
    # A bias that float16 rounds by up to 2^-11 of it widens the range by as much; the scale is rounded in its turn.
    step = (high - low + low.abs() * 2**-11) / 15 * (1 + 2**-11)
    assert ((found - weight).abs() <= step / 2 + low.abs() * 2**-11 + 15 * step * 2**-11).all()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_feature_is_looked_up_as_in_fp32_tables_of_the_same_values(schema, make_batch, kind, seed):
    embeddings, batch = Embeddings(schema, 8, seed), make_batch(schema, 40, seed, padding=3)
    expected, found = rounded(embeddings, kind)(batch), quantized(embeddings, kind)(batch)
    torch.testing.assert_close(found.tokens, expected.tokens, rtol=1e-6, atol=1e-7)
    for name, (vectors, mask) in expected.sequences.items():
        torch.testing.assert_close(found.sequences[name][0], vectors, rtol=1e-6, atol=1e-7)
        assert torch.equal(found.sequences[name][1], mask)
    assert (expected.tokens - embeddings(batch).tokens).abs().max() > 1e-5  # it was rounded at all


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", KINDS)
def test_collections_return_what_torchrecs_do(kind, seed):
    """Features of several tables, tables of several features, two widths, sums and means, keys in another order."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [("a", 30, 8, ["x", "y"], "SUM"), ("b", 20, 12, ["y", "z"], "MEAN"), ("c", 9, 8, ["z"], "MEAN")]
    bags = EmbeddingBagCollection(
        [
            EmbeddingBagConfig(
                name=name,
                num_embeddings=rows,
                embedding_dim=width,
                feature_names=features,
                pooling=PoolingType[pooling],
            )
            for name, rows, width, features, pooling in sizes
        ]
    )
    ids = EmbeddingCollection(
        [
            EmbeddingConfig(name=name, num_embeddings=rows, embedding_dim=8, feature_names=features)
            for name, rows, _, features, _ in sizes
        ]
    )
    keys = ["z", "unused", "x", "y"]
    lengths = torch.randint(0, 5, (4 * 6,), generator=generator)
    batch = KeyedJaggedTensor(keys, torch.randint(0, 9, (int(lengths.sum()),), generator=generator), lengths=lengths)
    model = torch.nn.ModuleDict({"bags": bags, "ids": ids})
    expected, found = rounded(model, kind), quantized(model, kind)
    pooled = expected["bags"](batch).to_dict()
    again = found["bags"](batch).to_dict()
    assert again.keys() == pooled.keys() == {"x", "y@a", "y@b", "z@b", "z@c"}
    for key, value in pooled.items():
        torch.testing.assert_close(again[key], value, rtol=1e-6, atol=1e-7)
    single, again = expected["ids"](batch), found["ids"](batch)
    assert again.keys() == single.keys()
    for key, jagged in single.items():
        torch.testing.assert_close(again[key].values(), jagged.values(), rtol=1e-6, atol=1e-7)
        assert torch.equal(again[key].lengths(), jagged.lengths())
        assert torch.equal(again[key].offsets(), jagged.offsets())


@pytest.mark.parametrize(
    ("kind", "row_bytes"), [("int8", lambda width: width + 8), ("int4", lambda width: width // 2 + 4)]
)
def test_the_tables_take_their_bytes_and_looking_up_takes_those_of_the_answer(
    plain_schema, make_batch, kind, row_bytes
):
    embeddings, batch = Embeddings(plain_schema, 8), make_batch(plain_schema, 5)
    expected = sum(len(weight) * row_bytes(weight.shape[1]) for weight in tables_of(embeddings).values())
    quantize_tables(embeddings, kind)
    state = embeddings.state_dict()
    assert {value.dtype for value in state.values()} == {torch.uint8}
    assert sum(value.nbytes for value in state.values()) == expected
    assert not tables_of(embeddings)
    bags = EmbeddingBagCollection(
        [EmbeddingBagConfig(name="big", num_embeddings=200_000, embedding_dim=16, feature_names=["x"])]
    )
    model = torch.nn.ModuleDict({"bags": bags})
    quantize_tables(model, kind)
    features = KeyedJaggedTensor(["x"], torch.arange(100) * 1999, lengths=torch.ones(100, dtype=torch.int32))
    model["bags"](features)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        model["bags"](features)
    taken = sum(max(event.self_cpu_memory_usage, 0) for event in profiled.key_averages())
    assert 100 * 16 * 4 <= taken < 100_000  # the table has 12.8 MB in fp32
    assert embeddings(batch).tokens.shape == (5, 3, 8)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_without_memory_takes_the_weights_of_one_that_has_them(schema, make_batch, kind):
    batch, full = make_batch(schema, 20), quantized(Embeddings(schema, 8, seed=4), kind)
    empty = quantized(Embeddings(schema, 8, seed=4, device="meta"), kind)
    weights = full.state_dict()
    empty.load_state_dict(weights, assign=True)
    assert torch.equal(empty(batch).tokens, full(batch).tokens)
    for name, value in empty.state_dict().items():
        assert value.data_ptr() == weights[name].data_ptr(), name


def test_what_cannot_be_quantised_is_named(plain_schema):
    with pytest.raises(UserError, match="unknown kind of quantised tables 'int6'"):
        quantize_tables(Embeddings(plain_schema, 8), "int6")
    model = torch.nn.ModuleDict(
        {
            "bags": EmbeddingBagCollection(
                [EmbeddingBagConfig(name="t", num_embeddings=3, embedding_dim=6, feature_names=["x"])]
            )
        }
    )
    with pytest.raises(UserError, match="table 't' has embedding_dim 6, which 4-bit rows cannot have"):
        quantize_tables(model, "int4")


def test_an_id_beyond_the_last_row_is_an_error_and_not_another_memory(plain_schema):
    bags = EmbeddingBagCollection(
        [EmbeddingBagConfig(name="t", num_embeddings=3, embedding_dim=8, feature_names=["x"])]
    )
    model = torch.nn.ModuleDict({"bags": bags})
    quantize_tables(model, "int8")
    with pytest.raises(RuntimeError, match="out of bounds"):
        model["bags"](KeyedJaggedTensor(["x"], torch.tensor([3]), lengths=torch.tensor([1])))
