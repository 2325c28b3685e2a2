"""The share of a corpus that a teacher may have: ``TEACHER=MIN..MAX`` as text."""

import math
from dataclasses import dataclass

from router_model.errors import StrategyError

_GRAMMAR = (
    "expected TEACHER=MIN..MAX, each end a percentage (10%) or a fraction (0.1) from 0 to 100%, either end "
    "left out if open, such as big=5%..20%, big=0.05.. or big=..20%"
)


@dataclass(frozen=True, slots=True)
class ShareRange:
    """A teacher's share of the prompts, both ends in [0, 1]."""

    teacher: str
    least: float = 0.0
    most: float = 1.0

    def counts(self, n_prompts: int) -> tuple[int, int]:
        """The least and the greatest whole number of prompts; the first may exceed the second."""
        # 0.07 * 100 is 7.000000000000001: a share meant to be whole must not be rounded past itself.
        return math.ceil(self.least * n_prompts - 1e-9), math.floor(self.most * n_prompts + 1e-9)


def parse_share(text: str) -> ShareRange:
    """The share that a text such as ``big=10%..30%`` states. Teacher ids may hold ``=``: the last one counts.

    Raises:
        StrategyError: The text is no such share.
    """
    teacher, equals, ends = text.rpartition("=")
    least_text, dots, most_text = ends.partition("..")
    if not (teacher and equals and dots) or not (least_text.strip() or most_text.strip()):
        raise StrategyError(f"{text!r} is no share: {_GRAMMAR}")
    least, most = _end(text, least_text, 0.0), _end(text, most_text, 1.0)
    if least > most:
        raise StrategyError(f"{text!r} is no share: its least end is above its greatest")
    return ShareRange(teacher, least, most)


def _end(whole: str, text: str, if_open: float) -> float:
    number = text.strip()
    if not number:
        return if_open
    try:
        share = float(number[:-1]) / 100 if number.endswith("%") else float(number)
    except ValueError:
        share = math.nan
    if not 0.0 <= share <= 1.0:
        raise StrategyError(f"{whole!r} is no share: {number!r} is out of place; {_GRAMMAR}")
    return share
