"""Routing decisions for a list of prompts, offline, and the record of how they were made."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from clients.types import Price, Prompt, RoutingDecision, TeacherSpec
from router_model.checkpoint import Manifest
from router_model.decision import Chooser
from router_model.embedding_cache import encode_all
from router_model.errors import CheckpointError
from router_model.inference import Router
from router_model.strategies import RouteOptions
from router_model.tokenization import prompt_text


def known_prices(specs: Sequence[TeacherSpec]) -> dict[str, Price]:
    """Prices by teacher id, of the teachers for which the project file states one."""
    return {spec.id: spec.price for spec in specs if spec.price is not None}


def require_known_teachers(manifest: Manifest, specs: Sequence[TeacherSpec]) -> None:
    """Raise ``CheckpointError`` if the router chooses among teachers that the project does not name."""
    unknown = manifest.teachers_beyond({spec.id for spec in specs})
    if unknown:
        raise CheckpointError(
            f"the router was trained with teachers that the project file does not name: {', '.join(unknown)}"
        )


def decide_all(
    router: Router,
    prompts: Sequence[Prompt],
    options: RouteOptions,
    *,
    progress: Callable[[int], Any] | None = None,
) -> list[RoutingDecision]:
    """The decision for each prompt, in order.

    Args:
        progress: Called with the number of prompts encoded since the last call.

    Raises:
        UnknownTeacherError: An option names a teacher that the router does not know.
        StrategyError: The router cannot serve the strategy, the alpha or the cost.
    """
    texts = [prompt_text(prompt.messages) for prompt in prompts]
    output = router.answer(encode_all(router.backbone, texts, progress=progress))
    chooser = Chooser(router.manifest, options)
    return [chooser.decide(output, row, prompt.id) for row, prompt in enumerate(prompts)]


def way_of_choosing(manifest: Manifest, options: RouteOptions, *, has_budget: bool = False) -> dict[str, Any]:
    """The options as JSON. Prices are among them only where cost counts: else they may change."""
    cost_counts = has_budget or options.cost_weight > 0
    chosen = {name: value for name, value in asdict(options).items() if cost_counts or name != "prices"}
    chosen["alpha"] = manifest.alpha if options.alpha is None else options.alpha
    allowed, excluded = chosen.pop("teachers"), chosen.pop("exclude")
    chosen["allowed_teachers"] = None if allowed is None else sorted(allowed)
    chosen["excluded_teachers"] = sorted(excluded)
    return chosen
