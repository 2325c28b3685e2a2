"""The pages say what the code does."""

import re
from pathlib import Path

from router_model.constraints import parse_constraints
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
