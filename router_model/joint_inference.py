"""Routers that share a backbone share its forward pass: each prompt is read once, for all of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from router_model.backbone import Backbone, Encoded
from router_model.inference import Router
from router_model.outlook import RouterOutput
from router_model.pooling import Features
from router_model.tokenization import PromptEncoding
from router_model.views import View


@dataclass(frozen=True, slots=True)
class Job:
    """One prompt for one router."""

    router: Router
    prompt: PromptEncoding


@dataclass(frozen=True, slots=True)
class ScoredPrompt:
    """One prompt's row in the output of the batch it was scored in."""

    output: RouterOutput
    row: int


def answer_jobs(backbone: Backbone, jobs: Sequence[Job]) -> list[ScoredPrompt]:
    """What each job's router says of its prompt, in the order of the jobs.

    Args:
        backbone: That of all routers; their views of it may differ.

    Raises:
        RouterError: A prompt's features hold NaN or infinity.
    """
    places: dict[tuple[int, ...], int] = {}
    for job in jobs:
        places.setdefault(tuple(job.prompt.ids), len(places))
    distinct = {places[tuple(job.prompt.ids)]: job.prompt for job in jobs}
    views = list(dict.fromkeys(view for job in jobs for view in job.router.backbone.views))
    features_BD = backbone.with_views(views).features([distinct[place] for place in range(len(distinct))])
    scored: dict[int, ScoredPrompt] = {}
    for router in {id(job.router): job.router for job in jobs}.values():
        own = [index for index, job in enumerate(jobs) if job.router is router]
        prompts = [jobs[index].prompt for index in own]
        rows = [places[tuple(prompt.ids)] for prompt in prompts]
        output = router.answer(Encoded.of(prompts, _seen(features_BD[rows], views, router)))
        scored |= {index: ScoredPrompt(output, row) for row, index in enumerate(own)}
    return [scored[index] for index in range(len(jobs))]


def _seen(features_BD: Features, views: Sequence[View], router: Router) -> Features:
    """The columns of a router's own views."""
    own = router.backbone.views
    if tuple(views) == own:
        return features_BD
    blocks = np.split(features_BD, len(views), axis=1)
    return np.concatenate([blocks[views.index(view)] for view in own], axis=1)
