"""``route_many`` of the Python clients against a real service, its model scripted."""

import itertools
import socket
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from clients.errors import ServiceResponseError
from clients.persyn import AsyncPersynClient, PersynClient
from clients.retry import RetryPolicy
from clients.schemas import RoutedItem, UnroutedItem
from tests.integration.serving import Served, until
from tests.integration.streaming import ScriptedModel, scripted_service

N_PROMPTS = 10_000


@pytest.fixture(scope="module")
def scripted(
    checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Served, ScriptedModel]]:
    """A service on a scripted model."""
    with scripted_service(checkpoint, tmp_path_factory.mktemp("scripted")) as running:
        yield running


def prompts() -> Iterator[Any]:
    """Prompts of all forms; every thousandth has no text, every other thousandth is very long."""
    for number in range(1, N_PROMPTS + 1):
        if number % 1000 == 0:
            yield ""
        elif number % 1000 == 500:
            yield {"id": f"p{number}", "prompt": "long " * 100_000}
        else:
            yield {"id": f"p{number}", "messages": [{"role": "user", "content": f"Prompt {number}"}]}


def assert_whole(items: list[RoutedItem | UnroutedItem]) -> None:
    """One item for each of ``prompts``, in order."""
    assert [item.line for item in items] == list(range(1, N_PROMPTS + 1))
    for item in items:
        if item.line % 1000:
            assert isinstance(item, RoutedItem)
            assert item.id == f"p{item.line}"
        else:
            assert isinstance(item, UnroutedItem)
            assert item.error.detail == "the prompt has no text"


def test_the_blocking_client(scripted: tuple[Served, ScriptedModel]) -> None:
    """Every prompt gets its item, in order; long prompts and unusable ones among them."""
    served, _ = scripted
    with PersynClient(served.base_url) as client:
        assert_whole(list(client.route_many(prompts())))


async def test_the_asynchronous_client(scripted: tuple[Served, ScriptedModel]) -> None:
    """The same, from an asynchronous source."""
    served, _ = scripted

    async def source() -> AsyncIterator[Any]:
        for prompt in prompts():
            yield prompt

    async with AsyncPersynClient(served.base_url) as client:
        assert_whole([item async for item in client.route_many(source())])


async def test_options_reach_the_service_and_refusals_the_caller(
    scripted: tuple[Served, ScriptedModel],
) -> None:
    """Options are those of ``route``; one that cannot be served is one error, before any item."""
    served, _ = scripted
    options: dict[str, Any] = {"exclude": ["novice", "poet"], "seed": 7, "alpha": 0.5}
    with PersynClient(served.base_url) as client:
        (item,) = client.route_many(["x"], **options)
        assert isinstance(item, RoutedItem)
        assert set(item.distribution) == {"calculator"}
        for refused in ({"teachers": []}, {"alpha": 2}, {"strategy": "strong", "temperature": 1.0}):
            with pytest.raises(ServiceResponseError) as refusal:
                next(client.route_many(itertools.repeat("x"), **refused))
            assert (refusal.value.status, refusal.value.retryable) == (422, False)


def test_interactive_calls_go_first(scripted: tuple[Served, ScriptedModel]) -> None:
    """A call of another client is in the next batch, whatever waits of ten thousand prompts."""
    served, model = scripted
    model.gate.clear()
    services = served.app.state.services
    (student,) = services.students
    with (
        PersynClient(served.base_url) as client,
        PersynClient(served.base_url) as other,
        ThreadPoolExecutor(2) as pool,
    ):
        many = pool.submit(lambda: list(client.route_many(f"p{n}" for n in range(N_PROMPTS))))
        until(lambda: services.bulk.n_in_work == 1024)
        until(lambda: bool(student.served.batcher.busy_s))
        n_before = len(model.lengths)
        call = pool.submit(other.route, "Now, please. " * 50)
        until(lambda: bool(student.served.batcher._queue.n_calls("interactive")))
        model.gate.set()
        assert call.result().decisions[0].teacher
        assert len(many.result()) == N_PROMPTS
    on_the_thread, then = model.lengths[n_before : n_before + 2]
    assert max(on_the_thread) < 10
    assert max(then) > 100


def test_a_restart_of_the_service_costs_no_item(checkpoint: Path, tmp_path: Path) -> None:
    """The service goes away with windows on their way and comes back: every prompt is answered once."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    patient = RetryPolicy(max_attempts=1000, base_s=0.05, cap_s=0.2)
    with PersynClient(f"http://127.0.0.1:{port}") as client:
        items = client.route_many(prompts(), retry=patient, in_flight=3)
        with scripted_service(checkpoint, tmp_path, port=port):
            taken = list(itertools.islice(items, 3000))
        with scripted_service(checkpoint, tmp_path, port=port):
            taken += items
    assert_whole(taken)
