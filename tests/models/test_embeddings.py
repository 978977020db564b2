from __future__ import annotations

import dataclasses
import hashlib

import pytest
import torch
from torchrec.distributed.train_pipeline.tracing import Tracer
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from raysys.errors import UserError
from raysys.models.embeddings import Embeddings, fill_initial_weights
from raysys.schema import DenseFeature, FeatureSchema, Label, SparseFeature, Table

D = 8


def table_of(embeddings, name):
    return next(weight for key, weight in embeddings.named_parameters() if key.endswith(f".{name}.weight"))


def projection_of(embeddings, table):
    for projection in embeddings.assembly.projections.values():
        if table in projection.places:
            return projection.weight[projection.places[table]]
    return torch.eye(D)


def ids_of(jagged: KeyedJaggedTensor, feature: str, row: int):
    """Ids and weights of a row's bag."""
    column = jagged[feature]
    start, end = column.offsets()[row], column.offsets()[row + 1]
    weights = column.weights()[start:end] if jagged.weights_or_none() is not None else torch.ones(int(end - start))
    return column.values()[start:end], weights


def test_homes_read_well_in_a_checkpoint(schema):
    assert sorted(Embeddings(schema, D).state_dict()) == [
        "assembly.projections.4.weight",
        "bags.embedding_bags.genre.weight",
        "bags.embedding_bags.user.weight",
        "ids_4.embeddings.rating.weight",
        "ids_8.embeddings.item.weight",
        "weighted_bags.embedding_bags.tag.weight",
    ]


def test_configs_name_every_table(schema):
    configs = Embeddings(schema, D, device="meta").configs()
    assert {name: (config.num_embeddings, config.embedding_dim) for name, config in configs.items()} == {
        table.name: (table.num_embeddings, table.embedding_dim) for table in schema.tables
    }
    assert configs["item"].feature_names == ["item_id", "history_item"]


def test_tokens_equal_a_loop_over_rows(schema, make_batch):
    """Single ids, a mean bag, a weighted bag, a shared table and projected widths, in the order of the schema."""
    embeddings, batch = Embeddings(schema, D), make_batch(schema, 9)
    embedded = embeddings(batch)
    assert embedded.names == ("user_id", "genres", "item_id", "tags")
    for row in range(9):
        for place, feature in enumerate(schema.sparse):
            ids, weights = ids_of(batch.weighted if feature.weights else batch.sparse, feature.name, row)
            vector = (table_of(embeddings, feature.table)[ids] * weights[:, None]).sum(0)
            vector = vector / max(len(ids), 1) if feature.pooling == "mean" else vector
            torch.testing.assert_close(
                embedded.tokens[row, place], vector @ projection_of(embeddings, feature.table), rtol=1e-5, atol=1e-6
            )


