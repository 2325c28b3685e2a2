"""The pages say what the code does."""

import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from clients.schemas import (
    DecisionBody,
    Problem,
    ProvenanceBody,
    RouteRequest,
    RouteResponse,
    SynthesisSummary,
    SynthesizeRequest,
    SynthesizeResponse,
    TeacherState,
)
from clients.types import STRATEGIES
from router_model.constraints import parse_constraints
from service.api.examples import ROUTE_REQUESTS, ROUTE_RESPONSE, SYNTHESIZE_REQUESTS
from service.settings import PREFIX, Settings

DOCS = Path(__file__).parents[3] / "docs"


def test_the_settings_table_is_that_of_the_code() -> None:
    """docs/operations.md lists every setting with its description, and no other."""
    text = (DOCS / "operations.md").read_text()
    rows = re.findall(rf"^\| `({PREFIX}\w+)` \| .*? \| (.*) \|$", text, flags=re.MULTILINE)
    assert dict(rows) == {
        PREFIX + name.upper(): field.description for name, field in Settings.model_fields.items()
    }


def test_the_constraint_kinds_of_the_page_exist() -> None:
    """Every kind in the table of docs/training.md is one that the scorer knows."""
    table = (DOCS / "training.md").read_text().split("Constraints:")[1].split("```")[0]
    kinds = re.findall(r"`(\w+)`", "".join(line.split("|")[1] for line in table.splitlines() if "|" in line))
    examples = {"words": ["x"], "value": "upper", "text": "x"}
    needs = {"required_words": "words", "forbidden_words": "words", "case": "value"}
    needs |= {"starts_with": "text", "ends_with": "text"}
    assert len(kinds) == 13
    for kind in kinds:
        params = (
            {needs[kind]: examples[needs[kind]]} if kind in needs else {} if kind == "json" else {"min": 1}
        )
        assert parse_constraints([{"kind": kind, **params}], prompt_id="p")


@pytest.mark.parametrize(
    "form",
    [
        RouteRequest,
        SynthesizeRequest,
        RouteResponse,
        DecisionBody,
        SynthesizeResponse,
        ProvenanceBody,
        SynthesisSummary,
        TeacherState,
        Problem,
    ],
)
def test_every_field_of_the_api_is_on_its_page(form: type[BaseModel]) -> None:
    """docs/api.md names each field that a caller may send or gets back, and each strategy."""
    words = set(re.findall(r"`(\w+)`", (DOCS / "api.md").read_text()))
    assert set(form.model_fields) - words == set()
    assert set(STRATEGIES) - words == set()


def test_the_examples_are_requests_and_answers() -> None:
    """What the OpenAPI document shows is what the service takes and gives, with every field of an answer."""
    for form, examples in ((RouteRequest, ROUTE_REQUESTS), (SynthesizeRequest, SYNTHESIZE_REQUESTS)):
        for example in examples.values():
            form.model_validate(example["value"])
    answer = RouteResponse.model_validate(ROUTE_RESPONSE)
    assert answer.model_dump() == ROUTE_RESPONSE
    for decision in answer.decisions:
        best, second = sorted(decision.strengths.values(), reverse=True)
        assert decision.margin == pytest.approx(best - second)
        assert sum(decision.distribution.values()) == pytest.approx(1.0)
