"""DecisionCache: a prompt that a router has seen costs no forward pass, here or in another replica."""

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Protocol
from weakref import WeakKeyDictionary

import structlog

from clients.errors import CacheError
from router_model.inference import Router
from router_model.joint_inference import ScoredPrompt
from router_model.prompt_outlook import OutlookForm
from service.batch_queue import Priority
from service.students import Scored, Student

logger = structlog.get_logger(__name__)

_ENTRY_OVERHEAD_BYTES = 250
"""Of Python, for a key, a row and their place in the order; measured with CPython 3.11."""
_PAUSE_S = 5.0
"""A store that failed is left alone for so long."""
_MAX_UNWRITTEN = 10_000
"""Rows that wait to be written to the store; more are not kept there."""
_WRITE_TOGETHER = 256
_EXAMPLE = "How does an answer look?"
_KEYS_TOGETHER = 64
"""Keys between two turns of the event loop."""

Permits = Callable[[int], AbstractContextManager[None]]


class RowStore(Protocol):
    """Where rows lie that all replicas share. Its failures are ``CacheError``."""

    async def get_many(self, keys: Sequence[bytes]) -> Mapping[bytes, bytes]:
        """The rows that there are."""

    async def put_many(self, rows: Mapping[bytes, bytes]) -> None:
        """Keep rows."""


class CacheObserver(Protocol):
    """Told of what is found; the service counts it."""

    def decisions_looked_up(self, n_hits: int, n_misses: int) -> None:
        """Prompts of a call were looked up."""

    def decision_cache_failed(self) -> None:
        """The shared store could not be used, or held a damaged row."""


