"""TokenizerPool: many callers, threads of its own, the ids of a tokenizer that is alone."""

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from router_model.pretrained import load_tokenizer, locate_model
from router_model.prompt_tokenizer import PromptTokenizer
from service.tokenizing import TokenizerPool, _pieces


class Recorder:
    """An encoder that says which thread called which clone, and can be held."""

    def __init__(self, calls: list[tuple[int, int, int]], gate: threading.Event) -> None:
        self.calls = calls
        self.gate = gate

    def encode(self, texts: Sequence[str]) -> list[int]:
        self.calls.append((threading.get_ident(), id(self), len(texts)))
        assert self.gate.wait(10)
        return [len(text) for text in texts]

    def clone(self) -> "Recorder":
        return Recorder(self.calls, self.gate)


@asynccontextmanager
async def pool_of(
    n_threads: int, *, held: bool = False
) -> AsyncIterator[tuple[TokenizerPool[int], Recorder]]:
    """A pool over a recorder."""
    gate = threading.Event()
    if not held:
        gate.set()
    recorder = Recorder([], gate)
    pool = TokenizerPool(recorder, n_threads=n_threads)
    try:
        yield pool, recorder
    finally:
        gate.set()
        pool.close()


async def until_called(recorder: Recorder, n_calls: int) -> None:
    """Wait for calls that other threads take up."""
    async with asyncio.timeout(10):
        while len(recorder.calls) < n_calls:  # noqa: ASYNC110, the threads know no event of this loop
            await asyncio.sleep(0.001)


async def test_each_thread_has_a_clone_of_its_own() -> None:
    """No two threads meet in one tokenizer, and none of them is the event loop's."""
    async with pool_of(3) as (pool, recorder):
        await asyncio.gather(*(pool.encode([str(n)] * 40) for n in range(60)))
    owners = {(thread, clone) for thread, clone, _ in recorder.calls}
    assert len({clone for _, clone in owners}) == len({thread for thread, _ in owners}) == len(owners) <= 3
    assert threading.get_ident() not in {thread for thread, _ in owners}


async def test_a_large_call_is_cut_into_pieces() -> None:
    """Pieces are bounded in texts and characters; order and number stay."""
    async with pool_of(2) as (pool, recorder):
        texts = ["x" * (n % 5) for n in range(1000)] + ["y" * 1_000_000, "z"]
        assert await pool.encode(texts) == [len(text) for text in texts]
    assert max(n_texts for _, _, n_texts in recorder.calls) == 64
    assert [len(piece) for piece in _pieces(["a" * 1_000_000, "b", "c" * 63_999, "d"])] == [1, 2, 1]
    assert _pieces([]) == []


async def test_bulk_leaves_a_thread_for_others() -> None:
    """While bulk calls wait for each other, an interactive one is taken up at once."""
    async with pool_of(2, held=True) as (pool, recorder):
        bulk = [asyncio.ensure_future(pool.encode(["b"], priority="bulk")) for _ in range(5)]
        interactive = asyncio.ensure_future(pool.encode(["i"]))
        await until_called(recorder, 2)
        assert len(recorder.calls) == 2
        recorder.gate.set()
        assert await interactive == [1]
        assert await asyncio.gather(*bulk) == [[1]] * 5


async def test_a_caller_that_leaves_costs_no_further_piece() -> None:
    """What was not begun is not begun."""
    async with pool_of(1, held=True) as (pool, recorder):
        call = asyncio.ensure_future(pool.encode(["t"] * 640))
        await until_called(recorder, 1)
        call.cancel()
        recorder.gate.set()
        await asyncio.gather(call, return_exceptions=True)
        assert await pool.encode(["u"]) == [1]
    assert [n_texts for _, _, n_texts in recorder.calls] == [64, 1]


async def test_the_real_tokenizer_hammered_from_all_sides(minilm_path: Path) -> None:
    """Sixteen callers on MiniLM's tokenizer, one text of 10 MB among theirs: the ids it gives alone."""
    encoder = PromptTokenizer(
        load_tokenizer(locate_model(str(minilm_path))), frame="plain", max_tokens=128, keep="start"
    )
    texts = [f"{n} " + "Gulls cry <|im_end|> [CLS] over the sea. " * (n % 30) for n in range(200)]
    texts.append("word " * 2_000_000)
    expected = encoder.encode(texts)
    pool = TokenizerPool(encoder, n_threads=4)
    try:
        found = await asyncio.gather(*(pool.encode(texts) for _ in range(16)))
    finally:
        pool.close()
    assert all(encodings == expected for encodings in found)
    assert expected[-1].truncated


async def test_a_job_that_fails_holds_up_nobody() -> None:
    """Its pieces are tried alone, more than there are threads: the guilty caller alone is told."""

    class Fragile(Recorder):
        def encode(self, texts: Sequence[str]) -> list[int]:
            if "poison" in texts:
                raise MemoryError
            return super().encode(texts)

        def clone(self) -> "Fragile":
            return self

    gate = threading.Event()
    gate.set()
    pool: TokenizerPool[int] = TokenizerPool(Fragile([], gate), n_threads=2)
    texts = ["poison" if n == 3 else str(n) for n in range(40)]
    async with asyncio.timeout(20):
        found = await asyncio.gather(*(pool.encode([text]) for text in texts), return_exceptions=True)
        assert await pool.encode(["after"]) == [5]
    pool.close()
    assert isinstance(found.pop(3), MemoryError)
    assert found == [[len(text)] for text in texts if text != "poison"]
