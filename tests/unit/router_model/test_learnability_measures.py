"""The measures of learnability, on numbers that can be worked out by hand."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router_model.learnability_measures import (
    local_logprob,
    mean_logprob,
    rank_surprisal,
    step_lengths,
    step_starts,
)

LOGPROBS = np.log([0.5, 0.25, 0.125])


def test_mean_logprob_is_the_mean_in_nats() -> None:
    """Half, a quarter and an eighth: two bits each on average."""
    assert mean_logprob(LOGPROBS) == pytest.approx(-2 * math.log(2))
    assert math.isnan(mean_logprob(np.array([])))


def test_rank_surprisal_is_a_ratio_of_sums_and_not_a_mean_of_ratios() -> None:
    """Ranks 1, 2, 9 over 6 bits of surprisal; the mean of the three ratios would be another number."""
    assert rank_surprisal(LOGPROBS, np.array([1, 2, 9])) == pytest.approx(12 / (6 * math.log(2)))


def test_ranks_are_clipped_at_one_hundred() -> None:
    """Rank 100 counts in full, 101 and 49152 count as 100."""
    one = np.array([math.log(0.001)])
    at, above, far = (rank_surprisal(one, np.array([rank])) for rank in (100, 101, 49152))
    assert at == above == far == pytest.approx(100 / math.log(1000))
    assert rank_surprisal(one, np.array([99])) < at


def test_rank_surprisal_without_surprisal_is_undefined() -> None:
    """No tokens, or tokens that the student was certain of: there is nothing to divide by."""
    assert math.isnan(rank_surprisal(np.array([]), np.array([], dtype=np.int64)))
    assert math.isnan(rank_surprisal(np.zeros(3), np.ones(3, dtype=np.int64)))


def test_every_step_counts_alike_in_the_local_measure() -> None:
    """A step of one token weighs as much as one of three."""
    assert local_logprob([np.array([-3.0]), np.array([-1.0, -1.0, -1.0])]) == pytest.approx(-2.0)
    assert math.isnan(local_logprob([]))


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("one\ntwo\n", ["one\n", "two\n"]),
        ("\n\none\r\n \r\n  two", ["\n\none\r\n \r\n", "  two"]),
        ("It is 3.5. So, e.g. Mr. X goes! Done.", ["It is 3.5. ", "So, e.g. Mr. X goes! ", "Done."]),
        ("First. Second.\nOther line.", ["First. Second.\n", "Other line."]),
        ("no end", ["no end"]),
        ("", [""]),
        (" \n ", [" \n "]),
    ],
)
def test_steps_are_lines_or_else_sentences(text: str, steps: list[str]) -> None:
    """Lines that are not blank; sentences of a response of one line; together they are the whole text."""
    bounds = [*step_starts(text), len(text)]
    assert [text[start:end] for start, end in itertools.pairwise(bounds)] == steps


@given(st.text(alphabet="aB. !?\n\r1"))
def test_steps_begin_at_zero_and_rise(text: str) -> None:
    """Whatever the text, its steps are in order and within it."""
    starts = step_starts(text)
    assert starts[0] == 0
    assert all(first < second for first, second in itertools.pairwise(starts))
    assert starts[-1] <= len(text)


def test_a_token_belongs_to_the_step_in_which_it_begins() -> None:
    """Tokens at 0, 3, 8, 9 and steps at 0, 4, 5, 9: the step at 4 has no token, so it is no step."""
    assert step_lengths([0, 4, 5, 9], [0, 3, 8, 9]) == [2, 1, 1]
    assert step_lengths([0, 40], [0, 3, 8]) == [3]
    assert step_lengths([0], []) == []
