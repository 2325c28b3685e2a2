"""A client that leaves cancels its own request: its place in the batch, its calls to teachers."""

import asyncio
from typing import Self

from starlette.types import Message, Receive


class ClientWatch:
    """Cancels the task that made it when the client leaves; that cancellation ends with the block.

    The watch begins at the first turn of the event loop: a request that is answered without waiting for
    anything needs none, and pays for none.

    Args:
        receive: Of a request whose body has been read: what comes next is the disconnect.
    """

    def __init__(self, receive: Receive) -> None:
        request = asyncio.current_task()
        if request is None:
            raise RuntimeError("a client is watched from within the task that serves it")
        self._request = request
        self._n_cancelled = request.cancelling()
        self._receive = receive
        self._left = asyncio.Event()
        self._watcher: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._start = asyncio.get_running_loop().call_soon(self._begin)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        self._start.cancel()
        if self._watcher is not None and self._watcher.done():
            # Raises what ``receive`` raised, if it did.
            self._watcher.result()
        elif self._watcher is not None:
            self._watcher.cancel()
        if not self._left.is_set():
            return False
        cancelled_by_others = self._request.uncancel() > self._n_cancelled
        return kind is asyncio.CancelledError and not cancelled_by_others

    async def disconnect(self) -> Message:
        """Wait until the client has left."""
        await self._left.wait()
        return {"type": "http.disconnect"}

    def _begin(self) -> None:
        self._watcher = self._request.get_loop().create_task(self._wait())

    async def _wait(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._left.set()
        self._request.cancel("the client has left")
