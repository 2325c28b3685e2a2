"""What a lane does with a batch: it tokenises what is not yet tokenised, then each router answers."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

from router_model.backbone import Backbone
from router_model.inference import Router
from router_model.joint_inference import Job, ScoredPrompt, answer_jobs

LONGEST_TEXT = 4000
"""Characters of a text that a lane tokenises: less than a millisecond's work."""
_CHARS_PER_TOKEN = 4


@dataclass(slots=True, eq=False)
class TextJob:
    """A prompt that comes while nothing else is done.

    The lane tokenises it: the way to another thread and back takes longer than that.
    """

    router: Router
    text: str
    tokenise_s: float = 0.0
    """How long that took, once it is done."""


class BackboneWork:
    """The work of the batches of one backbone, on whichever lane."""

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone
        self._tokenizer = backbone.tokenizer.clone()
        self._tokenising = threading.Lock()

    def __call__(self, jobs: Sequence[Job | TextJob]) -> Sequence[ScoredPrompt]:
        """See ``joint_inference.answer_jobs``."""
        return answer_jobs(
            self._backbone, [self._tokenised(job) if isinstance(job, TextJob) else job for job in jobs]
        )

    def _tokenised(self, job: TextJob) -> Job:
        started_s = perf_counter()
        with self._tokenising:
            (prompt,) = self._tokenizer.encode([job.text])
        job.tokenise_s = perf_counter() - started_s
        return Job(job.router, prompt)


def n_tokens(job: Job | TextJob) -> int:
    """What a job costs of a batch's budget; of a text, about."""
    if isinstance(job, TextJob):
        return 1 + len(job.text) // _CHARS_PER_TOKEN
    return max(1, len(job.prompt.ids))
