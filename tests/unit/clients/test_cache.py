"""The response cache: what counts as the same request, what is stored, and both stores of it."""

import asyncio
import contextlib
import json
import time
import zlib
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
import redis.asyncio as redis
from hypothesis import given
from hypothesis import strategies as st

from clients import redis_cache as redis_module
from clients import sqlite_cache as sqlite_module
from clients.cache import CachedResponse, decode_entry, encode_entry, may_store, response_key
from clients.errors import CacheError
from clients.redis_cache import RedisCache
from clients.sqlite_cache import SqliteCache
from clients.teacher import request_body
from clients.types import TeacherSpec

SPEC = TeacherSpec(
    id="a",
    base_url="http://127.0.0.1:9/v1",
    model="m",
    system_prompt="Be brief.",
    sampling={"temperature": 0.5, "seed": 0, "top_p": 1, "max_tokens": 10, "n": 1, "stop": ["x"]},
    extra_body={"top_k": 5, "chat_template_kwargs": {"enable_thinking": False}},
)
MESSAGES = ({"role": "user", "content": "hi"},)


def _key(spec=SPEC, messages=MESSAGES, sampling=None):
    return response_key(spec, request_body(spec, messages, sampling or {}))


# --- keys


@pytest.mark.parametrize("name", sorted(request_body(SPEC, MESSAGES, {})))
def test_every_member_of_the_body_is_part_of_the_key(name):
    """Changing or removing any member of the effective request gives another key."""
    body = request_body(SPEC, MESSAGES, {})
    without = {other: value for other, value in body.items() if other != name}
    keys = {
        response_key(SPEC, body),
        response_key(SPEC, without),
        response_key(SPEC, {**body, name: "other"}),
    }
    assert len(keys) == 3


