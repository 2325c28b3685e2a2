"""The shared response cache: Redis."""

import asyncio
from collections.abc import Awaitable
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
        # Blocking: more callers than connections wait for one, they do not fail.
        pool = redis.BlockingConnectionPool.from_url(
            url,
            max_connections=_MAX_CONNECTIONS,
            timeout=timeout_s,
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            decode_responses=False,
        )
        self._redis = redis.Redis.from_pool(pool)

    async def get(self, key: str) -> CachedResponse | None:
        """See ``ResponseCache.get``."""
        payload = await self._within_timeout(self._redis.get(self._name(key)), "read")
        return decode_entry(key, payload) if isinstance(payload, bytes) else None

    async def put(self, entry: CachedResponse) -> None:
        """See ``ResponseCache.put``."""
        ttl_s = max(1, int(self._ttl_s))
        await self._within_timeout(
            self._redis.set(self._name(entry.key), encode_entry(entry), ex=ttl_s), "written"
        )

    async def ping(self) -> None:
        """See ``ResponseCache.ping``."""
        await self._within_timeout(self._redis.ping(), "reached")

    async def aclose(self) -> None:
        """Close the connections."""
        await self._redis.aclose()

    async def _within_timeout(self, command: Awaitable[Any], verb: str) -> Any:
        try:
            async with asyncio.timeout(self._timeout_s):
                return await command
        except (RedisError, OSError) as error:
            reason = str(error) or f"no answer within {self._timeout_s:g} s"
            raise CacheError(f"Redis cannot be {verb}: {reason}") from error

    @staticmethod
    def _name(key: str) -> str:
        return f"persyn:response:v{KEY_SCHEMA_VERSION}:{key}"