def test_sequences_equal_a_loop_over_rows(schema, make_batch):
    embeddings, batch = Embeddings(schema, D), make_batch(schema, 9)
    padded, mask = embeddings(batch).sequences["history"]
    assert padded.shape == (9, 5, D)
    for row in range(9):
        items, _ = ids_of(batch.sequences, "history_item", row)
        ratings, _ = ids_of(batch.sequences, "history_rating", row)
        expected = table_of(embeddings, "item")[items]
        expected = expected + table_of(embeddings, "rating")[ratings] @ projection_of(embeddings, "rating")
        assert mask[row].tolist() == [True] * len(items) + [False] * (5 - len(items))
        torch.testing.assert_close(padded[row, : len(items)], expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(padded[row, len(items) :], torch.zeros(5 - len(items), D))


def test_rows_of_padding_are_zeros(schema, make_batch):
    embedded = Embeddings(schema, D)(make_batch(schema, 3, padding=2))
    assert torch.equal(embedded.tokens[3:], torch.zeros(2, 4, D))
    assert not embedded.sequences["history"][1][3:].any()


def test_sequences_can_be_left_out(schema, make_batch):
    embeddings = Embeddings(schema, D, use_sequences=False)
    assert "rating" not in embeddings.configs()  # only the history uses it
    assert embeddings.bags.embedding_bag_configs()[0].name == "item"  # nothing else needs its single vectors
    assert embeddings(make_batch(schema, 3)).sequences == {}


def test_schema_without_tables():
    schema = FeatureSchema(dense=(DenseFeature("x"),), labels=(Label("y"),))
    embeddings = Embeddings(schema, D)
    batch_of_five = type("", (), {"dense": torch.ones(5, 1)})()
    assert embeddings(batch_of_five).tokens.shape == (5, 0, D)


def mixed(first: SparseFeature, second: SparseFeature) -> FeatureSchema:
    return FeatureSchema(tables=(Table("t", 20, D),), sparse=(first, second), labels=(Label("y"),))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (SparseFeature("a", "t", max_length=3), SparseFeature("b", "t", max_length=3, pooling="mean")),
        (SparseFeature("a", "t", max_length=3), SparseFeature("b", "t", max_length=3, weights="w")),
    ],
    ids=["poolings", "weights"],
)
def test_bags_of_one_table_may_differ_in_pooling_or_weights(first, second, make_batch):
    schema = mixed(first, second)
    embeddings, batch = Embeddings(schema, D), make_batch(schema, 6)
    assert embeddings.id_collections == ["ids_8"]
    tokens = embeddings(batch).tokens
    for row in range(6):
        ids, weights = ids_of(batch.weighted if second.weights else batch.sparse, "b", row)
        expected = (table_of(embeddings, "t")[ids] * weights[:, None]).sum(0)
        expected = expected / max(len(ids), 1) if second.pooling == "mean" else expected
        torch.testing.assert_close(tokens[row, 1], expected, rtol=1e-5, atol=1e-6)


def test_single_ids_do_not_keep_a_table_from_mean_bags():
    schema = mixed(SparseFeature("a", "t"), SparseFeature("b", "t", max_length=3, pooling="mean"))
    assert Embeddings(schema, D).bags is not None


def test_weighted_mean_is_refused():
    with pytest.raises(UserError) as caught:
        Embeddings(mixed(SparseFeature("a", "t"), SparseFeature("b", "t", weights="w", pooling="mean")), D)
    assert caught.value.message == "schema: feature 'b' has weights and pooling 'mean'"


@pytest.mark.parametrize("name", ["items", "a.b"])
def test_table_names_that_torch_does_not_take(name):
    schema = FeatureSchema(tables=(Table(name, 5),), sparse=(SparseFeature("a", name),))
    with pytest.raises(UserError, match="a table cannot be named"):
        Embeddings(schema, D)


def test_order_of_the_plan_does_not_matter(plain_schema, make_batch):
    """`KeyedTensor.values()` comes in the order of the sharding plan; the tokens must not."""
    embeddings, batch = Embeddings(plain_schema, D), make_batch(plain_schema, 4)
    pooled = embeddings.bags(batch.sparse)
    columns = pooled.to_dict()
    other = KeyedTensor(
        keys=["c", "a", "b"], length_per_key=[D] * 3, values=torch.cat([columns[key] for key in "cab"], 1)
    )
    tokens = [embeddings.assembly([tensor], [], None, batch.dense).tokens for tensor in (pooled, other)]
    assert torch.equal(*tokens)


def test_order_of_keys_in_the_batch_does_not_matter(schema, make_batch):
    embeddings, batch = Embeddings(schema, D), make_batch(schema, 4)
    permuted = dataclasses.replace(
        batch, sparse=batch.sparse.permute([2, 0, 1]), sequences=batch.sequences.permute([1, 0])
    )
    first, second = embeddings(batch), embeddings(permuted)
    assert torch.equal(first.tokens, second.tokens)
    assert torch.equal(first.sequences["history"][0], second.sequences["history"][0])


