"""``persyn.yaml`` is read strictly, and each mistake is named with its line."""

from pathlib import Path

import pytest
import yaml

from clients.errors import ConfigurationError
from clients.types import Price
from router_model.pipeline.config import example_project, load_project, project_schema

GOOD = """\
version: 1
students:
  - {id: tiny, model: models/tiny.gguf, checkpoint: runs/tiny/checkpoint}
teachers:
  - id: a
    base_url: http://127.0.0.1:1/v1
    model: m
    sampling: {temperature: 0, seed: 0}
calibration: {prompts: prompts.jsonl}
quality: {kind: verifiable}
router: {backbone: some/hub-id}
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "persyn.yaml"
    path.write_text(text)
    return path


def refusal(tmp_path: Path, text: str) -> str:
    with pytest.raises(ConfigurationError) as refused:
        load_project(write(tmp_path, text))
    return refused.value.message


def test_relative_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    """Prompts, checkpoint and existing local models resolve against the file's folder; hub ids stay."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny.gguf").touch()
    project = load_project(write(tmp_path, GOOD))
    assert project.students[0].checkpoint == str(tmp_path / "runs/tiny/checkpoint")
    assert project.students[0].model == str(tmp_path / "models/tiny.gguf")
    assert project.calibration.prompts == str(tmp_path / "prompts.jsonl")
    assert project.router.backbone == "some/hub-id"


def test_falsy_sampling_survives(tmp_path: Path) -> None:
    """Temperature 0 and seed 0 reach the teacher."""
    spec = load_project(write(tmp_path, GOOD)).teacher_specs({})[0]
    assert spec.sampling == {"temperature": 0, "seed": 0}


@pytest.mark.parametrize(
    ("stated", "price"),
    [
        ("", None),
        ("    price: {input_usd_per_mtok: 0, output_usd_per_mtok: 0}\n", Price()),
        ("    price: {output_usd_per_mtok: 2}\n", Price(0.0, 2.0)),
    ],
)
def test_a_price_that_is_not_stated_is_not_known(tmp_path: Path, stated: str, price: Price | None) -> None:
    """No price is not a price of 0: a choice by cost takes the one for unknown, the other for free."""
    text = GOOD.replace("    model: m\n", f"    model: m\n{stated}")
    assert load_project(write(tmp_path, text)).teacher_specs({})[0].price == price


@pytest.mark.parametrize(
    ("old", "new", "line", "hint"),
    [
        ("    model: m\n", "    modle: m\n", 7, "did you mean 'model'"),
        ("quality: {kind", "quality: {knd: x, kind", 10, "did you mean 'kind'"),
        ("version: 1", "version: 1\nteacher: []", 2, "did you mean 'teachers'"),
    ],
)
def test_an_unknown_key_is_named_with_its_line_and_the_nearest(
    tmp_path: Path, old: str, new: str, line: int, hint: str
) -> None:
    """A misspelt key is an error that names it, its line and the nearest valid name."""
    message = refusal(tmp_path, GOOD.replace(old, new))
    assert f"persyn.yaml:{line}: unknown key" in message
    assert hint in message


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("http://127.0.0.1:1/v1", "http://me:hunter2@127.0.0.1/v1", "api_key_env"),
        ("http://127.0.0.1:1/v1", "127.0.0.1", "base_url"),
        ("version: 1", "version: 2", "version"),
        ("kind: verifiable", "kind: reward_model", "model is needed"),
        ("kind: verifiable", "kind: verifable", "quality.kind"),
        ("quality:", "reward: {learnability: rsr}\nquality:", "reward.learnability: Input should be"),
        ("version: 1", "version: 1\nversion: 1", "stands twice"),
        ("version: 1", "version: [", "not valid YAML"),
        ("version: 1", "version: &again [*again]", "not valid YAML"),
    ],
)
def test_bad_values_are_refused_with_a_reason(tmp_path: Path, old: str, new: str, words: str) -> None:
    """A value that does not fit is refused in words that say what is expected."""
    assert words in refusal(tmp_path, GOOD.replace(old, new))


def test_the_secret_in_a_url_is_not_repeated(tmp_path: Path) -> None:
    """An error about a URL with a password does not print the password."""
    assert "hunter2" not in refusal(tmp_path, GOOD.replace("http://", "http://me:hunter2@"))


def test_an_id_given_twice_is_refused(tmp_path: Path) -> None:
    """Two teachers cannot share an id."""
    twin = GOOD.replace("teachers:\n", "teachers:\n  - {id: a, base_url: 'http://x/v1', model: n}\n")
    assert "id 'a' is given twice" in refusal(tmp_path, twin)


def test_a_missing_key_variable_is_named(tmp_path: Path) -> None:
    """A teacher whose key variable is unset stops the command, which names the variable."""
    project = load_project(
        write(tmp_path, GOOD.replace("    model: m\n", "    model: m\n    api_key_env: MY_KEY\n"))
    )
    with pytest.raises(ConfigurationError, match="MY_KEY"):
        project.teacher_specs({})
    spec = project.teacher_specs({"MY_KEY": "very-secret"})[0]
    assert spec.api_key == "very-secret"
    assert "very-secret" not in repr(spec)


def test_a_missing_file_is_a_clear_error(tmp_path: Path) -> None:
    """No file, no traceback."""
    with pytest.raises(ConfigurationError, match="cannot be read"):
        load_project(tmp_path / "none.yaml")


def test_the_example_is_valid_and_names_its_schema(tmp_path: Path) -> None:
    """What ``persyn init`` writes loads, and starts with the schema line that editors read."""
    text = example_project()
    assert text.startswith("# yaml-language-server: $schema=./persyn.schema.json\n")
    assert len(load_project(write(tmp_path, text)).teachers) == 2


def test_every_key_of_the_example_is_in_the_schema() -> None:
    """The JSON Schema describes the top-level sections of the example."""
    assert set(yaml.safe_load(example_project())) <= set(project_schema()["properties"])
