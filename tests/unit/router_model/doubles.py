"""Doubles for the evaluation's tests: a router's output without a router."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from router_model.checkpoint import Manifest
from router_model.model import TeacherSummary
from tests.unit.router_model.worlds import make_manifest

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class FakeOutlook:
    """What a router would say at one alpha."""

    strengths_BM: FloatArray
    helps: bool = True
    conformal_width: float | None = None
    coverage: float | None = None


@dataclass(frozen=True, eq=False)
class FakeOutput:
    """Outlooks that were thought out, by alpha."""

    own: FakeOutlook
    """At the checkpoint's alpha."""
    others: Mapping[float, FakeOutlook]
    out_of_distribution_B: NDArray[np.bool_]

    @property
    def any_alpha(self) -> bool:
        """Whether other outlooks were given."""
        return bool(self.others)

    def at(self, alpha: float | None = None) -> FakeOutlook:
        """The outlook that was given for this alpha."""
        return self.own if alpha is None else self.others[alpha]


def fake_output(
    strengths_BM: FloatArray, *, others: Mapping[float, FakeOutlook] | None = None, **outlook: Any
) -> FakeOutput:
    """An output with these strengths at the checkpoint's alpha."""
    nothing_new = np.zeros(len(strengths_BM), dtype=np.bool_)
    return FakeOutput(FakeOutlook(strengths_BM, **outlook), others or {}, nothing_new)


class PlannedManifest(Manifest):
    """A manifest whose best single teacher is the first up to alpha 0.5, and the second above."""

    def best_single(self, alpha: float) -> int:
        """Column of that teacher."""
        return 0 if alpha <= 0.5 else 1


def planned_manifest(
    teachers: Sequence[TeacherSummary], *, family: str | None = None, alpha: float = 0.4, **changes: Any
) -> PlannedManifest:
    """A manifest that knows its best single teacher at any alpha."""
    plain = make_manifest(teachers, family=family, alpha=alpha)
    known = {item.name: getattr(plain, item.name) for item in dataclasses.fields(Manifest)}
    return PlannedManifest(**{**known, **changes})
