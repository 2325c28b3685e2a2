"""``route_many`` of both clients, against scripted HTTP."""

import asyncio
import itertools
import json
import math
import threading

import httpx
import pytest

from clients.errors import ServiceResponseError
from clients.persyn import AsyncPersynClient, PersynClient
from clients.retry import RetryPolicy
from clients.schemas import RoutedItem, UnroutedItem
from tests.unit.clients.test_persyn import DECISION

AT_ONCE = RetryPolicy(max_attempts=3, base_s=0.0)
ERROR = {"type": "t", "title": "t", "detail": "d", "source": "client", "retryable": False}


def answer(lines, *, error=None, n_lines=None):
    """What the service writes for the lines of a request, or for the first of them."""
    items = []
    for number, line in enumerate(lines[:n_lines], start=1):
        prompt = json.loads(line)
        if prompt == "bad":
            items.append({"id": None, "status": "error", "line": number, "error": ERROR})
        else:
            decided = {"id": str(prompt), "status": "ok", "line": number, "checkpoint_id": "c"}
            items.append(DECISION | decided)
    facts = {"checkpoint_id": "c", "student": "s", "strategy": "persyn", "alpha": 0.4, "coverage": None}
    counts = {"ok": len(items), "failed": 0, "lines": len(items)}
    items.append({**counts, **facts, "error": error})
    return b"".join(json.dumps(item).encode() + b"\n" for item in items)


def lines_of(request):
    return request.content.splitlines()


def well(request):
    """A service that is well."""
    return httpx.Response(200, content=answer(lines_of(request)))


@pytest.fixture(params=["blocking", "asynchronous", "asynchronous prompts"])
def route_many(request):
    """All items of ``route_many``, by one of the clients."""

    def blocking(handler, prompts, **options):
        with PersynClient("http://persyn", api_key="k", transport=httpx.MockTransport(handler)) as client:
            return list(client.route_many(prompts, **options))

    async def asynchronous(handler, prompts, **options):
        async def one_by_one():
            for prompt in prompts:
                yield prompt

        given = prompts if request.param == "asynchronous" else one_by_one()
        transport = httpx.MockTransport(handler)
        async with AsyncPersynClient("http://persyn", api_key="k", transport=transport) as client:
            return [item async for item in client.route_many(given, **options)]

    if request.param == "blocking":
        return blocking
    return lambda *args, **options: asyncio.run(asynchronous(*args, **options))


def test_prompts_go_out_in_windows_and_come_back_in_order(route_many):
    """Each request is NDJSON with the key and the options; an item for each prompt has its number."""
    requests = []

    def handler(request):
        requests.append(request)
        return well(request)

    prompts = [str(number) for number in range(1, 1301)]
    prompts[600] = "bad"
    items = route_many(handler, iter(prompts), alpha=0, teachers=["a", "b"], student=None)
    assert [item.line for item in items] == list(range(1, 1301))
    assert [type(item) for item in items[599:602]] == [RoutedItem, UnroutedItem, RoutedItem]
    assert [item.id for item in items if item.id] == [prompt for prompt in prompts if prompt != "bad"]
    assert sorted(len(lines_of(request)) for request in requests) == [276, 512, 512]
    for request in requests:
        assert request.url.path == "/route"
        assert request.url.params.multi_items() == [("alpha", "0"), ("teachers", "a"), ("teachers", "b")]
        assert request.headers["content-type"] == "application/x-ndjson"
        assert request.headers["authorization"] == "Bearer k"


def test_long_prompts_make_short_windows(route_many):
    """A window ends within a megabyte or with the prompt that passes it."""
    sizes = []

    def handler(request):
        sizes.append(len(lines_of(request)))
        return well(request)

    assert len(route_many(handler, ["x" * 300_000] * 9, in_flight=1)) == 9
    assert sizes == [4, 4, 1]


def test_nothing_to_do_is_no_request(route_many):
    """No prompt, no call."""
    assert route_many(lambda _request: pytest.fail("sent"), []) == []


def test_an_empty_allow_list_is_not_lost(route_many):
    """The service gets to see it and refuses; an empty exclusion is none."""

    def handler(request):
        assert request.url.params.multi_items() == [("teachers", "")]
        return httpx.Response(422, json={"detail": "too short"})

    with pytest.raises(ServiceResponseError, match="too short"):
        route_many(handler, ["x"], teachers=[], exclude=[])


def test_a_single_prompt_is_not_taken_apart():
    """A text is one prompt, not its letters."""
    with PersynClient("http://persyn", transport=httpx.MockTransport(well)) as client:
        assert len(list(client.route_many("abc"))) == 1


def test_a_prompt_that_is_no_json_never_leaves(route_many):
    """It is an error of the caller."""
    with pytest.raises(ValueError, match="JSON"):
        route_many(lambda _request: pytest.fail("sent"), [{"prompt": math.nan}])


@pytest.mark.parametrize(
    "failure",
    [
        httpx.ConnectError("refused"),
        httpx.RemoteProtocolError("the peer closed the connection"),
        httpx.Response(503, json={"detail": "starting", "retryable": True}),
        httpx.Response(429, json={"detail": "later", "retryable": True}, headers={"retry-after": "0"}),
        httpx.Response(502, content=b"<html>Bad gateway</html>"),
        httpx.Response(200, content=answer([b"1"]).splitlines(keepends=True)[0]),
        httpx.Response(200, content=b""),
        httpx.Response(200, content=answer([b"1", b"2"], error=ERROR | {"retryable": True}, n_lines=1)),
    ],
)
def test_a_window_that_failed_is_sent_again(route_many, failure):
    """Unreachable, overloaded, restarted or broken off: the same window again, and every item once."""
    n_calls = itertools.count()

    def handler(request):
        # Of the first two calls, both.
        if next(n_calls) < 2:
            if isinstance(failure, Exception):
                raise failure
            return httpx.Response(failure.status_code, content=failure.content, headers=failure.headers)
        return well(request)

    items = route_many(handler, [1, 2, 3], retry=AT_ONCE)
    assert [item.id for item in items] == ["1", "2", "3"]
    assert next(n_calls) == 3


