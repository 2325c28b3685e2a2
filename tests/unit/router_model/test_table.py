"""The score table: what is read, and what is refused with the row at fault."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clients.types import LearnabilityMeasure
from router_model.errors import TableError
from router_model.table import read_table


def row(prompt_id: str = "p1", teacher: str = "a", quality: Any = 0.5, **more: Any) -> dict[str, Any]:
    return {
        "prompt_id": prompt_id,
        "prompt": f"text of {prompt_id}",
        "teacher": teacher,
        "quality": quality,
        **more,
    }


def write(folder: Path, rows: list[dict[str, Any]], suffix: str = ".jsonl") -> Path:
    path = folder / f"scores{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(entry) + "\n" for entry in rows), encoding="utf-8")
    return path


FULL = [
    row("p2", "b", 0.1, learnability=-1.0, family="qwen", size_b=7, n_tokens=10, split="test"),
    row("p2", "a", 0.2, learnability=-2.0, n_tokens=20, split="test", response="ignored"),
    row("p1", "b", 0.3, learnability=-3.0, family="qwen", size_b=7, n_tokens=30, split="train"),
]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_long_rows_become_arrays_with_a_mask(tmp_path: Path, suffix: str) -> None:
    """Prompts keep their order, teachers are sorted, and an absent pair is masked and never zero."""
    table = read_table(write(tmp_path, FULL, suffix))
    assert table.prompt_ids == ("p2", "p1")
    assert table.teachers == ("a", "b")
    np.testing.assert_array_equal(table.mask_NM, [[True, True], [False, True]])
    np.testing.assert_array_equal(table.quality_NM, [[0.2, 0.1], [np.nan, 0.3]])
    assert table.learnability_NM is not None
    np.testing.assert_array_equal(table.learnability_NM, [[-2.0, -1.0], [np.nan, -3.0]])
    assert table.n_tokens_NM is not None
    assert table.cost_usd_NM is None
    assert table.split_N == ("test", "train")
    assert table.families == {"a": None, "b": "qwen"}
    assert table.sizes_b == {"a": None, "b": 7.0}


def test_the_hash_is_of_the_content_and_not_of_the_format(tmp_path: Path) -> None:
    """Parquet and JSONL of the same rows have one hash; another value has another."""
    jsonl = read_table(write(tmp_path, FULL))
    parquet = read_table(write(tmp_path, FULL, ".parquet"))
    changed = read_table(write(tmp_path, [*FULL[:2], {**FULL[2], "quality": 0.31}]))
    assert jsonl.content_sha256 == parquet.content_sha256 != changed.content_sha256


def test_one_teacher_is_readable(tmp_path: Path) -> None:
    """A table with one teacher is a table; only training needs two."""
    assert read_table(write(tmp_path, [row()])).n_teachers == 1


def test_learnability_that_is_null_everywhere_is_absent(tmp_path: Path) -> None:
    """A column of nulls is the same as no column."""
    rows = [row(learnability=None), row(teacher="b", learnability=None)]
    assert read_table(write(tmp_path, rows)).learnability_NM is None


MEASURED = [
    row("p1", "a", learnability=-1.0, rank_surprisal=3.0, local_logprob=-0.5),
    row("p1", "b", learnability=-2.0, rank_surprisal=1.5, local_logprob=-0.25),
    row("p2", "b", learnability=-3.0, rank_surprisal=2.0, local_logprob=-1.0),
]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize(
    ("measure", "expected"),
    [
        ("mean_logprob", [[-1.0, -2.0], [np.nan, -3.0]]),
        ("rank_surprisal", [[-3.0, -1.5], [np.nan, -2.0]]),
        ("local_logprob", [[-0.5, -0.25], [np.nan, -1.0]]),
    ],
)
def test_the_measure_asked_for_is_read_and_higher_is_closer(
    tmp_path: Path, measure: LearnabilityMeasure, expected: list[list[float]], suffix: str
) -> None:
    """Each measure from its column, the ratio negated; a missing answer stays missing."""
    table = read_table(write(tmp_path, MEASURED, suffix), learnability=measure)
    assert table.learnability_NM is not None
    np.testing.assert_array_equal(table.learnability_NM, expected)
    np.testing.assert_array_equal(table.mask_NM, [[True, True], [False, True]])
    assert (table.content_sha256 == read_table(table.source).content_sha256) == (measure == "mean_logprob")


def test_a_table_without_the_measure_says_which_it_has(tmp_path: Path) -> None:
    """A column that is absent or null everywhere is named, with the columns that are there."""
    rows = [{**entry, "local_logprob": None} for entry in MEASURED]
    with pytest.raises(TableError, match=r"no local_logprob in any row.*it has learnability, rank_surprisal"):
        read_table(write(tmp_path, rows, ".parquet"), learnability="local_logprob")
    with pytest.raises(TableError, match="no rank_surprisal in any row; it has no other"):
        read_table(write(tmp_path, [row()]), learnability="rank_surprisal")


def test_the_measure_is_there_for_every_row_or_an_error(tmp_path: Path) -> None:
    """A gap in the measure asked for is refused with its row; one in another column does not matter."""
    rows = [*MEASURED[:2], {**MEASURED[2], "rank_surprisal": None}]
    path = write(tmp_path, rows)
    assert read_table(path).n_prompts == 2
    with pytest.raises(TableError, match=r":3: .*rank_surprisal is missing here but not elsewhere"):
        read_table(path, learnability="rank_surprisal")


def test_numeric_ids_true_and_a_byte_order_mark_are_read(tmp_path: Path) -> None:
    """Tables made elsewhere have integer ids, exact answers as booleans, and files that start with a BOM."""
    path = tmp_path / "t.jsonl"
    path.write_text("\n" + json.dumps(row(quality=True) | {"prompt_id": 3}) + "\n\n", encoding="utf-8")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    table = read_table(path)
    assert table.prompt_ids == ("3",)
    assert table.quality_NM.tolist() == [[1.0]]


@pytest.mark.parametrize(
    ("second", "expected"),
    [
        (
            row(quality=float("nan"), teacher="b"),
            "'p1', teacher 'b': quality is nan; a missing answer is a missing row",
        ),
        (row(quality=float("inf"), teacher="b"), "quality is inf"),
        (row(quality=None, teacher="b"), "quality is null"),
        (row(quality="good", teacher="b"), "quality is str, expected a number"),
        (row(quality=10**400, teacher="b"), "quality is inf"),
        (row(), "duplicate of row 1"),
        (row(teacher="b") | {"prompt": "other"}, "another prompt text"),
        (row(teacher=""), "teacher is empty"),
        ({**row(), "teacher": 3}, "teacher is int"),
        ({"prompt_id": "p1", "prompt": "x", "teacher": "b"}, "column 'quality' is missing"),
        (row(teacher="b", learnability=-1.0), "learnability is missing here but not elsewhere"),
        (row(teacher="b", learnability=float("nan")), "learnability is nan"),
        (row("p3", split="dev"), "split is 'dev'"),
        (row(teacher="b", split="test"), "two values of split"),
        (row("p3", family="llama"), "has family 'llama' here and 'qwen' before"),
        (row("p3", n_tokens=-1), "n_tokens is -1.0"),
        (row("p3", rank_surprisal=-0.5), "rank_surprisal is -0.5"),
        (row("p3", local_logprob=float("inf")), "local_logprob is inf"),
    ],
)
def test_a_bad_row_is_refused_with_its_line(tmp_path: Path, second: dict[str, Any], expected: str) -> None:
    """The message says what is wrong, and the error carries the line."""
    first = row(family="qwen")
    with pytest.raises(TableError) as caught:
        read_table(write(tmp_path, [first, second]))
    assert expected in caught.value.reason
    # The row without learnability is the first one.
    assert caught.value.line == (1 if "not elsewhere" in expected else 2)


def test_a_nan_in_parquet_names_its_row(tmp_path: Path) -> None:
    """Parquet rows are counted from 1 as well."""
    with pytest.raises(TableError, match=r"scores.parquet:2: prompt 'p2'.*never NaN"):
        read_table(write(tmp_path, [row(), row("p2", quality=float("nan"))], ".parquet"))


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("t.jsonl", b"", "holds no rows"),
        ("t.jsonl", b"[1]\n", "expected a JSON object"),
        ("t.jsonl", b"{\n", "not valid JSON"),
        ("t.jsonl", b"\xff\xfe\n", "not valid JSON in UTF-8"),
        ("t.jsonl", b"[" * 100_000, "t.jsonl:1: not valid JSON: it is nested too deeply"),
        ("t.jsonl", b'{"quality": ' + b"1" * 5000 + b"}", "t.jsonl:1: not valid JSON"),
        ("t.csv", b"a,b\n", "unknown format '.csv'"),
        ("t.parquet", b"not parquet", "not a readable Parquet file"),
    ],
)
def test_a_file_that_is_no_table_is_refused(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    """Not one foreign exception escapes."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TableError, match=expected):
        read_table(tmp_path / name)
    with pytest.raises(TableError, match="no such file"):
        read_table(tmp_path / "absent.jsonl")


