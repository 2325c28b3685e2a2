"""A router's output and manifest with planted numbers: what choosing a teacher reads, and no more."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clients.types import RoutingDecision
from router_model.checkpoint import StudentFacts
from router_model.decision import decide
from router_model.errors import StrategyError
from router_model.model import TeacherSummary
from router_model.strategies import RouteOptions

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class PlantedOutlook:
    """The router at one alpha, for one prompt."""

    alpha: float
    strengths_BM: FloatArray
    expected_reward_BM: FloatArray
    members_EBM: FloatArray
    helps: bool = True
    conformal_width: float | None = None
    coverage: float | None = None


@dataclass(frozen=True)
class PlantedOutput:
    """The router's output for one prompt; ``outlooks`` by alpha, ``None`` for that of the checkpoint."""

    outlooks: Mapping[float | None, PlantedOutlook]
    quality_BM: FloatArray
    learnability_BM: FloatArray
    input_tokens_B: NDArray[np.int64] = field(default_factory=lambda: np.array([7]))
    truncated_B: NDArray[np.bool_] = field(default_factory=lambda: np.array([False]))
    out_of_distribution_B: NDArray[np.bool_] = field(default_factory=lambda: np.array([False]))

    def at(self, alpha: float | None = None) -> PlantedOutlook:
        """The planted outlook of an alpha; one that was not planted cannot be served."""
        try:
            return self.outlooks[alpha]
        except KeyError:
            raise StrategyError(f"alpha = {alpha} cannot be served") from None


@dataclass(frozen=True)
class PlantedManifest:
    """The mean reward of a teacher is (1 - alpha) * mean quality + alpha * mean learnability."""

    teachers: tuple[TeacherSummary, ...]
    student: StudentFacts
    alpha: float = 0.4
    learnability: str = "mean_logprob"
    checkpoint_id: str = "c0ffee"

    def teachers_beyond(self, known: Collection[str]) -> list[str]:
        """Ids of the teachers that ``known`` does not hold."""
        return [teacher.id for teacher in self.teachers if teacher.id not in known]

    def mean_reward(self, alpha: float) -> FloatArray:
        """By the teachers' means, M."""
        return np.array(
            [
                (1 - alpha) * teacher.mean_quality + alpha * (teacher.mean_learnability or 0.0)
                for teacher in self.teachers
            ]
        )


def planted_outlook(
    strengths: Sequence[float],
    *,
    alpha: float = 0.4,
    members: Sequence[Sequence[float]] = (),
    width: float | None = None,
    coverage: float | None = None,
) -> PlantedOutlook:
    """An outlook on one prompt; ``members`` are the strengths of each ensemble member."""
    strengths_BM = np.array([strengths], dtype=np.float64)
    members_EBM = np.array(members, dtype=np.float64).reshape(len(members), 1, strengths_BM.shape[1])
    return PlantedOutlook(
        alpha, strengths_BM, strengths_BM / 10, members_EBM, conformal_width=width, coverage=coverage
    )


def planted_output(
    strengths: Sequence[float] | Mapping[float | None, Sequence[float]],
    *,
    n_input_tokens: int = 7,
    is_foreign: bool = False,
    **facts: Any,
) -> Any:
    """An output for one prompt with these strengths, or with these at each alpha; ``facts`` of the outlook.

    Nothing is known of learnability. ``Any``, because it stands for a ``RouterOutput``.
    """
    by_alpha = strengths if isinstance(strengths, Mapping) else {None: strengths, 0.4: strengths}
    outlooks = {
        alpha: planted_outlook(values, alpha=0.4 if alpha is None else alpha, **facts)
        for alpha, values in by_alpha.items()
    }
    n_teachers = len(next(iter(by_alpha.values())))
    return PlantedOutput(
        outlooks,
        np.zeros((1, n_teachers)),
        np.full((1, n_teachers), np.nan),
        np.array([n_input_tokens]),
        np.array([False]),
        np.array([is_foreign]),
    )


def planted_manifest(teachers: Sequence[TeacherSummary], *, family: str | None = None, **facts: Any) -> Any:
    """A manifest with these teachers. ``Any``, because it stands for a ``Manifest``."""
    return PlantedManifest(tuple(teachers), StudentFacts("student", family), **facts)


def decided(manifest: Any, output: Any, prompt_id: str = "p", **options: Any) -> RoutingDecision:
    """The decision for the one prompt of ``output``; ``options`` of ``RouteOptions``."""
    return decide(manifest, output, 0, prompt_id, RouteOptions(**options))
