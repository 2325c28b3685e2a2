"""Tokenisation on threads of its own: a long prompt never holds up the event loop, nor another prompt."""

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, Protocol, Self, TypeVar

from service.batching import Priority

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


class TokenizerPool(Generic[EncodingT_co]):
    """Threads with one clone of the tokenizer each: a shared one fails when two threads meet in it.

    Bulk calls take all threads but one at most, so that an interactive call finds one free or soon free.

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
        self._bulk = asyncio.Semaphore(max(1, n_threads - 1))

    async def encode(self, texts: Sequence[str], *, priority: Priority = "interactive") -> list[EncodingT_co]:
        """The encoding of each text, in order. A caller that leaves costs no further piece."""
        encodings: list[EncodingT_co] = []
        for piece in _pieces(texts):
            if priority == "bulk":
                async with self._bulk:
                    encodings += await self._on_a_thread(piece)
            else:
                encodings += await self._on_a_thread(piece)
        return encodings

    def close(self) -> None:
        """Let the threads end."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _take_clone(self) -> None:
        self._own.encoder = self._clones.pop()

    async def _on_a_thread(self, texts: Sequence[str]) -> Sequence[EncodingT_co]:
        def encode() -> Sequence[EncodingT_co]:
            own: Callable[[Sequence[str]], Sequence[EncodingT_co]] = self._own.encoder.encode
            return own(texts)

        return await asyncio.get_running_loop().run_in_executor(self._threads, encode)


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
