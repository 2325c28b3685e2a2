"""Routing decisions for a list of prompts, offline."""

from collections.abc import Sequence

from clients.types import Prompt, RoutingDecision
from router_model.inference import Router
from router_model.strategies import RouteOptions, decide
from router_model.tokenization import prompt_text

_BATCH = 256


def decide_all(router: Router, prompts: Sequence[Prompt], options: RouteOptions) -> list[RoutingDecision]:
    """The decision for each prompt, in order."""
    decisions: list[RoutingDecision] = []
    for start in range(0, len(prompts), _BATCH):
        batch = prompts[start : start + _BATCH]
        output = router.score([prompt_text(prompt.messages) for prompt in batch])
        decisions += [
            decide(router.manifest, output, row, prompt.id, options) for row, prompt in enumerate(batch)
        ]
    return decisions
