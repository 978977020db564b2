from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raysys.data.prepare.census import COLUMNS, NUMBERS, prepare
from raysys.errors import UserError
from raysys.schema import FeatureSchema

SPLITS = ("train", "valid", "test")
EDUCATION = ["Children", "Some college but no degree", "Doctorate degree(PhD EdD)", "High school graduate"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Both files with planted rows: row n has age n, so that a row can be followed."""
    folder = tmp_path_factory.mktemp("census")
    for part, rows in (("train", 40), ("test", 100)):
        lines = []
        for n in range(rows):
            values = dict.fromkeys(COLUMNS, "Not in universe") | dict.fromkeys(NUMBERS, "0")
            values |= {"age": str(n), "instance_weight": f"{n}.5", "education": EDUCATION[n % 4]}
            values |= {
                "marital_stat": ["Never married", "Divorced"][n % 2],
                "income_range": ["- 50000.", "50000+."][n % 5 == 0],
            }
            values |= {"country_of_birth_self": "?" if n % 3 else 'The "Isles"'}
            lines.append(", ".join(values[name] for name in COLUMNS))
        (folder / f"census_income_1994_1995_{part}.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def real(tmp_path_factory, downloads):
    """The recipe of the test file with all three tasks."""
    folder = tmp_path_factory.mktemp("real") / "census"
    prepare(folder, group="G3", downloads=downloads)
    return folder


def read(folder):
    return {split: pq.read_table(folder / f"{split}.parquet") for split in SPLITS}


def test_the_recipe_of_the_test_file_permutes_once_and_cuts(source, tmp_path):
    prepare(tmp_path / "log", source=source)
    order = np.random.default_rng(2022).permutation(100)
    rows = read(tmp_path / "log")
    for split, expected in zip(SPLITS, (order[:60], order[60:80], order[80:]), strict=True):
        assert rows[split]["example_id"].to_pylist() == expected.tolist()
        assert rows[split]["age"].to_pylist() == expected.tolist()


def test_the_full_recipe_trains_on_the_training_file_and_halves_the_test_file(source, tmp_path):
    prepare(tmp_path / "log", source=source, recipe="full")
    rows = read(tmp_path / "log")
    assert rows["train"]["age"].to_pylist() == list(range(40))
    assert len(rows["valid"]) == len(rows["test"]) == 50
    held = np.concatenate([rows["valid"]["age"].to_numpy(), rows["test"]["age"].to_numpy()])
    assert np.array_equal(np.sort(held), np.arange(100))
    ids = pa.concat_tables(rows.values())["example_id"].to_pylist()
    assert sorted(ids) == list(range(140))


@pytest.mark.parametrize(
    ("group", "hidden"),
    [("G1", {"income_range", "marital_stat"}), ("G3", {"income_range", "marital_stat", "education"})],
)
def test_labels_are_made_from_columns_that_are_no_features(source, tmp_path, group, hidden):
    prepare(tmp_path / "log", source=source, group=group, recipe="full")
    train = read(tmp_path / "log")["train"]
    schema = FeatureSchema.load(tmp_path / "log" / "schema.yaml")
    features = {feature.name for feature in (*schema.dense, *schema.sparse)}
    assert features == set(COLUMNS) - hidden - {"instance_weight"} - set(schema.tasks)
    n = np.arange(40)
    assert np.array_equal(train["income"].to_numpy(), n % 5 == 0)
    assert np.array_equal(train["never_married"].to_numpy(), n % 2 == 0)
    if group == "G3":
        assert schema.tasks == ("income", "education", "never_married")
        assert np.array_equal(train["education"].to_numpy(), (n % 4 == 1) | (n % 4 == 2))
    else:
        assert schema.tasks == ("income", "never_married")
        assert train["education"].to_pylist() == [EDUCATION[i % 4] for i in n]  # a feature of this group
    assert train["country_of_birth_self"].to_pylist() == ["?" if i % 3 else 'The "Isles"' for i in n]


def test_tables_have_a_row_for_each_value_of_train_and_one_more(source, tmp_path):
    prepare(tmp_path / "log", source=source)
    schema = FeatureSchema.load(tmp_path / "log" / "schema.yaml")
    assert schema.table("country_of_birth_self").num_embeddings == 3
    assert {table.embedding_dim for table in schema.tables} == {4}
    assert {feature.transform for feature in schema.dense} == {"log_standardize"}
    assert {feature.name for feature in schema.dense} == set(NUMBERS)


def test_wrong_arguments_are_named(tmp_path):
    with pytest.raises(UserError, match="census: group is 'G2'\n  hint: did you mean 'G3'"):
        prepare(tmp_path / "log", group="G2")
    with pytest.raises(UserError, match="census: recipe is 'all'\n  hint: did you mean 'full'"):
        prepare(tmp_path / "log", recipe="all")
    with pytest.raises(
        UserError,
        match=r"census_income_1994_1995_test.csv: no such file\n  hint: a folder with census_income.*train.csv and ",
    ):
        prepare(tmp_path / "log", source=tmp_path)


def test_a_file_with_other_columns_is_refused(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "census_income_1994_1995_test.csv").write_text("1,2,3\n")
    with pytest.raises(
        UserError,
        match=r"census_income_1994_1995_test.csv: not the file that was expected: .*Expected 42 columns, got 3",
    ):
        prepare(tmp_path / "log", source=tmp_path / "source")
    assert not (tmp_path / "log").exists()


def test_the_real_file_has_the_published_counts_and_shares(real):
    rows = read(real)
    assert {split: len(table) for split, table in rows.items()} == {"train": 59_856, "valid": 19_953, "test": 19_953}
    log = pa.concat_tables(rows.values())
    shares = {task: log[task].to_numpy().mean() for task in ("income", "education", "never_married")}
    assert shares == pytest.approx(
        {"income": 0.0620, "education": 0.335, "never_married": 0.432}, abs=5e-4
    )  # as published
    assert len(FeatureSchema.load(real / "schema.yaml").sparse) == 31