def test_a_failure_that_lasts_is_told_after_what_was_answered():
    """The items before come first; the error says how many they are."""

    def handler(request):
        if b"513" in lines_of(request):
            raise httpx.ConnectError("refused")
        return well(request)

    items = []
    with PersynClient("http://persyn", transport=httpx.MockTransport(handler)) as client:
        many = client.route_many(range(1, 2000), retry=AT_ONCE)
        with pytest.raises(ServiceResponseError, match="refused") as raised:
            items.extend(many)
    assert raised.value.__notes__ == ["route_many: 512 prompts were answered, in order, before this"]
    assert len(items) == 512


@pytest.mark.parametrize(
    ("status", "content", "told"),
    [
        (401, json.dumps({"detail": "no key"}).encode(), "no key"),
        (200, b"<html>Sign in</html>", "form that this client does not know"),
        (200, b"{}\n", "form that this client does not know"),
        (200, answer([b"1"]), "other lines than were sent"),
        (200, answer([b"1", b"2", b"3"]), "other lines than were sent"),
        (200, answer([b"1", b"2"], error=ERROR, n_lines=1), "ended its answer early: d"),
    ],
)
def test_what_will_not_get_better_is_not_sent_again(route_many, status, content, told):
    """A refusal, a foreign answer or one for other lines is an error at once."""
    n_calls = itertools.count()

    def handler(_request):
        next(n_calls)
        return httpx.Response(status, content=content)

    with pytest.raises(ServiceResponseError, match=told) as raised:
        route_many(handler, [1, 2], retry=AT_ONCE)
    assert next(n_calls) == 1
    assert raised.value.status == status


def test_the_service_says_when_to_come_back(route_many):
    """``Retry-After`` is kept on the error."""

    def handler(_request):
        return httpx.Response(429, json={"detail": "later", "retryable": False}, headers={"retry-after": "7"})

    with pytest.raises(ServiceResponseError) as raised:
        route_many(handler, [1])
    assert raised.value.retry_after_s == 7


class TestBounds:
    """No more is read than is taken, and nothing runs on."""

    def test_prompts_are_read_as_items_are_taken(self):
        """With two windows on their way, two windows beyond the one that is read from have been read."""
        n_read = 0

        def prompts():
            nonlocal n_read
            for n_read in itertools.count(1):
                yield str(n_read)

        with PersynClient("http://persyn", transport=httpx.MockTransport(well)) as client:
            items = client.route_many(prompts(), in_flight=2)
            for number in range(1, 5001):
                assert next(items).line == number
                assert n_read <= (number // 512 + 3) * 512
            items.close()

    async def test_prompts_are_read_as_items_are_taken_asynchronously(self):
        """The same of the asynchronous twin."""
        n_read = 0

        async def prompts():
            nonlocal n_read
            for n_read in itertools.count(1):
                yield str(n_read)

        async with AsyncPersynClient("http://persyn", transport=httpx.MockTransport(well)) as client:
            items = client.route_many(prompts(), in_flight=2)
            for number in range(1, 5001):
                assert (await anext(items)).line == number
                assert n_read <= (number // 512 + 3) * 512
            await items.aclose()

    def test_windows_are_on_their_way_together(self):
        """As many requests at one time as were asked for, and no more."""
        meeting = threading.Barrier(3, timeout=30)
        n_open = []

        def handler(request):
            n_open.append(1)
            # Nobody is answered before three have come.
            meeting.wait()
            n_open.pop()
            return well(request)

        with PersynClient("http://persyn", transport=httpx.MockTransport(handler)) as client:
            assert len(list(client.route_many(range(512 * 6), in_flight=3))) == 512 * 6
        assert n_open == []

    async def test_who_takes_no_more_cancels_what_is_on_its_way(self):
        """Closing the asynchronous generator cancels its requests."""
        n_cancelled = 0

        async def handler(request):
            nonlocal n_cancelled
            if b"0" in lines_of(request):
                return well(request)
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                n_cancelled += 1
                raise

        async with AsyncPersynClient("http://persyn", transport=httpx.MockTransport(handler)) as client:
            items = client.route_many(range(10_000), in_flight=3)
            assert (await anext(items)).line == 1
            # The window that was read from makes room for one more when it is used up.
            await asyncio.sleep(0)
            await items.aclose()
        assert n_cancelled == 2

    def test_who_takes_no_more_does_not_wait(self):
        """Closing the generator ends the waiting between attempts."""
        waiting = threading.Event()

        def handler(request):
            if b"0" in lines_of(request):
                return well(request)
            waiting.set()
            raise httpx.ConnectError("refused")

        patient = RetryPolicy(base_s=3600.0, cap_s=3600.0, uniform=lambda _low, high: high)
        with PersynClient("http://persyn", transport=httpx.MockTransport(handler)) as client:
            items = client.route_many(range(1024), retry=patient, in_flight=2)
            assert next(items).line == 1
            assert waiting.wait(30)
            items.close()
        leaving = [thread for thread in threading.enumerate() if thread.name.startswith("persyn-route-many")]
        for thread in leaving:
            thread.join(30)
            assert not thread.is_alive()