def test_torchrec_can_trace_the_lookup(schema):
    """What TrainPipelineSparseDist does, with the collections in the place of sharded ones."""
    embeddings = Embeddings(schema, D, device="meta")
    leaves = ["bags", "weighted_bags", "ids_4", "ids_8", "joined_ids", "assembly"]
    calls = [node.target for node in Tracer(leaf_modules=leaves).trace(embeddings).nodes if node.op == "call_module"]
    assert sorted(calls) == sorted(leaves)


# Initial weights


def test_shards_of_a_table_are_parts_of_the_whole():
    whole = torch.empty(100, 10)
    fill_initial_weights(whole, "t", 3, 0, 0, 10, 0.5)
    for rows, columns in (((0, 100), (4, 10)), ((37, 61), (0, 10)), ((99, 100), (9, 10))):
        shard = torch.empty(rows[1] - rows[0], columns[1] - columns[0])
        fill_initial_weights(shard, "t", 3, rows[0], columns[0], 10, 0.5)
        assert torch.equal(shard, whole[slice(*rows), slice(*columns)])


def test_initial_weights_are_uniform_and_independent():
    bound = 0.25
    weight = torch.empty(40_000, 16)
    fill_initial_weights(weight, "t", 0, 0, 0, 16, bound)
    count = weight.numel()
    assert weight.abs().max() < bound
    # Standard errors of the mean, of the variance and of a histogram's cells.
    assert abs(weight.mean()) < 5 * bound / (3 * count) ** 0.5
    assert abs(weight.var() / (bound**2 / 3) - 1) < 5 * (0.8 / count) ** 0.5
    cells = torch.histc(weight, 64, -bound, bound)
    assert ((cells - count / 64).abs() < 5 * (count / 64) ** 0.5).all()
    correlation = torch.corrcoef(weight.t()) - torch.eye(16)
    assert correlation.abs().max() < 5 / 40_000**0.5
    neighbours = torch.corrcoef(torch.stack([weight[:-1].flatten(), weight[1:].flatten()]))[0, 1]
    assert abs(neighbours) < 5 / count**0.5


def initial(table, seed, columns=3):
    weight = torch.empty(2, columns)
    fill_initial_weights(weight, table, seed, 0, 0, columns, 1.0)
    return weight


def test_initial_weights_depend_on_seed_and_table():
    assert not torch.equal(initial("a", 0), initial("b", 0))
    assert not torch.equal(initial("a", 0), initial("a", 1))


def test_initial_weights_are_splitmix64_of_the_place_in_the_table():
    key = int.from_bytes(hashlib.sha256(b"0/a").digest()[:8], "little")

    def expected(place):
        z = (place * 0x9E3779B97F4A7C15 + key) % 2**64
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        top = (z ^ z >> 31) >> 40
        return (2 * (top - 2**24 if top >= 2**23 else top) + 1) / 2**24

    assert initial("a", 0).flatten().tolist() == [expected(place) for place in range(6)]


def test_half_precision_tables_hold_the_rounded_weights():
    full, half = torch.empty(5, 4), torch.empty(5, 4, dtype=torch.float16)
    for weight in (full, half):
        fill_initial_weights(weight, "t", 0, 0, 0, 4, 0.1)
    assert torch.equal(full.half(), half)


def test_meta_tables_take_no_memory_and_leave_the_rest_as_it_is(schema):
    real, meta = Embeddings(schema, D, seed=1), Embeddings(schema, D, seed=1, device="meta")
    assert all(table_of(meta, table.name).is_meta for table in schema.tables)
    assert torch.equal(real.assembly.projections["4"].weight, meta.assembly.projections["4"].weight)


def test_init_scale(schema):
    assert Embeddings(schema, D, seed=3).initial("user") == ("user", 3, 20**-0.5)
    embeddings = Embeddings(schema, D, init_scale=0.01)
    assert 0.005 < table_of(embeddings, "item").abs().max() < 0.01
