"""Measures of learnability: what is made of the log-probabilities and ranks of a response's tokens.

T is the number of response tokens. ``logprobs_T`` holds log p(y_t | y_<t, x) under the student, in nats;
``ranks_T`` holds 1 plus the number of vocabulary tokens with a strictly greater logit. Sums are in float64.
"""

import math
import re
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from router_model.constraints import sentence_starts

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

MAX_RANK = 100
"""Greater ranks count as this (arXiv 2601.14249): among tokens without chance the rank is noise."""

CONTEXT_STEPS = 4
"""Steps before its own that a step is judged with (k of arXiv 2510.03988)."""

_LINE = re.compile(r"[^\r\n]+")


def mean_logprob(logprobs_T: FloatArray) -> float:
    """Mean log-probability, nats per token, at most 0; NaN without tokens. PerSyn, equation (1)."""
    return float(logprobs_T.mean()) if len(logprobs_T) else math.nan


def rank_surprisal(logprobs_T: FloatArray, ranks_T: IntArray) -> float:
    """Rank-Surprisal Ratio (arXiv 2601.14249): ``sum_t min(rank_t, 100) / sum_t -log p_t``.

    Returns:
        Rank per nat, above 0; lower is closer to the student. Low for responses of tokens that stand high in
        the student's order although it gives them little probability. NaN without tokens, or if the student
        was certain of every one.
    """
    surprisal = -float(logprobs_T.sum())
    return float(np.minimum(ranks_T, MAX_RANK).sum()) / surprisal if surprisal > 0 else math.nan


def local_logprob(steps: Sequence[FloatArray]) -> float:
    """Local average log-probability (arXiv 2510.03988): the mean over steps of the mean over their tokens.

    Args:
        steps: Log-probabilities of each step's tokens, given the prompt and the last ``CONTEXT_STEPS`` steps.

    Returns:
        Nats per token, at most 0; NaN without steps.
    """
    return float(np.mean([step.mean() for step in steps])) if steps else math.nan


def step_starts(text: str) -> list[int]:
    """Character at which each step of a response begins; the first begins at 0.

    Steps are the lines that are not blank, or the sentences if there is one such line. Blank lines belong to
    the step before them.
    """
    lines = [match.start() for match in _LINE.finditer(text) if match[0].strip()]
    return [0, *lines[1:]] if len(lines) > 1 else sentence_starts(text)


def step_lengths(starts: Sequence[int], token_starts: Sequence[int]) -> list[int]:
    """Number of tokens of each step. A step in which no token begins is left out.

    Args:
        starts: From ``step_starts``.
        token_starts: Character at which each token begins, not decreasing.
    """
    bounds = [0, *np.searchsorted(token_starts, starts[1:]).tolist(), len(token_starts)]
    return [end - start for start, end in pairwise(bounds) if end > start]
