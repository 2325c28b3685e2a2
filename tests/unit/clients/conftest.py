"""What the tests of `clients` share: waiting for another thread, and completions to cache."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from clients.types import Completion, Usage

Until = Callable[[Callable[[], bool]], Awaitable[None]]


@pytest.fixture
def until() -> Until:
    """Wait for a condition that another thread or task brings about; fail after 10 s."""

    async def wait(condition: Callable[[], bool]) -> None:
        for _ in range(5000):
            if condition():
                return
            await asyncio.sleep(0.002)
        pytest.fail("the condition did not come true within 10 s")

    return wait


@pytest.fixture
def completion() -> Callable[..., Completion]:
    """Build a completion with one choice per content."""

    def build(*contents: str, finish_reason: str = "stop") -> Completion:
        choices = tuple(
            {
                "index": index,
                "message": {"role": "assistant", "content": text},
                "finish_reason": finish_reason,
            }
            for index, text in enumerate(contents or ("fine",))
        )
        return Completion(choices, "m-served", Usage(3, 4, 7), "2026-01-01T00:00:00.000+00:00", "fp-1")

    return build
