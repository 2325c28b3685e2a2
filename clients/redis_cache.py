"""What all replicas share, in Redis: responses of teachers, and what routers said of prompts."""

import asyncio
from collections.abc import Awaitable, Mapping, Sequence
from typing import Any

import redis.asyncio as redis
from redis.exceptions import RedisError

from clients.cache import KEY_SCHEMA_VERSION, CachedResponse, decode_entry, encode_entry
from clients.errors import CacheError

_MAX_CONNECTIONS = 64


class RedisCache:
    """A ``ResponseCache`` that all replicas share.

    Args:
        url: ``redis://`` or ``rediss://``.
        ttl_s: Seconds for which an entry is served.
        timeout_s: A slower Redis counts as failed, connecting and waiting for a free connection included;
            the caller goes on without it.
    """

    def __init__(self, url: str, *, ttl_s: float, timeout_s: float = 1.0) -> None:
        self._ttl_s = ttl_s
        self._timeout_s = timeout_s
        self._redis = _connect(url, timeout_s)

    async def get(self, key: str) -> CachedResponse | None:
        """See ``ResponseCache.get``."""
        payload = await _answer(self._redis.get(self._name(key)), "read", self._timeout_s)
        return decode_entry(key, payload) if isinstance(payload, bytes) else None

    async def put(self, entry: CachedResponse) -> None:
        """See ``ResponseCache.put``."""
        ttl_s = max(1, int(self._ttl_s))
        command = self._redis.set(self._name(entry.key), encode_entry(entry), ex=ttl_s)
        await _answer(command, "written", self._timeout_s)

    async def ping(self) -> None:
        """See ``ResponseCache.ping``."""
        await _answer(self._redis.ping(), "reached", self._timeout_s)

    async def aclose(self) -> None:
        """Close the connections."""
        await self._redis.aclose()

    @staticmethod
    def _name(key: str) -> str:
        return f"persyn:response:v{KEY_SCHEMA_VERSION}:{key}"


class RedisRows:
    """Rows of bytes under binary keys, which all replicas share: what a router said of prompts.

    Args:
        url: ``redis://`` or ``rediss://``.
        ttl_s: Seconds for which a row is kept.
        timeout_s: A slower Redis counts as failed. Short: a router is soon asked anew.
    """

    def __init__(self, url: str, *, ttl_s: float, timeout_s: float = 0.1) -> None:
        self._ttl_s = max(1, int(ttl_s))
        self._timeout_s = timeout_s
        self._redis = _connect(url, timeout_s)

    async def get_many(self, keys: Sequence[bytes]) -> dict[bytes, bytes]:
        """The rows that there are, by key.

        Raises:
            CacheError: Redis cannot be reached or does not answer in time.
        """
        values = await _answer(self._redis.mget([_row_name(key) for key in keys]), "read", self._timeout_s)
        return {key: value for key, value in zip(keys, values, strict=True) if isinstance(value, bytes)}

    async def put_many(self, rows: Mapping[bytes, bytes]) -> None:
        """Keep rows.

        Raises:
            CacheError: Redis cannot be reached or does not answer in time.
        """
        async with self._redis.pipeline(transaction=False) as pipeline:
            for key, row in rows.items():
                pipeline.set(_row_name(key), row, ex=self._ttl_s)
            await _answer(pipeline.execute(), "written", self._timeout_s)

    async def aclose(self) -> None:
        """Close the connections."""
        await self._redis.aclose()


def _row_name(key: bytes) -> str:
    return f"persyn:decision:{key.hex()}"


def _connect(url: str, timeout_s: float) -> "redis.Redis":
    # Blocking: more callers than connections wait for one, they do not fail.
    pool = redis.BlockingConnectionPool.from_url(
        url,
        max_connections=_MAX_CONNECTIONS,
        timeout=timeout_s,
        socket_timeout=timeout_s,
        socket_connect_timeout=timeout_s,
        decode_responses=False,
    )
    return redis.Redis.from_pool(pool)


async def _answer(command: Awaitable[Any], verb: str, timeout_s: float) -> Any:
    try:
        async with asyncio.timeout(timeout_s):
            return await command
    except (RedisError, OSError) as error:
        reason = str(error) or f"no answer within {timeout_s:g} s"
        raise CacheError(f"Redis cannot be {verb}: {reason}") from error
