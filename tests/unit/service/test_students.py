"""Students: which teachers a router may have, and what a prompt takes of a batch."""

import pytest
from structlog.testing import capture_logs

from clients.errors import ConfigurationError
from clients.types import StudentSpec
from service.errors import UnknownStudentError
from service.students import Students, _estimated_tokens, _require_known_teachers
from tests.unit.service.test_routing import manifest

SPEC = StudentSpec("tiny", "runs/tiny/checkpoint")


def test_teachers_that_the_project_lacks_stop_the_start() -> None:
    """Every teacher of the checkpoint that the project does not define is named."""
    with pytest.raises(ConfigurationError, match=r"runs/tiny/checkpoint.*: b, c;"):
        _require_known_teachers(SPEC, manifest(), ["a", "z"])


def test_teachers_that_the_router_lacks_are_logged() -> None:
    """A teacher that was not in training cannot be chosen; the log says so and the start goes on."""
    with capture_logs() as entries:
        _require_known_teachers(SPEC, manifest(), ["c", "b", "a", "new"])
    assert [(entry["event"], entry["teachers"]) for entry in entries] == [("teachers_not_routable", ["new"])]


@pytest.mark.parametrize(("n_chars", "n_tokens"), [(1, 1), (40, 11), (10**6, 64)])
def test_a_long_prompt_costs_no_more_than_what_is_read_of_it(n_chars: int, n_tokens: int) -> None:
    """A prompt takes about a token per four characters, up to the limit of the backbone."""
    assert _estimated_tokens("x" * n_chars, max_tokens=64) == n_tokens


def test_an_empty_set_knows_nobody() -> None:
    """A student id is never invented."""
    with pytest.raises(UnknownStudentError):
        Students([]).get("tiny")
