"""The embedded response cache: one SQLite file, used from one thread of its own."""

import asyncio
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from clients.cache import CachedResponse, decode_entry, encode_entry
from clients.errors import CacheError

Result = TypeVar("Result")

_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS response (key TEXT PRIMARY KEY, entry BLOB NOT NULL, expires_s REAL NOT NULL)"
)


class SqliteCache:
    """A ``ResponseCache`` in a file that several processes may share (WAL).

    Args:
        path: The file; its folder is created.
        ttl_s: Seconds for which an entry is served.
    """

    def __init__(self, path: Path, *, ttl_s: float) -> None:
        self._path = path
        self._ttl_s = ttl_s
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="persyn-cache")
        self._connection: sqlite3.Connection | None = None

    async def get(self, key: str) -> CachedResponse | None:
        """See ``ResponseCache.get``."""
        row = await self._call(
            lambda db: db.execute(
                "SELECT entry FROM response WHERE key = ? AND expires_s > ?", (key, time.time())
            ).fetchone()
        )
        return None if row is None else decode_entry(key, row[0])

    async def put(self, entry: CachedResponse) -> None:
        """See ``ResponseCache.put``."""
        payload, now_s = encode_entry(entry), time.time()

        def write(db: sqlite3.Connection) -> None:
            with db:
                db.execute("DELETE FROM response WHERE expires_s <= ?", (now_s,))
                db.execute(
                    "INSERT OR REPLACE INTO response VALUES (?, ?, ?)",
                    (entry.key, payload, now_s + self._ttl_s),
                )

        await self._call(write)

    async def ping(self) -> None:
        """See ``ResponseCache.ping``."""
        await self._call(lambda db: db.execute("SELECT 1 FROM response LIMIT 1").fetchone())

    async def aclose(self) -> None:
        """Close the file."""

        def close() -> None:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

        await asyncio.get_running_loop().run_in_executor(self._thread, close)
        self._thread.shutdown()

    def _open(self) -> sqlite3.Connection:
        if self._connection is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            connection = sqlite3.connect(self._path, timeout=5.0)
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
            connection.execute(_SCHEMA)
            connection.execute("CREATE INDEX IF NOT EXISTS response_expires ON response (expires_s)")
            self._connection = connection
        return self._connection

    async def _call(self, work: Callable[[sqlite3.Connection], Result]) -> Result:
        def run() -> Result:
            try:
                return work(self._open())
            except (sqlite3.Error, OSError) as error:
                raise CacheError(f"the cache file {str(self._path)!r} cannot be used: {error}") from error

        return await asyncio.get_running_loop().run_in_executor(self._thread, run)