def test_a_damaged_parquet_file_is_refused_wherever_the_damage_is(tmp_path: Path) -> None:
    """A flipped byte in any part of the file is a TableError, whichever exception pyarrow raises for it."""
    path = write(tmp_path, FULL, ".parquet")
    whole, causes = path.read_bytes(), set()
    for offset in range(4, len(whole), 7):
        path.write_bytes(whole[:offset] + bytes([whole[offset] ^ 0xFF]) + whole[offset + 1 :])
        try:
            read_table(path)
        except TableError as error:
            causes.add(type(error.__cause__))
    assert {OSError, pa.ArrowInvalid, UnicodeDecodeError} <= causes


def test_a_file_that_cannot_be_opened_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Missing rights are an error about the table."""

    def refuse(path: Path, mode: str) -> None:
        raise PermissionError(13, "Permission denied")

    path = write(tmp_path, FULL)
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(TableError, match=r"scores\.jsonl: cannot be read: Permission denied"):
        read_table(path)


def test_without_pyarrow_parquet_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """JSONL needs no pyarrow; for Parquet the message names the extra that brings it."""
    jsonl, parquet = write(tmp_path, FULL), write(tmp_path, FULL, ".parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert read_table(jsonl).n_prompts == 2
    with pytest.raises(TableError, match=r"pip install 'persyn\[train\]'"):
        read_table(parquet)


def test_a_parquet_file_without_a_column_names_it(tmp_path: Path) -> None:
    """The message names the column."""
    pq.write_table(pa.table({"prompt_id": ["a"], "prompt": ["x"], "teacher": ["t"]}), tmp_path / "t.parquet")
    with pytest.raises(TableError, match="column 'quality' is missing"):
        read_table(tmp_path / "t.parquet")


def test_select_keeps_rows_teachers_and_order(tmp_path: Path) -> None:
    """A selection by numbers or by mask is the same table of fewer prompts, with a hash of its own."""
    table = read_table(write(tmp_path, FULL))
    by_number, by_mask = table.select([1]), table.select(np.array([False, True]))
    assert by_number.prompt_ids == by_mask.prompt_ids == ("p1",)
    assert by_number.teachers == table.teachers
    assert by_number.content_sha256 == by_mask.content_sha256 != table.content_sha256
    assert table.select([0, 1]).content_sha256 == table.content_sha256
    assert table.select([]).n_prompts == 0
