"""Tokenisation on threads of its own: a long prompt never holds up the event loop, nor another prompt."""

import asyncio
import functools
import math
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from typing import Generic, Protocol, Self, TypeVar

from service.batch_queue import Priority
from service.errors import NotReadyError

EncodingT_co = TypeVar("EncodingT_co", covariant=True)

_PIECE_CHARS = 64_000
_PIECE_TEXTS = 64
"""A call is tokenised in pieces of this size at most, so that others pass between them."""


class Encoder(Protocol[EncodingT_co]):
    """A tokenizer that one thread at a time may use."""

    def encode(self, texts: Sequence[str]) -> Sequence[EncodingT_co]:
        """One encoding per text, in order. Blocking."""
        ...

    def clone(self) -> Self:
        """A copy that shares no state."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class _Piece(Generic[EncodingT_co]):
    """Some texts of one caller."""

    texts: Sequence[str]
    encoded: "asyncio.Future[Sequence[EncodingT_co]]"


class TokenizerPool(Generic[EncodingT_co]):
    """Threads with one clone of the tokenizer each: a shared one fails when two threads meet in it.

    What comes in one turn of the event loop, or while the threads are busy, is handed over together: handing
    over takes longer than tokenising a short text. Interactive calls go first, and bulk ones take all threads
    but one at most, so that an interactive call finds one free or soon free.

    Args:
        encoder: Cloned for each thread; not used itself.
        n_threads: At least 1.
    """

    def __init__(self, encoder: Encoder[EncodingT_co], *, n_threads: int) -> None:
        self._own = threading.local()
        # Made here, one after the other: copying a tokenizer is no work for two threads at once either.
        self._clones = [encoder.clone() for _ in range(n_threads)]
        self._threads = ThreadPoolExecutor(
            n_threads, thread_name_prefix="persyn-tokenizer", initializer=self._take_clone
        )
        self._most_busy: dict[Priority, int] = {"interactive": n_threads, "bulk": max(1, n_threads - 1)}
        self._waiting: dict[Priority, deque[_Piece[EncodingT_co]]] = {"interactive": deque(), "bulk": deque()}
        self._n_busy: dict[Priority, int] = {"interactive": 0, "bulk": 0}
        self._closed = False
        self._will_start = False
        self._quiet = asyncio.Event()
        self._quiet.set()

    async def encode(self, texts: Sequence[str], *, priority: Priority = "interactive") -> list[EncodingT_co]:
        """The encoding of each text, in order. A caller that leaves costs no further piece."""
        encodings: list[EncodingT_co] = []
        for texts_of_piece in _pieces(texts):
            piece = _Piece(texts_of_piece, asyncio.get_running_loop().create_future())
            self._waiting[priority].append(piece)
            self._start_soon()
            encodings += await piece.encoded
        return encodings

    @property
    def is_quiet(self) -> bool:
        """Whether no text is waiting or under way."""
        return self._quiet.is_set()

    async def quiet(self) -> None:
        """Wait until no text is waiting or under way."""
        await self._quiet.wait()

    def close(self) -> None:
        """Let the threads end."""
        self._closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _take_clone(self) -> None:
        self._own.encoder = self._clones.pop()

    def _start_soon(self) -> None:
        """At the end of this turn of the event loop, when all is here that comes in it."""
        self._quiet.clear()
        if not self._will_start:
            self._will_start = True
            asyncio.get_running_loop().call_soon(self._start)

    def _start(self) -> None:
        """Give each free thread its share of what waits."""
        self._will_start = False
        for priority, waiting in self._waiting.items():
            while waiting and (n_free := self._n_free(priority)):
                job = _take(waiting, math.ceil(len(waiting) / n_free))
                if job:
                    self._run(job, priority)
        if not any(self._n_busy.values()):
            self._quiet.set()

    def _n_free(self, priority: Priority) -> int:
        """Threads that may take a job of this priority now."""
        n_free = self._most_busy["interactive"] - sum(self._n_busy.values())
        # Pieces that are tried again alone may be more than the threads.
        return max(0, min(n_free, self._most_busy[priority] - self._n_busy[priority]))

    def _run(self, job: Sequence[_Piece[EncodingT_co]], priority: Priority) -> None:
        if self._closed:
            for piece in job:
                if not piece.encoded.done():
                    piece.encoded.set_exception(_shutting_down())
            return
        self._n_busy[priority] += 1
        texts = list(chain.from_iterable(piece.texts for piece in job))
        working = asyncio.get_running_loop().run_in_executor(self._threads, self._encode, texts)
        working.add_done_callback(functools.partial(self._finish, job, priority))

    def _encode(self, texts: Sequence[str]) -> Sequence[EncodingT_co]:
        """On one of the threads."""
        encode: Callable[[Sequence[str]], Sequence[EncodingT_co]] = self._own.encoder.encode
        return encode(texts)

    def _finish(
        self,
        job: Sequence[_Piece[EncodingT_co]],
        priority: Priority,
        working: "asyncio.Future[Sequence[EncodingT_co]]",
    ) -> None:
        self._n_busy[priority] -= 1
        failure = _shutting_down() if working.cancelled() else working.exception()
        if failure is not None and len(job) > 1:
            # Each alone: only the guilty one's caller is to be told.
            for piece in job:
                self._run([piece], priority)
        elif failure is not None:
            if not job[0].encoded.done():
                job[0].encoded.set_exception(failure)
        else:
            encodings = iter(working.result())
            for piece in job:
                own = list(islice(encodings, len(piece.texts)))
                if not piece.encoded.done():
                    piece.encoded.set_result(own)
        # Not at once: first those go on who have their encodings, and what they send next is taken along.
        self._start_soon()


def _shutting_down() -> NotReadyError:
    return NotReadyError("the service is shutting down")


def _take(waiting: deque[_Piece[EncodingT_co]], most: int) -> list[_Piece[EncodingT_co]]:
    """The next pieces whose callers are still there, so many at most and of bounded size."""
    job: list[_Piece[EncodingT_co]] = []
    n_texts, n_chars = 0, 0
    while waiting and len(job) < most:
        piece = waiting[0]
        n_texts += len(piece.texts)
        n_chars += sum(map(len, piece.texts))
        if job and (n_texts > _PIECE_TEXTS or n_chars > _PIECE_CHARS):
            break
        waiting.popleft()
        if not piece.encoded.done():
            job.append(piece)
    return job


def _pieces(texts: Sequence[str]) -> list[Sequence[str]]:
    """The texts in order, cut into pieces of bounded size; one long text is a piece of its own."""
    pieces: list[Sequence[str]] = []
    start, n_chars = 0, 0
    for index, text in enumerate(texts):
        if index > start and (n_chars + len(text) > _PIECE_CHARS or index - start >= _PIECE_TEXTS):
            pieces.append(texts[start:index])
            start, n_chars = index, 0
        n_chars += len(text)
    if start < len(texts):
        pieces.append(texts[start:])
    return pieces
