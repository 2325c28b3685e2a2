"""Recipes are read strictly: every mistake is named by its key."""

import math
from itertools import pairwise
from pathlib import Path

import pytest

from clients.errors import ConfigurationError
from router_model.recipe import FineTuneRecipe, read_recipe

PAPER = Path(__file__).parents[3] / "recipes" / "paper.yaml"


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_papers_recipe_states_every_key() -> None:
    """Nothing in it is left to a default that a later release may change."""
    recipe = read_recipe(PAPER)
    assert recipe.model_fields_set == set(FineTuneRecipe.model_fields)
    assert (recipe.backbone, recipe.objective, recipe.alpha) == ("Qwen/Qwen2.5-1.5B", "bt", 0.4)
    assert (recipe.learning_rate, recipe.batch_prompts, recipe.max_tokens) == (4e-6, 64, 2048)


def test_a_backbone_is_all_that_a_recipe_must_name(tmp_path: Path) -> None:
    """The rest has defaults."""
    assert read_recipe(write(tmp_path, "backbone: some/model\n")) == FineTuneRecipe(backbone="some/model")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("alpha: 0.4", r"backbone: Field required"),
        ("backbone: m\nlearning_rat: 0.1", r"unknown key 'learning_rat'; did you mean 'learning_rate'\?"),
        ("backbone: m\nzzz: 0.1", r"unknown key 'zzz'; valid here: backbone, alpha"),
        ("backbone: m\nlearning_rate: 4e-6", r"learning_rate: YAML reads 4e-6 as text: .* 4\.0e-6"),
        ("backbone: m\nlearning_rate: fast", r"learning_rate: Input should be a valid number"),
        ("backbone: m\nlearning_rate: 0.0", r"learning_rate: .*greater than 0"),
        ("backbone: m\nlearning_rate: .inf", r"learning_rate: .*finite"),
        ("backbone: m\nlearning_rate: .nan", r"learning_rate: "),
        ("backbone: m\ntemperature: -1.0", r"temperature: .*greater than 0"),
        ("backbone: m\nalpha: 1.5", r"alpha: .*less than or equal to 1"),
        ("backbone: m\nobjective: hinge", r"objective: unknown objective 'hinge': expected one of \['bt'"),
        ("backbone: m\nschedule: linear", r"schedule: .*'constant' or 'cosine'"),
        ("backbone: m\nnormalization: l2", r"normalization: .*'minmax'"),
        ("backbone: m\npooling: cls", r"pooling: .*'mean' or 'last'"),
        ("backbone: m\nepochs: 0", r"epochs: .*greater than or equal to 1"),
        ("backbone: m\nepochs: 2.5", r"epochs: .*valid integer"),
        ("backbone: m\nbf16: 'yes'", r"bf16: .*valid boolean"),
        ("backbone: m\nheld_out_share: 1.0", r"held_out_share: .*less than 1"),
        ("backbone: m\nepochs: 1\nepochs: 2", r"key 'epochs' stands twice"),
        ("- backbone", r"holds no mapping"),
        ("", r"holds no mapping"),
        ("backbone: [", r"not valid YAML"),
    ],
)
def test_a_mistake_is_named_by_its_key(tmp_path: Path, text: str, message: str) -> None:
    """With the file, and the line where there is one."""
    with pytest.raises(ConfigurationError, match=rf"recipe\.yaml(:\d)?: {message}"):
        read_recipe(write(tmp_path, text))


def test_all_mistakes_are_said_at_once(tmp_path: Path) -> None:
    """One line each."""
    with pytest.raises(ConfigurationError) as caught:
        read_recipe(write(tmp_path, "backbone: m\nepochs: 0\nbeta1: 1.0"))
    lines = [line.removeprefix(str(tmp_path)) for line in str(caught.value).splitlines()]
    assert [line.split(": ")[:2] for line in lines] == [
        ["/recipe.yaml:3", "beta1"],
        ["/recipe.yaml:2", "epochs"],
    ]


def test_a_recipe_that_is_not_there_is_said(tmp_path: Path) -> None:
    """With the system's word."""
    with pytest.raises(ConfigurationError, match=r"absent\.yaml: cannot be read: No such file"):
        read_recipe(tmp_path / "absent.yaml")


def test_the_rate_rises_in_the_warm_up_and_then_stays() -> None:
    """Constant: the full rate from the end of the warm-up on."""
    recipe = FineTuneRecipe(backbone="m", warmup_share=0.25, schedule="constant")
    assert [recipe.rate_factor(step, 8) for step in range(8)] == [0.5] + [1.0] * 7


def test_the_cosine_falls_from_the_full_rate_towards_zero() -> None:
    """After the warm-up; a run of one step has one at the full rate."""
    recipe = FineTuneRecipe(backbone="m", warmup_share=0.2, schedule="cosine")
    factors = [recipe.rate_factor(step, 10) for step in range(10)]
    assert factors[:3] == [0.5, 1.0, 1.0]
    assert all(after < before for before, after in pairwise(factors[2:]))
    assert math.isclose(factors[6], 0.5)
    assert 0 < factors[-1] < 0.05
    assert FineTuneRecipe(backbone="m", warmup_share=0.0, schedule="cosine").rate_factor(0, 1) == 1.0
