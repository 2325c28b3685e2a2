"""Lines of a body that comes in pieces: bounded in memory whatever the length of a line or of the body."""

from dataclasses import dataclass

MEDIA_TYPE = "application/x-ndjson"

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a body, blank ones excepted.

    Args:
        number: Its place in the body, from 1, blank lines counted.
        content: Without its end; ``None`` if it is longer than the limit, and then it was not kept.
    """

    number: int
    content: bytes | None


class LineSplitter:
    """Cuts pieces of a body into lines. It keeps the piece fed last and the beginning of one line, no more.

    Args:
        max_bytes: Longest line. The rest of a longer one is skipped as it comes.
    """

    def __init__(self, *, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._rest = bytearray()
        self._n_searched = 0
        self._n_lines = 0
        self._skips = False

    @property
    def n_kept_bytes(self) -> int:
        """Bytes that are in memory."""
        return len(self._rest)

    def feed(self, piece: bytes) -> None:
        """Add a piece. To be called when ``take`` has nothing left."""
        self._rest += piece

    def end(self) -> None:
        """The body has ended; its last line may lack a newline."""
        self.feed(b"\n")

    def take(self, *, max_lines: int, max_bytes: int) -> list[Line]:
        """The next lines that are whole, or known to be too long.

        Args:
            max_bytes: The line that passes this sum is the last one.
        """
        lines: list[Line] = []
        start = n_bytes = 0
        while len(lines) < max_lines and n_bytes < max_bytes:
            end = self._rest.find(b"\n", max(start, self._n_searched))
            if end < 0:
                start = self._unfinished(start, lines)
                break
            line = None if self._skips else self._whole(start, end)
            if line is not None:
                lines.append(line)
                n_bytes += len(line.content or b"")
            self._skips = False
            start = end + 1
        del self._rest[:start]
        self._n_searched = max(0, self._n_searched - start)
        return lines

    def _whole(self, start: int, end: int) -> Line | None:
        self._n_lines += 1
        content = bytes(self._rest[start:end]) if end - start <= self._max_bytes else None
        if content is None:
            return Line(self._n_lines, None)
        if self._n_lines == 1:
            content = content.removeprefix(_BYTE_ORDER_MARK)
        return Line(self._n_lines, content) if content.strip() else None

    def _unfinished(self, start: int, lines: list[Line]) -> int:
        """Look at what has no end yet; returns where what must be kept begins."""
        self._n_searched = len(self._rest)
        if self._skips:
            return len(self._rest)
        if len(self._rest) - start <= self._max_bytes:
            return start
        self._n_lines += 1
        self._skips = True
        lines.append(Line(self._n_lines, None))
        return len(self._rest)