@pytest.mark.parametrize(
    "change",
    [
        {"id": "b"},
        {"base_url": "http://127.0.0.1:10/v1"},
        {"model": "m2"},
        {"system_prompt": "Be long."},
        {"system_prompt": None},
        {"sampling": {**SPEC.sampling, "seed": 1}},
        {"extra_body": {}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_defines_a_teacher_is_part_of_the_key(change):
    """Another teacher, address, model, system prompt or parameter never gets this one's answers."""
    assert _key(replace(SPEC, **change)) != _key()


@pytest.mark.parametrize(
    "sampling",
    [{"temperature": 0}, {"seed": False}, {"logprobs": True}, {"new_vendor_option": 1}, {"stop": ["y"]}],
)
def test_the_callers_parameters_are_part_of_the_key(sampling):
    """A parameter of the caller, known or not, gives another key."""
    assert _key(sampling=sampling) != _key()


def test_messages_are_part_of_the_key():
    """Text, role and order of the turns count."""
    turns = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"})
    chats = [
        MESSAGES,
        turns,
        turns[::-1],
        ({"role": "user", "content": "hi "},),
        ({**MESSAGES[0], "name": "x"},),
    ]
    assert len({_key(messages=chat) for chat in chats}) == len(chats)


def test_what_does_not_reach_the_answer_is_not_part_of_the_key():
    """A new API key, price, or an explicit null of the caller keeps the cache."""
    assert _key(replace(SPEC, api_key="rotated", timeout_s=1.0, family="f")) == _key()
    assert _key(sampling={"temperature": None}) == _key()


def test_key_does_not_depend_on_the_order_of_members():
    """The same request written in another order is the same request."""
    body = request_body(SPEC, MESSAGES, {})
    shuffled = {name: body[name] for name in sorted(body, reverse=True)}
    shuffled["messages"] = [dict(reversed(turn.items())) for turn in body["messages"]]
    assert response_key(SPEC, shuffled) == response_key(SPEC, body)


# --- what may be stored


@pytest.mark.parametrize(
    ("contents", "finish_reason", "stored"),
    [
        (("fine",), "stop", True),
        (("a", "b"), "stop", True),
        (("cut off",), "length", False),
        (("",), "stop", False),
        ((" \n",), "stop", False),
        (("a", ""), "stop", False),
        (("",), "tool_calls", False),
        (("blocked",), "content_filter", False),
    ],
)
def test_only_whole_answers_may_be_stored(completion, contents, finish_reason, stored):
    """Truncated, filtered, empty and tool-only answers must be asked for again."""
    assert may_store(completion(*contents, finish_reason=finish_reason)) is stored


def test_one_truncated_choice_spoils_the_answer(completion):
    """All choices must be whole."""
    whole, cut = completion("a"), completion("b", finish_reason="length")
    assert not may_store(replace(whole, choices=(*whole.choices, *cut.choices)))


# --- entries


@given(content=st.text(), attempts=st.integers(1, 9), latency_s=st.floats(0, 1e4))
def test_entries_survive_the_round_trip(content, attempts, latency_s):
    """What was stored is what is read, for every text."""
    entry = _entry(content, attempts=attempts, latency_s=latency_s)
    assert decode_entry("k", encode_entry(entry)) == entry


def _entry(content="fine", *, key="k", attempts=2, latency_s=0.5):
    fields = {"key": key, "attempts": attempts, "latency_s": latency_s}
    completion = {
        "choices": [{"message": {"role": "assistant", "content": content}, "finish_reason": "stop"}],
        "served_model": "m-1",
        "usage": {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7},
        "created": "2026-01-01T00:00:00.000+00:00",
        "system_fingerprint": None,
    }
    entry = decode_entry(key, zlib.compress(json.dumps({**fields, "completion": completion}).encode()))
    assert entry is not None
    return entry


def _packed(value):
    return zlib.compress(json.dumps(value).encode())


DAMAGE = {
    "empty": b"",
    "not compressed": b'{"key": "k"}',
    "cut off": encode_entry(_entry())[:-4],
    "not JSON": zlib.compress(b"<html>"),
    "not UTF-8": zlib.compress(b'"\xff"'),
    "no object": _packed(["k"]),
    "no completion": _packed({"key": "k", "attempts": 1, "latency_s": 0.1}),
    "null completion": _packed({"key": "k", "attempts": 1, "latency_s": 0.1, "completion": None}),
    "older form": _packed({"key": "k", "completion": {"usage": {"tokens": 1}, "choices": []}}),
    "another key": encode_entry(_entry(key="other")),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_or_foreign_payload_is_no_entry(damage):
    """A payload that is not the whole entry of this key reads as absent and raises nothing."""
    assert decode_entry("k", DAMAGE[damage]) is None


# --- the stores


class SqliteStore:
    """A SQLite cache and a way behind its back."""

    def __init__(self, path):
        self.path = path
        self.cache = SqliteCache(path, ttl_s=60.0)

    async def tamper(self, key, payload):
        await self.cache._call(
            lambda db: db.execute("UPDATE response SET entry = ? WHERE key = ?", (payload, key))
        )

    async def age(self, monkeypatch, seconds):
        """Let ``seconds`` pass."""
        now_s = time.time()
        monkeypatch.setattr(sqlite_module.time, "time", lambda: now_s + seconds)


class RedisStore:
    """A Redis cache and a way behind its back."""

    def __init__(self, url):
        self.url = url
        self.cache = RedisCache(url, ttl_s=60.0)

    async def tamper(self, key, payload):
        async with redis.Redis.from_url(self.url) as direct:
            await direct.set(RedisCache._name(key), payload, keepttl=True)

    async def age(self, _monkeypatch, seconds):
        """Take ``seconds`` off the life of every entry."""
        async with redis.Redis.from_url(self.url) as direct:
            for name in await direct.keys("persyn:response:*"):
                await direct.pexpire(name, await direct.pttl(name) - int(seconds * 1000))


@pytest.fixture(params=["sqlite", "redis"])
async def store(request, tmp_path):
    if request.param == "sqlite":
        store = SqliteStore(tmp_path / "new folder" / "cache.sqlite")
    else:
        store = RedisStore(request.getfixturevalue("redis_url"))
        async with redis.Redis.from_url(store.url) as direct:
            await direct.flushdb()
    yield store
    await store.cache.aclose()


async def test_store_gives_back_what_it_was_given(store):
    """An entry is found under its key and under no other."""
    entry = _entry("naïve \U0001f600 text", key="k1")
    await store.cache.ping()
    await store.cache.put(entry)
    assert await store.cache.get("k1") == entry
    assert await store.cache.get("k2") is None


async def test_store_overwrites(store):
    """The last entry put under a key is the one found."""
    await store.cache.put(_entry("old"))
    await store.cache.put(_entry("new"))
    assert (await store.cache.get("k")).completion.content == "new"


async def test_store_forgets_after_its_time_to_live(store, monkeypatch):
    """An entry is served until its time is over and not after."""
    await store.cache.put(_entry())
    await store.age(monkeypatch, 50)
    assert await store.cache.get("k") is not None
    await store.age(monkeypatch, 61)
    assert await store.cache.get("k") is None


@pytest.mark.parametrize("damage", DAMAGE)
async def test_store_treats_damage_as_a_miss_and_heals(store, damage):
    """A damaged or foreign entry is a miss, and a new answer replaces it."""
    await store.cache.put(_entry())
    await store.tamper("k", DAMAGE[damage])
    assert await store.cache.get("k") is None
    await store.cache.put(_entry("again"))
    assert (await store.cache.get("k")).completion.content == "again"


async def test_store_takes_many_callers_at_once(store):
    """Hundreds of concurrent reads and writes all succeed and do not mix."""
    entries = [_entry(f"answer {n}", key=f"k{n}") for n in range(300)]
    await asyncio.gather(*(store.cache.put(entry) for entry in entries))
    assert await asyncio.gather(*(store.cache.get(entry.key) for entry in entries)) == entries


async def test_cancelled_commands_give_no_caller_anothers_value(store, monkeypatch):
    """After a storm of cancelled reads every read still returns its own entry."""
    monkeypatch.setattr(redis_module, "_MAX_CONNECTIONS", 4)
    cache = RedisCache(store.url, ttl_s=60.0, timeout_s=5.0) if isinstance(store, RedisStore) else store.cache
    entries = [_entry(f"answer {n}", key=f"k{n}") for n in range(20)]
    for entry in entries:
        await cache.put(entry)
    n_cancelled = 0
    for round_ in range(40):
        tasks = [asyncio.create_task(cache.get(entry.key)) for entry in entries]
        for _ in range(round_ % 8):  # let them get to a different point each time
            await asyncio.sleep(0)
        for task in tasks[round_ % 2 :: 2]:
            n_cancelled += task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        served = [(r, e) for r, e in zip(results, entries, strict=True) if not isinstance(r, BaseException)]
        assert all(result == entry for result, entry in served)
        assert await asyncio.gather(*(cache.get(entry.key) for entry in entries)) == entries
    assert n_cancelled > 100
    if cache is not store.cache:
        await cache.aclose()


async def test_sqlite_file_is_shared_and_kept(tmp_path):
    """Two caches on one file see each other's entries, and a later process finds them."""
    path = tmp_path / "cache.sqlite"
    first, second = SqliteCache(path, ttl_s=60.0), SqliteCache(path, ttl_s=60.0)
    await first.put(_entry("one", key="k1"))
    await second.put(_entry("two", key="k2"))
    assert (await second.get("k1")).completion.content == "one"
    assert (await first.get("k2")).completion.content == "two"
    await first.aclose()
    await second.aclose()
    third = SqliteCache(path, ttl_s=60.0)
    assert await third.get("k1") is not None
    await third.aclose()


async def test_sqlite_drops_expired_entries_from_the_file(tmp_path, monkeypatch):
    """The file does not grow with entries that nobody can read any more."""
    cache = SqliteCache(tmp_path / "cache.sqlite", ttl_s=60.0)
    for n in range(5):
        await cache.put(_entry(key=f"old{n}"))
    now_s = time.time() + 61
    monkeypatch.setattr(sqlite_module.time, "time", lambda: now_s)
    await cache.put(_entry(key="new"))
    rows = await cache._call(lambda db: db.execute("SELECT key FROM response").fetchall())
    assert rows == [("new",)]
    await cache.aclose()


@pytest.mark.parametrize("obstacle", ["a folder", "not a database", "a file above it"])
async def test_sqlite_that_cannot_be_used_is_a_cache_error(tmp_path, obstacle):
    """Every operation on an unusable file raises the one error that the dispatcher expects."""
    path = tmp_path / "cache.sqlite"
    if obstacle == "a folder":
        path.mkdir()
    else:
        path.write_bytes(b"this is not a database, it is a text of some length" * 100)
    cache = SqliteCache(path / "below" if obstacle == "a file above it" else path, ttl_s=60.0)
    for operation in (cache.get("k"), cache.put(_entry()), cache.ping()):
        with pytest.raises(CacheError, match="cannot be used"):
            await operation
    await cache.aclose()


async def test_redis_that_is_down_is_a_cache_error():
    """Every operation on an absent Redis raises the one error that the dispatcher expects."""
    cache = RedisCache("redis://127.0.0.1:1/0", ttl_s=60.0)
    for operation in (cache.get("k"), cache.put(_entry()), cache.ping()):
        with pytest.raises(CacheError, match="Redis cannot be"):
            await operation
    await cache.aclose()


@asynccontextmanager
async def _slow_redis(redis_url, step_s):
    """A way to the real Redis on which every request takes ``step_s`` seconds."""
    port = redis_url.split(":")[2].split("/")[0]

    async def pump(reader, writer, delay_s):
        with contextlib.suppress(ConnectionError), contextlib.closing(writer):
            while data := await reader.read(65536):
                await asyncio.sleep(delay_s)
                writer.write(data)
                await writer.drain()

    async def serve(reader, writer):
        redis_reader, redis_writer = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(pump(reader, redis_writer, step_s), pump(redis_reader, writer, 0.0))

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0"


async def test_slow_redis_is_waited_for_within_its_time_out(redis_url):
    """A Redis that takes its time, but less than the time-out, serves its entries."""
    async with _slow_redis(redis_url, 0.05) as url:
        cache = RedisCache(url, ttl_s=60.0, timeout_s=10.0)
        await cache.put(_entry(key="slow"))
        assert await cache.get("slow") == _entry(key="slow")
        await cache.aclose()


@pytest.mark.parametrize("step_s", [0.15, 60.0], ids=["each step in time", "silent"])
async def test_slow_redis_is_given_up_at_its_time_out(redis_url, step_s):
    """The time-out holds for the whole operation, connecting included, not for each step of it."""
    async with _slow_redis(redis_url, step_s) as url:
        cache = RedisCache(url, ttl_s=60.0, timeout_s=0.2)
        async with asyncio.timeout(5.0):
            with pytest.raises(CacheError, match="Redis cannot be read"):
                await cache.get("k")
            with pytest.raises(CacheError, match="Redis cannot be written"):
                await cache.put(_entry())
        await cache.aclose()


async def test_redis_entries_carry_their_schema_version_and_expiry(redis_url):
    """Entries are namespaced by the version of their form and never live for ever."""
    cache = RedisCache(redis_url, ttl_s=60.0)
    await cache.put(_entry(key="versioned"))
    async with redis.Redis.from_url(redis_url) as direct:
        assert 0 < await direct.pttl("persyn:response:v1:versioned") <= 60_000
    await cache.aclose()


def test_cached_response_keeps_what_a_hit_reports(completion):
    """Usage, attempts and latency of the first answer are part of an entry."""
    entry = CachedResponse("k", completion("x"), attempts=3, latency_s=1.25)
    again = decode_entry("k", encode_entry(entry))
    assert (again.completion.usage, again.attempts, again.latency_s) == (entry.completion.usage, 3, 1.25)
