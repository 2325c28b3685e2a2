"""Routing decisions for a list of prompts, offline."""

from collections.abc import Sequence

from clients.types import Price, Prompt, RoutingDecision, TeacherSpec
from router_model.decision import decide
from router_model.embedding_cache import encode_all
from router_model.inference import Router
from router_model.strategies import RouteOptions
from router_model.tokenization import prompt_text


def known_prices(specs: Sequence[TeacherSpec]) -> dict[str, Price]:
    """Prices by teacher id, of the teachers for which the project file states one."""
    return {spec.id: spec.price for spec in specs if spec.price is not None}


def decide_all(router: Router, prompts: Sequence[Prompt], options: RouteOptions) -> list[RoutingDecision]:
    """The decision for each prompt, in order.

    Raises:
        UnknownTeacherError: An option names a teacher that the router does not know.
        StrategyError: The router cannot serve the strategy, the alpha or the cost.
    """
    output = router.answer(encode_all(router.backbone, [prompt_text(prompt.messages) for prompt in prompts]))
    return [decide(router.manifest, output, row, prompt.id, options) for row, prompt in enumerate(prompts)]
