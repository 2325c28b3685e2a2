"""Prompt files are read in all their forms and refused by line."""

import datetime as dt
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from router_model.errors import TableError
from router_model.pipeline.prompts import (
    prompt_from_text,
    read_prompt_rows,
    read_prompts,
    sample_prompts,
    unit_hash,
)


def write(tmp_path: Path, *rows: Any) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_every_form_of_a_row_is_the_same_prompt(tmp_path: Path) -> None:
    """A text, a chat list in either column and an OpenAI batch line give the same chat."""
    chat = [{"role": "user", "content": "hi"}]
    rows = [
        {"id": 1, "prompt": "hi"},
        {"id": "2", "prompt": chat},
        {"id": "3", "messages": chat},
        {"custom_id": "4", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": chat}},
    ]
    prompts = read_prompts(write(tmp_path, *rows))
    assert [prompt.id for prompt in prompts] == ["1", "2", "3", "4"]
    assert all(list(prompt.messages) == chat for prompt in prompts)


def test_parquet_and_jsonl_give_the_same_prompts(tmp_path: Path) -> None:
    """The file format changes nothing."""
    rows = [{"id": "a", "prompt": "one", "answer": "1"}, {"id": "b", "prompt": "two", "answer": "2"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "prompts.parquet")
    assert read_prompts(tmp_path / "prompts.parquet") == read_prompts(write(tmp_path, *rows))


def test_other_columns_are_carried_and_answers_cut_off(tmp_path: Path) -> None:
    """Unknown columns stay in ``extra``; a trailing assistant turn becomes the reference."""
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    prompt = read_prompts(write(tmp_path, {"messages": chat, "topic": {"x": [1]}}))[0]
    assert prompt.extra == {"topic": {"x": [1]}, "reference": [chat[1]]}
    assert len(prompt.messages) == 1


def test_rows_are_as_the_file_has_them(tmp_path: Path) -> None:
    """Written again they are the same prompts: batch lines, answers, nulls; dates as JSON has them."""
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = [
        {"messages": chat, "topic": {"x": [1]}, "note": None},
        {"custom_id": "4", "method": "POST", "url": "/v1", "body": {"messages": chat[:1], "top_p": 0.5}},
    ]
    path = write(tmp_path, *rows)
    assert [row for _, row in read_prompt_rows(path)] == rows
    assert [prompt for prompt, _ in read_prompt_rows(path)] == read_prompts(path)
    dated = pa.Table.from_pylist([{"prompt": "x", "day": dt.date(2026, 1, 2)}])
    pq.write_table(dated, tmp_path / "dated.parquet")
    assert read_prompt_rows(tmp_path / "dated.parquet")[0][1] == {"prompt": "x", "day": "2026-01-02"}


def test_a_missing_id_is_a_hash_of_the_content(tmp_path: Path) -> None:
    """The same content gets the same id wherever it stands, other content another one."""
    first = read_prompts(write(tmp_path, {"prompt": "x"}, {"prompt": "y"}))
    second = read_prompts(write(tmp_path, {"prompt": "y"}))
    assert first[1].id == second[0].id != first[0].id


def test_an_id_with_two_contents_is_refused_and_a_repetition_dropped(tmp_path: Path) -> None:
    """Duplicate ids with different content are an error that names the line; equal rows are one prompt."""
    assert len(read_prompts(write(tmp_path, {"id": "a", "prompt": "x"}, {"id": "a", "prompt": "x"}))) == 1
    with pytest.raises(TableError, match=r"prompts\.jsonl:2: id 'a' stands twice"):
        read_prompts(write(tmp_path, {"id": "a", "prompt": "x"}, {"id": "a", "prompt": "y"}))


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": ""}, "empty"),
        ({"prompt": " \n"}, "empty"),
        ({"text": "x"}, "neither"),
        ({"prompt": 3}, "text or a list"),
        ({"messages": [{"role": "user", "content": None}]}, "content"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "role"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "answers only"),
        ('{"prompt": "\\ud800"}', "surrogate"),
        ("{broken", "not a JSON object"),
        ("[1]", "not a JSON object"),
        ({"id": " ", "prompt": "x"}, "id is empty"),
        ('{"prompt": "x", "answer": ["\\udfff"]}', "'answer' holds a lone surrogate"),
        ('{"prompt": "x", "id": "\\ud800"}', "'id' holds a lone surrogate"),
        ('{"prompt": "x", "a": {"\\ud800": 1}}', "'a' holds a lone surrogate"),
        ('{"prompt": "x", "\\ud800": 1}', "name of a column holds a lone surrogate"),
        ('{"prompt": "x", "a": {"b": [NaN]}}', "'a' holds nan"),
        ('{"prompt": "x", "a": -Infinity}', "'a' holds -inf"),
        ('{"prompt": "x", "a": 1e999}', "'a' holds inf"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "role"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "content part must be an object"),
        ({"messages": [{"role": "user", "content": [{"text": "x"}]}]}, "content part must be an object"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "needs a text"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]}, "needs a text"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": " "}]}]}, "prompt is empty"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "prompt is empty"),
        ({"messages": [{"role": "tool", "content": "\n"}]}, "prompt is empty"),
        ({"messages": [{"role": "system", "content": "be brief"}]}, "there is no prompt"),
        ('{"prompt": "x", "a": ' + "[" * 65 + "]" * 65 + "}", "nested more than 64"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_a_malformed_row_is_refused_by_line(tmp_path: Path, row: Any, words: str) -> None:
    """The message names file, line and reason."""
    with pytest.raises(TableError, match=words) as refused:
        read_prompts(write(tmp_path, {"id": "ok", "prompt": "fine"}, row))
    assert refused.value.line == 2


def test_what_reading_allows_can_be_written(tmp_path: Path) -> None:
    """Values at the edge of what is allowed stand: 64 levels, a huge integer, an emoji."""
    row = {"id": "\U0001f600", "prompt": "x", "deep": json.loads("[" * 64 + "]" * 64), "big": 10**30}
    prompt = read_prompts(write(tmp_path, row))[0]
    assert json.loads(json.dumps(dict(prompt.extra), ensure_ascii=False, allow_nan=False).encode()) == {
        "deep": row["deep"],
        "big": 10**30,
    }


def test_a_prompt_may_be_asked_in_parts(tmp_path: Path) -> None:
    """A picture with a question is a prompt, and so is a tool's answer; a system turn may stand first."""
    parts = [{"type": "image_url", "image_url": {"url": "u"}}, {"type": "text", "text": "what?"}]
    chats = [
        [{"role": "system", "content": "s"}, {"role": "user", "content": parts}],
        [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": ""},
            {"role": "tool", "content": "4"},
        ],
    ]
    prompts = read_prompts(write(tmp_path, *({"messages": chat} for chat in chats)))
    assert [list(prompt.messages) for prompt in prompts] == chats


@pytest.mark.parametrize("column", ["answer", "constraints", "topic"])
def test_an_id_whose_rows_differ_in_another_column_is_refused(tmp_path: Path, column: str) -> None:
    """Not only the prompt must agree: no row's answer or constraints is dropped in silence."""
    first = {"id": "a", "prompt": "x", column: 1}
    assert len(read_prompts(write(tmp_path, first, first))) == 1
    for second in ({**first, column: True}, {"id": "a", "prompt": "x"}):
        with pytest.raises(TableError, match=f"prompts.jsonl:2: id 'a' stands twice.*'{column}' differs"):
            read_prompts(write(tmp_path, first, second))


def test_a_batch_line_keeps_the_parameters_of_its_body(tmp_path: Path) -> None:
    """Everything of the body but the chat stands in ``extra``, and so do the columns beside it."""
    chat = [{"role": "user", "content": "q"}]
    body = {"model": "m", "temperature": 0, "max_tokens": 5, "messages": chat, "seed": None}
    line = {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": body, "answer": "4"}
    prompt = read_prompts(write(tmp_path, line))[0]
    assert prompt.extra == {"answer": "4", "body": {"model": "m", "temperature": 0, "max_tokens": 5}}
    assert list(prompt.messages) == chat


def test_a_text_column_named_body_is_a_column(tmp_path: Path) -> None:
    """Only an object makes a row a batch line."""
    row = {"prompt": "x", "body": "text", "url": "u"}
    assert read_prompts(write(tmp_path, row))[0].extra == {"body": "text", "url": "u"}


def test_dates_of_parquet_become_iso_texts(tmp_path: Path) -> None:
    """Parquet knows dates and times, JSON does not: they are carried as ISO 8601."""
    moment = dt.datetime(2024, 5, 6, 7, 8, 9, tzinfo=dt.UTC)
    row = {"prompt": "x", "at": moment, "on": moment.date(), "nested": {"t": [dt.time(1, 2)]}}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "p.parquet")
    extra = read_prompts(tmp_path / "p.parquet")[0].extra
    assert extra == {"at": "2024-05-06T07:08:09+00:00", "on": "2024-05-06", "nested": {"t": ["01:02:00"]}}


@pytest.mark.parametrize(
    ("value", "words"), [(b"x", "'a' holds a value of type bytes"), (float("nan"), "'a' holds nan")]
)
def test_values_of_parquet_that_json_cannot_hold_are_refused(tmp_path: Path, value: Any, words: str) -> None:
    """Bytes and NaN are refused by row, as in JSONL."""
    rows = [{"prompt": "x", "a": None}, {"prompt": "y", "a": value}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    with pytest.raises(TableError, match=words) as refused:
        read_prompts(tmp_path / "p.parquet")
    assert refused.value.line == 2


def test_parquet_text_that_is_no_text_is_refused(tmp_path: Path) -> None:
    """A string column with invalid UTF-8 is a damaged file, not a traceback."""
    column = pa.StringArray.from_buffers(
        1, pa.py_buffer(b"\x00\x00\x00\x00\x01\x00\x00\x00"), pa.py_buffer(b"\xff")
    )
    pq.write_table(pa.table({"prompt": column}), tmp_path / "p.parquet")
    with pytest.raises(TableError, match="not a readable Parquet file"):
        read_prompts(tmp_path / "p.parquet")


@pytest.mark.parametrize("name", ["folder.jsonl", "folder.parquet", "nul\x00.jsonl", "nul\x00.parquet"])
def test_a_path_that_is_no_file_is_refused(tmp_path: Path, name: str) -> None:
    """A folder, even one of Parquet files, and a path with a NUL byte are refused."""
    if "\x00" not in name:
        (tmp_path / name).mkdir()
        pq.write_table(pa.table({"prompt": ["x"]}), tmp_path / name / "part.parquet")
    with pytest.raises(TableError, match="read"):
        read_prompts(tmp_path / name)


def test_pyarrow_is_needed_for_parquet_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where pyarrow is not installed the module loads and reads JSONL; Parquet says what to install."""
    code = "import sys; sys.modules['pyarrow'] = None; import router_model.pipeline.prompts"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert len(read_prompts(write(tmp_path, {"prompt": "x"}))) == 1
    with pytest.raises(TableError, match=r"pip install 'persyn\[train\]'"):
        read_prompts(tmp_path / "p.parquet")


def test_a_megabyte_prompt_is_read(tmp_path: Path) -> None:
    """A very long prompt is a prompt."""
    assert (
        len(read_prompts(write(tmp_path, {"prompt": "long " * 200_000}))[0].messages[0]["content"]) == 10**6
    )


def test_an_empty_or_missing_file_is_refused(tmp_path: Path) -> None:
    """No prompts is an error, not an empty run."""
    with pytest.raises(TableError, match="no prompts"):
        read_prompts(write(tmp_path))
    with pytest.raises(TableError, match="cannot be read"):
        read_prompts(tmp_path / "none.jsonl")


def test_a_sample_depends_on_ids_and_seed_alone(tmp_path: Path) -> None:
    """Reordering the file chooses the same prompts; another seed chooses others; order is kept."""
    prompts = [prompt_from_text(f"prompt {n}") for n in range(200)]
    chosen = {prompt.id for prompt in sample_prompts(prompts, 50, seed=0)}
    assert {prompt.id for prompt in sample_prompts(prompts[::-1], 50, seed=0)} == chosen
    assert {prompt.id for prompt in sample_prompts(prompts, 50, seed=1)} != chosen
    assert sample_prompts(prompts, None, seed=0) == prompts


@pytest.mark.parametrize("text", ["", " ", "\udcff"])
def test_a_prompt_of_the_command_line_is_checked_too(text: str) -> None:
    """An empty text, and bytes that the shell passed and that are no text, are refused."""
    with pytest.raises(TableError, match=r"empty|surrogate"):
        prompt_from_text(text)


def test_unit_hash_is_uniform() -> None:
    """Draws fill [0, 1) evenly: each tenth holds 10 % within 5 standard errors."""
    draws = [unit_hash(0, "x", str(n)) for n in range(10_000)]
    counts = [sum(low <= 10 * draw < low + 1 for draw in draws) for low in range(10)]
    assert all(abs(count - 1000) < 150 for count in counts)
