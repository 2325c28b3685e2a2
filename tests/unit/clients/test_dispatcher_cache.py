"""The dispatcher with a cache that works, and with one that does not."""

import asyncio
import json
from dataclasses import replace

import pytest

from clients.dispatcher import Dispatcher, DispatchOptions
from clients.redis_cache import RedisCache
from clients.registry import Registry
from clients.sqlite_cache import SqliteCache
from clients.testing import FakeTeacher, Reply
from clients.types import Answered, Failed, Price
from tests.unit.clients.dispatching import (
    AT_ONCE,
    BrokenCache,
    Recorder,
    answer_one,
    assign,
    in_turn,
    spec_of,
)


@pytest.fixture
async def cache(tmp_path):
    cache = SqliteCache(tmp_path / "cache.sqlite", ttl_s=60.0)
    yield cache
    await cache.aclose()


async def test_hit_keeps_usage_and_provenance_and_costs_nothing(cache):
    """The second call is served from the cache, reports the first one's facts, and its own reasons."""
    observer = Recorder()
    with FakeTeacher(in_turn(Reply(status=500), Reply("fine"))) as teacher:
        async with Registry([spec_of(teacher.base_url, price=Price(1.0, 1.0))]) as registry:
            dispatcher = Dispatcher(registry, cache=cache, retry=AT_ONCE, observer=observer)
            first = await dispatcher.answer(assign(strategy="persyn"), DispatchOptions())
            again = await dispatcher.answer(assign(strategy="random"), DispatchOptions())
    assert len(teacher.requests) == 2
    assert (first.provenance.cache, again.provenance.cache) == ("miss", "hit")
    assert first.provenance.cost_usd > 0.0
    expected = replace(first.provenance, cache="hit", cost_usd=0.0, strategy="random")
    assert replace(again.provenance, latency_s=first.provenance.latency_s) == expected
    assert again.provenance.attempts == 2
    assert again.completion == first.completion
    assert observer.cache == ["miss", "hit"]
    assert len(observer.calls) == 2


async def test_hits_survive_a_dead_teacher(cache):
    """What has been answered once is served while the teacher is down."""
    with FakeTeacher() as teacher:
        spec = spec_of(teacher.base_url)
        await answer_one(spec, cache=cache)
    assert (await answer_one(spec, cache=cache)).provenance.cache == "hit"


async def test_refresh_asks_again_and_overwrites(cache):
    """``refresh`` does not read the cache and leaves the new answer in it."""
    with FakeTeacher(in_turn(Reply("old"), Reply("new"))) as teacher:
        spec = spec_of(teacher.base_url)
        await answer_one(spec, cache=cache)
        refreshed = await answer_one(spec, options=DispatchOptions(cache="refresh"), cache=cache)
        after = await answer_one(spec, cache=cache)
    assert (refreshed.completion.content, refreshed.provenance.cache) == ("new", "refresh")
    assert (after.completion.content, after.provenance.cache) == ("new", "hit")


async def test_off_neither_reads_nor_writes(cache):
    """``off`` leaves the cache as it is."""
    observer = Recorder()
    with FakeTeacher(in_turn(Reply("one"), Reply("two"), Reply("three"))) as teacher:
        spec = spec_of(teacher.base_url)
        off = DispatchOptions(cache="off")
        contents = [
            (await answer_one(spec, options=options, cache=cache, observer=observer)).completion.content
            for options in (off, DispatchOptions(), off, DispatchOptions())
        ]
    assert contents == ["one", "two", "three", "two"]
    assert observer.cache == ["off", "miss", "off", "hit"]


@pytest.mark.parametrize(
    "reply",
    [
        Reply("cut", finish_reason="length"),
        Reply("blocked", finish_reason="content_filter"),
        Reply("  \n"),
        Reply(
            raw=json.dumps(
                {"choices": [{"message": {"tool_calls": [{"id": "1"}]}, "finish_reason": "tool_calls"}]}
            ).encode()
        ),
    ],
    ids=["truncated", "filtered", "blank", "tool call"],
)
async def test_incomplete_answers_are_given_but_not_stored(cache, reply):
    """An answer that is not whole is returned as it is and asked for anew the next time."""
    with FakeTeacher(in_turn(reply)) as teacher:
        spec = spec_of(teacher.base_url)
        outcomes = [await answer_one(spec, cache=cache) for _ in range(2)]
    assert [outcome.provenance.cache for outcome in outcomes] == ["miss", "miss"]
    assert len(teacher.requests) == 2


async def test_failures_are_not_stored(cache):
    """A failed prompt is asked for anew the next time."""
    with FakeTeacher(in_turn(Reply(status=400), Reply("fine"))) as teacher:
        spec = spec_of(teacher.base_url)
        assert isinstance(await answer_one(spec, cache=cache), Failed)
        assert (await answer_one(spec, cache=cache)).completion.content == "fine"


async def test_vendor_numbers_do_not_break_the_cache(cache):
    """An answer with an infinite log probability is stored and served like any other."""
    raw = b'{"choices": [{"message": {"content": "x"}, "finish_reason": "stop", "logprobs": [-Infinity]}]}'
    with FakeTeacher(in_turn(Reply(raw=raw))) as teacher:
        spec = spec_of(teacher.base_url)
        first, again = [await answer_one(spec, cache=cache) for _ in range(2)]
    assert again.provenance.cache == "hit"
    assert again.completion == first.completion


async def test_broken_cache_costs_nothing_but_the_cache():
    """With a cache that fails at reading and writing, prompts are answered and both failures counted."""
    observer = Recorder()
    with FakeTeacher() as teacher:
        outcome = await answer_one(spec_of(teacher.base_url), cache=BrokenCache(), observer=observer)
    assert isinstance(outcome, Answered)
    assert observer.n_cache_failures == 2


@pytest.mark.parametrize("fault", ["down", "slow"])
async def test_broken_redis_costs_nothing_but_the_cache(fault):
    """A Redis that is down, or does not answer in time, is passed by and counted."""
    observer, hang_up = Recorder(), asyncio.Event()

    async def say_nothing(_reader, writer):
        await hang_up.wait()
        writer.close()

    async with await asyncio.start_server(say_nothing, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1] if fault == "slow" else 1
        cache = RedisCache(f"redis://127.0.0.1:{port}/0", ttl_s=60.0, timeout_s=0.1)
        with FakeTeacher() as teacher:
            outcome = await answer_one(spec_of(teacher.base_url), cache=cache, observer=observer)
        hang_up.set()
        await cache.aclose()
    assert isinstance(outcome, Answered)
    assert outcome.provenance.cache == "miss"
    assert observer.n_cache_failures == 2
