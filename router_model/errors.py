"""The branch of the error tree that belongs to the router and everything offline."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clients.errors import PersynError


class RouterError(PersynError):
    """Root of the errors of ``router_model``."""


class CheckpointError(RouterError):
    """A checkpoint is missing, tampered with, or does not fit what it is used with."""


class StrategyError(RouterError):
    """A strategy, an alpha or a set of teachers that a checkpoint cannot serve."""


class BackboneError(RouterError):
    """A model that encodes prompts or judges responses cannot be loaded or used."""


class QualityError(RouterError):
    """A prompt row lacks what the quality scorer needs, or holds it malformed."""


class PipelineError(RouterError):
    """A stage of a run cannot go on; what it has finished is kept on disk."""


class InfeasiblePlanError(PipelineError):
    """A budget or shares that no plan for the corpus can keep to."""


class TableError(RouterError):
    """A score table or a prompt file is malformed.

    Args:
        path: The file.
        line: 1-based row or line, if one is at fault.
        reason: What is wrong and what was expected.
    """

    def __init__(
        self,
        path: str | Path,
        reason: str,
        *,
        line: int | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        where = f"{path}" if line is None else f"{path}:{line}"
        super().__init__(f"{where}: {reason}", details=details)
        self.path = str(path)
        self.line = line
        self.reason = reason