class RowMemory:
    """Rows in this process, the least recently used given up first.

    Args:
        max_bytes: Of keys and rows, with what Python adds.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._rows: OrderedDict[bytes, bytes] = OrderedDict()
        self.n_bytes = 0

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, key: bytes) -> bytes | None:
        """The row, if it is here."""
        row = self._rows.get(key)
        if row is not None:
            self._rows.move_to_end(key)
        return row

    def put(self, key: bytes, row: bytes) -> None:
        """Keep a row."""
        if key in self._rows:
            return
        self._rows[key] = row
        self.n_bytes += len(row) + _ENTRY_OVERHEAD_BYTES
        while self.n_bytes > self._max_bytes:
            _, given_up = self._rows.popitem(last=False)
            self.n_bytes -= len(given_up) + _ENTRY_OVERHEAD_BYTES


@dataclass(slots=True)
class _Lookup:
    """The prompts of one call: their keys, and what is known by key."""

    keys: list[bytes]
    rows: dict[bytes, bytes] = field(default_factory=dict)
    errors: dict[bytes, Exception] = field(default_factory=dict)

    def missing(self, texts: Sequence[str]) -> dict[bytes, str]:
        """The prompts that nothing is known of, each once."""
        return {key: text for key, text in zip(self.keys, texts, strict=True) if key not in self.rows}


class DecisionCache:
    """Scores prompts by a student's router; those that were scored before without any work.

    What is kept is a row per prompt with what the router's heads say of it, from which a decision for any
    alpha and any options is made. Fresh prompts are decided from their row too, so that the first answer and
    a cached one are the same. Keys hold the checkpoint and the arithmetic: a reload makes new ones.

    Args:
        memory: Looked at first.
        store: Looked at next, if there is one. It may fail or be slow without harm.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        memory: RowMemory,
        store: RowStore | None,
        *,
        observer: CacheObserver,
        clock: Callable[[], float],
    ) -> None:
        self._memory = memory
        self._store = store
        self._observer = observer
        self._clock = clock
        self._store_paused_until_s = 0.0
        self._forms: WeakKeyDictionary[Router, OutlookForm] = WeakKeyDictionary()
        self._unwritten: dict[bytes, bytes] = {}
        self._to_write = asyncio.Event()

    async def score(
        self,
        student: Student,
        texts: Sequence[str],
        *,
        permits: Permits,
        priority: Priority = "interactive",
        deadline_s: float | None = None,
    ) -> Scored:
        """As ``Student.score``; equal prompts of a call are scored once.

        Args:
            permits: Of the queue, taken for the prompts that the router must read.

        Raises:
            OverloadedError: ``permits`` gave none.
        """
        form = await self._form_of(student)
        if form is None:
            with permits(len(texts)):
                return await student.score(texts, priority=priority, deadline_s=deadline_s)
        lookup = _Lookup(await _keys(form, texts))
        await self._find(form, lookup)
        missing = lookup.missing(texts)
        self._observer.decisions_looked_up(len(texts) - len(missing), len(missing))
        if not missing:
            return Scored(_outcomes(form, lookup), 0.0, 0.0, 0.0)
        with permits(len(missing)):
            scored = await student.score(list(missing.values()), priority=priority, deadline_s=deadline_s)
        self._keep(form, lookup, list(missing), scored)
        return replace(scored, prompts=_outcomes(form, lookup))

    async def write(self) -> None:
        """Write rows to the store, until cancelled: no answer waits for that."""
        while self._store is not None:
            await self._to_write.wait()
            some = dict(list(self._unwritten.items())[:_WRITE_TOGETHER])
            for key in some:
                del self._unwritten[key]
            if not self._unwritten:
                self._to_write.clear()
            if some and self._store_is_used:
                with self._store_failures():
                    await self._store.put_many(some)

    @property
    def _store_is_used(self) -> bool:
        return self._store is not None and self._clock() >= self._store_paused_until_s

    async def _form_of(self, student: Student) -> OutlookForm | None:
        """How rows of this router look: an answer of its own shows it. ``None`` if it cannot answer now."""
        form = self._forms.get(student.router)
        if form is None:
            (outcome,) = (await student.score([_EXAMPLE])).prompts
            if isinstance(outcome, Exception):
                return None
            form = OutlookForm(
                outcome.output,
                checkpoint_id=student.manifest.checkpoint_id,
                engine=student.router.backbone.precision,
            )
            self._forms[student.router] = form
        return form

    async def _find(self, form: OutlookForm, lookup: _Lookup) -> None:
        """Fill in the rows that are known."""
        unknown: dict[bytes, None] = {}
        for key in lookup.keys:
            row = self._memory.get(key)
            if row is None:
                unknown[key] = None
            else:
                lookup.rows[key] = row
        if not unknown or self._store is None or not self._store_is_used:
            return
        with self._store_failures():
            for key, row in (await self._store.get_many(list(unknown))).items():
                if form.accepts(key, row):
                    lookup.rows[key] = row
                    self._memory.put(key, row)
                else:
                    self._observer.decision_cache_failed()

    def _keep(self, form: OutlookForm, lookup: _Lookup, keys: Sequence[bytes], scored: Scored) -> None:
        """Take over what the router said. Errors are not kept."""
        for key, outcome in zip(keys, scored.prompts, strict=True):
            if isinstance(outcome, Exception):
                lookup.errors[key] = outcome
                continue
            row = form.pack(outcome.output, outcome.row, key)
            lookup.rows[key] = row
            self._memory.put(key, row)
            if self._store is not None and len(self._unwritten) < _MAX_UNWRITTEN:
                self._unwritten[key] = row
                self._to_write.set()

    @contextmanager
    def _store_failures(self) -> Iterator[None]:
        """A failure of the store ends the block, no more; the store then has a pause."""
        try:
            yield
        except CacheError as error:
            self._store_paused_until_s = self._clock() + _PAUSE_S
            self._observer.decision_cache_failed()
            logger.warning("decision_store_failed", reason=error.message, pause_s=_PAUSE_S)


@asynccontextmanager
async def writing(cache: DecisionCache) -> AsyncIterator[DecisionCache]:
    """Write a cache's rows to its store while the block runs."""
    task = asyncio.create_task(cache.write())
    try:
        yield cache
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def _keys(form: OutlookForm, texts: Sequence[str]) -> list[bytes]:
    keys = []
    for index, text in enumerate(texts):
        if index % _KEYS_TOGETHER == _KEYS_TOGETHER - 1:
            await asyncio.sleep(0)
        keys.append(form.key(text))
    return keys


def _outcomes(form: OutlookForm, lookup: _Lookup) -> list[ScoredPrompt | Exception]:
    return [
        lookup.errors[key] if key in lookup.errors else ScoredPrompt(form.unpack(lookup.rows[key]), 0)
        for key in lookup.keys
    ]
