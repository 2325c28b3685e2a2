"""Prompt files are read in all their forms and refused by line."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from router_model.errors import TableError
from router_model.pipeline.prompts import prompt_from_text, read_prompts, sample_prompts, unit_hash


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
    ],
)
def test_a_malformed_row_is_refused_by_line(tmp_path: Path, row: Any, words: str) -> None:
    """The message names file, line and reason."""
    with pytest.raises(TableError, match=words) as refused:
        read_prompts(write(tmp_path, {"id": "ok", "prompt": "fine"}, row))
    assert refused.value.line == 2


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


def test_unit_hash_is_uniform() -> None:
    """Draws fill [0, 1) evenly: each tenth holds 10 % within 5 standard errors."""
    draws = [unit_hash(0, "x", str(n)) for n in range(10_000)]
    counts = [sum(low <= 10 * draw < low + 1 for draw in draws) for low in range(10)]
    assert all(abs(count - 1000) < 150 for count in counts)
