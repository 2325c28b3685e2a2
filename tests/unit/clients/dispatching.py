"""What the tests of the dispatcher share: assignments, scripts, and one answer at a time."""

from clients.dispatcher import Dispatcher, DispatchOptions
from clients.errors import (
    CacheError,
)
from clients.registry import Registry
from clients.retry import RetryPolicy
from clients.testing import FakeTeacher
from clients.types import Assignment, Prompt, TeacherSpec

AT_ONCE = RetryPolicy(uniform=lambda _low, _high: 0.0)
NOWHERE = "http://127.0.0.1:1/v1"


class Recorder:
    """A ``DispatchObserver`` that keeps what it is told."""

    def __init__(self):
        self.calls, self.cache, self.n_cache_failures = [], [], 0

    def upstream_called(self, teacher_id, outcome, latency_s):
        assert latency_s >= 0.0
        self.calls.append((teacher_id, outcome))

    def cache_used(self, outcome):
        self.cache.append(outcome)

    def cache_failed(self):
        self.n_cache_failures += 1


class BrokenCache:
    """A ``ResponseCache`` that fails at everything."""

    async def get(self, key):
        raise CacheError("down")

    async def put(self, entry):
        raise CacheError("down")


def spec_of(base_url=NOWHERE, teacher_id="a", **fields):
    return TeacherSpec(**{"id": teacher_id, "base_url": base_url, "model": "m", "timeout_s": 5.0, **fields})


def assign(text="hi", teacher="a", **fields):
    return Assignment(Prompt(f"p-{text}", ({"role": "user", "content": text},)), teacher, **fields)


def in_turn(*replies):
    """A script that gives each reply once, then the last one again."""
    return lambda _body, n_call: replies[min(n_call, len(replies)) - 1]


async def answer_one(specs, assignment=None, options=None, **parts):
    """Answer one assignment with a dispatcher made for it."""
    async with Registry(specs if isinstance(specs, list) else [specs]) as registry:
        dispatcher = Dispatcher(registry, **{"retry": AT_ONCE, **parts})
        return await dispatcher.answer(assignment or assign(), options or DispatchOptions())


async def answer_script(script, options=None, **fields):
    """Answer one assignment by a teacher with this script; the outcome and the teacher."""
    with FakeTeacher(script) as teacher:
        return await answer_one(spec_of(teacher.base_url, **fields), options=options), teacher
