"""A request's body and its answer while both are under way: lines come in, lines go out, either may stall."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable

from starlette.types import Message, Receive, Send

from service.api.dependencies import StreamLimits
from service.errors import NotReadyError, StreamStalledError
from service.ndjson import Line, LineSplitter

_CHUNK_BYTES = 256 * 1024
_PIECE_BYTES = 64 * 1024
"""Of the answer, handed to the server at one time: it takes no more while the client does not read."""


class ClientLeft(Exception):  # noqa: N818, no error of ours: the work is not wanted any more
    """The client closed the connection before the stream had ended."""


class AnswersNotTaken(Exception):  # noqa: N818, told to nobody: the one who would have to know does not read
    """The client has not read its answers for too long."""


class StreamedBody:
    """The lines of a body, as they come.

    The server is asked for more only when all lines before have been handed over, and it reads no further
    from the socket than it is asked: so a client is read from as fast as its lines are used.

    Args:
        on_read: Told of the size of each piece.
    """

    def __init__(self, receive: Receive, *, limits: StreamLimits, on_read: Callable[[int], None]) -> None:
        self._receive = receive
        self._limits = limits
        self._on_read = on_read
        self._splitter = LineSplitter(max_bytes=limits.max_line_bytes)
        self._ended = asyncio.Event()
        self._waiting: asyncio.Timeout | None = None
        self._stopped = False

    async def chunks(self) -> AsyncGenerator[list[Line], None]:
        """Some lines at a time: those that are there, up to a bound.

        Raises:
            ClientLeft: Before the end of the body.
            StreamStalledError: Nothing came for too long.
            NotReadyError: ``stop`` was called.
        """
        while not self._stopped:
            lines = self._splitter.take(max_lines=self._limits.max_chunk_lines, max_bytes=_CHUNK_BYTES)
            if lines:
                yield lines
            elif self._ended.is_set():
                return
            else:
                await self._read_piece()
        raise NotReadyError("the service is shutting down; send the lines after the last one answered again")

    def stop(self) -> None:
        """Hand over no more lines."""
        self._stopped = True
        if self._waiting is not None and not self._waiting.expired():
            self._waiting.reschedule(asyncio.get_running_loop().time())

    async def watch(self) -> None:
        """After the end of the body, wait until the client leaves.

        Raises:
            ClientLeft: It has.
        """
        await self._ended.wait()
        while True:
            await self._message()

    async def discard(self, *, at_most_s: float) -> None:
        """Read on without use. A connection that is closed on unread bytes may lose what was sent last."""
        try:
            async with asyncio.timeout(at_most_s):
                while not self._ended.is_set():
                    self._note_end(await self._message())
        except (TimeoutError, ClientLeft):
            return

    async def _read_piece(self) -> None:
        try:
            async with asyncio.timeout(self._limits.stall_s) as self._waiting:
                message = await self._message()
        except TimeoutError:
            if self._stopped:
                return
            raise StreamStalledError(
                f"no byte of the request came for {self._limits.stall_s:g} seconds"
            ) from None
        finally:
            self._waiting = None
        piece = message.get("body", b"")
        self._on_read(len(piece))
        self._splitter.feed(piece)
        self._note_end(message)

    async def _message(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            raise ClientLeft
        return message

    def _note_end(self, message: Message) -> None:
        if not message.get("more_body", False):
            self._splitter.end()
            self._ended.set()


class StreamedAnswer:
    """Lines of an answer, written as fast as the client reads them.

    Args:
        start: Status and headers.
        stall_s: For how long the client may leave its answers where they are.
    """

    def __init__(self, send: Send, start: Message, *, stall_s: float) -> None:
        self._send = send
        self._start = start
        self._stall_s = stall_s
        self._started = False

    async def start(self) -> None:
        """Send status and headers, if that is not done yet."""
        if not self._started:
            self._started = True
            await self._put(self._start)

    async def write(self, lines: Iterable[bytes]) -> None:
        """Send lines.

        Raises:
            AnswersNotTaken: The client does not read.
        """
        await self.start()
        piece = bytearray()
        for line in lines:
            piece += line
            if len(piece) >= _PIECE_BYTES:
                await self._put_body(bytes(piece))
                piece.clear()
        if piece:
            await self._put_body(bytes(piece))

    async def end(self) -> None:
        """The answer is complete."""
        await self._put({"type": "http.response.body", "body": b"", "more_body": False})

    async def _put_body(self, piece: bytes) -> None:
        await self._put({"type": "http.response.body", "body": piece, "more_body": True})

    async def _put(self, message: Message) -> None:
        try:
            async with asyncio.timeout(self._stall_s):
                await self._send(message)
        except TimeoutError:
            raise AnswersNotTaken from None
