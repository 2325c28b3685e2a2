"""Regret against the number of labelled prompts: the power law behind it, and whether more labels pay."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

EXPONENTS = tuple(step / 20 for step in range(2, 21))
"""0.1, 0.15, ..., 1: slower is flat, faster than 1/n is not seen in learning."""
FACTORS = (2, 4)
MIN_POINTS = 3
_SIGNIFICANT = 3.84
"""95 % point of chi-squared with one degree of freedom."""
_EXACT = 1e-12
"""Variance of a curve without noise."""
_FURTHEST = 100
"""Times the labels beyond which an extrapolation says nothing."""


@dataclass(frozen=True, slots=True)
class PowerLaw:
    """``regret(n) = a + b * n**-c`` with a, b >= 0 (Cortes et al., NeurIPS 1993; Hestness et al., 2017)."""

    a: float
    """Regret that no number of labels takes away."""
    b: float
    c: float

    def at(self, n_prompts: float) -> float:
        """Expected regret with ``n_prompts`` labelled prompts."""
        return float(self.a + self.b * n_prompts**-self.c)

    def reaches(self, regret: float) -> float:
        """Number of labelled prompts at which the regret is expected; infinity if it never is."""
        if self.a >= regret or self.b == 0.0:
            return 0.0 if self.a <= regret else math.inf
        return float((self.b / (regret - self.a)) ** (1 / self.c))


def fit_power_law(n_prompts_P: FloatArray, regret_P: FloatArray, weight_P: FloatArray) -> PowerLaw:
    """Weighted least squares over a grid of exponents; a and b in closed form, held at or above 0.

    Args:
        n_prompts_P: Numbers of labelled prompts, above 0; P points.
        regret_P: Regret at each, at least 0.
        weight_P: Inverse variances, above 0.
    """
    fits = [
        (a, b, c)
        for c in EXPONENTS
        for a, b in _lines(n_prompts_P**-c, regret_P, weight_P)
        if a >= 0.0 and b >= 0.0
    ]
    errors = [_error(PowerLaw(*fit), n_prompts_P, regret_P, weight_P) for fit in fits]
    return PowerLaw(*fits[int(np.argmin(errors))])


def _lines(x_P: FloatArray, y_P: FloatArray, weight_P: FloatArray) -> list[tuple[float, float]]:
    """Least-squares lines ``y = a + b x``: free, through the origin, and level."""
    total = float(weight_P.sum())
    x_mean, y_mean = float(weight_P @ x_P) / total, float(weight_P @ y_P) / total
    spread = float(weight_P @ (x_P - x_mean) ** 2)
    slope = float(weight_P @ ((x_P - x_mean) * (y_P - y_mean))) / spread if spread > 0 else 0.0
    through_origin = float(weight_P @ (x_P * y_P)) / float(weight_P @ x_P**2)
    return [(y_mean - slope * x_mean, slope), (0.0, through_origin), (y_mean, 0.0)]


def _error(law: PowerLaw, n_prompts_P: FloatArray, regret_P: FloatArray, weight_P: FloatArray) -> float:
    return float(weight_P @ (regret_P - (law.a + law.b * n_prompts_P**-law.c)) ** 2)


def advise(label_curve: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Whether labelling more prompts would lower the regret, in numbers and in words.

    A fall counts only if the measured curve falls significantly (likelihood-ratio test against a level line)
    and the expected fall is greater than the noise: the standard error of the regret today, or what the law
    leaves unexplained. The points share their prompts, which makes the test cautious.

    Args:
        label_curve: Rows of ``n_prompts``, ``regret``, ``regret_se`` and ``best_single_regret``.

    Returns:
        ``state`` (``unknown``, ``flat`` or ``falling``), ``text``, ``n_more_labels`` (None unless falling),
        ``noise``, ``fit`` and ``expected`` at 2 and 4 times the labels.
    """
    rows = sorted(label_curve, key=lambda row: int(row["n_prompts"]))
    if len({row["n_prompts"] for row in rows}) < MIN_POINTS:
        text = f"Training has measured no label curve of {MIN_POINTS} points or more: nothing can be said."
        return _advice("unknown", text)
    n_prompts_P, regret_P, error_P = (
        np.array([row[name] for row in rows], dtype=np.float64)
        for name in ("n_prompts", "regret", "regret_se")
    )
    known = bool((error_P > 0).all())
    weight_P = 1 / error_P**2 if known else np.ones_like(regret_P)
    points = (n_prompts_P, regret_P, weight_P)
    law, level = fit_power_law(*points), PowerLaw(float(np.average(regret_P, weights=weight_P)), 0.0, 1.0)
    left = _error(law, *points)
    # What the power law cannot explain is noise too: a curve that fell faster has no future fall in it.
    variance = max(left / (len(rows) - 2), 1.0 if known else _EXACT)
    unexplained = math.sqrt(_error(law, n_prompts_P, regret_P, np.ones_like(regret_P)) / (len(rows) - 2))
    noise = max(float(error_P[-1]), unexplained)
    n_now = int(n_prompts_P[-1])
    expected = [_expected(law, factor, n_now) for factor in FACTORS]
    worth = [row for row in expected if row["fall"] > noise]
    is_falling = (_error(level, *points) - left) / variance > _SIGNIFICANT and bool(worth)
    n_more = worth[0]["n_prompts"] - n_now if is_falling else None
    return _advice(
        "falling" if is_falling else "flat",
        _words(law, n_now, expected, noise, n_more) + _rival(law, rows[-1]),
        n_more=n_more,
        noise=noise,
        law=law,
        expected=expected,
    )


def _advice(
    state: str,
    text: str,
    *,
    n_more: int | None = None,
    noise: float | None = None,
    law: PowerLaw | None = None,
    expected: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    return {
        "state": state,
        "text": text,
        "n_more_labels": n_more,
        "noise": noise,
        "fit": None if law is None else asdict(law),
        "expected": list(expected),
    }


def _expected(law: PowerLaw, factor: int, n_prompts: int) -> dict[str, Any]:
    regret = law.at(factor * n_prompts)
    return {
        "factor": factor,
        "n_prompts": factor * n_prompts,
        "regret": regret,
        "fall": law.at(n_prompts) - regret,
    }


def _words(
    law: PowerLaw, n_prompts: int, expected: Sequence[Mapping[str, Any]], noise: float, n_more: int | None
) -> str:
    ahead = " and ".join(
        f"{row['regret']:.3f} with {row['n_prompts']:,} (a fall of {row['fall']:.3f})" for row in expected
    )
    measured = (
        f"With {n_prompts:,} labelled prompts the regret is {law.at(n_prompts):.3f}; expected are {ahead}, "
        f"and the noise of the measurement is {noise:.3f}."
    )
    if n_more is None:
        return f"More labels would hardly pay: the curve is flat within its noise. {measured}"
    return f"More labels would pay: label about {n_more:,} prompts more. {measured}"


def _rival(law: PowerLaw, last: Mapping[str, Any]) -> str:
    """How far the router is from the best single teacher, if it does not beat it yet."""
    rival, n_prompts = float(last["best_single_regret"]), int(last["n_prompts"])
    if law.at(n_prompts) < rival:
        return ""
    n_needed = law.reaches(rival)
    if n_needed > _FURTHEST * n_prompts:
        return f" By this curve no number of labels brings it to the best single teacher ({rival:.3f})."
    return f" By this curve it meets the best single teacher ({rival:.3f}) at about {math.ceil(n_needed):,}."
