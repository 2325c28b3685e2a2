"""Lines of a body that comes in pieces."""

from hypothesis import given
from hypothesis import strategies as st

from service.ndjson import Line, LineSplitter

MAX_BYTES = 10


def _expected(body: bytes) -> list[Line]:
    """The same from the whole body."""
    lines = []
    for number, content in enumerate(body.split(b"\n"), start=1):
        if len(content) > MAX_BYTES:
            lines.append(Line(number, None))
        elif content.strip():
            lines.append(Line(number, content))
    return lines


def _taken(splitter: LineSplitter, max_lines: int, max_bytes: int) -> list[Line]:
    lines: list[Line] = []
    while some := splitter.take(max_lines=max_lines, max_bytes=max_bytes):
        assert len(some) <= max_lines
        assert sum(len(line.content or b"") for line in some[:-1]) < max_bytes
        lines += some
    return lines


@given(
    body=st.lists(st.sampled_from([b"\n", b"a", b"bb ", b" ", b"\r", b"c" * 9, b"d" * 30]), max_size=60).map(
        b"".join
    ),
    sizes=st.lists(st.integers(1, 40), min_size=1),
    max_lines=st.integers(1, 4),
    max_bytes=st.integers(1, 30),
)
def test_pieces_and_bounds_change_no_line(
    body: bytes, sizes: list[int], max_lines: int, max_bytes: int
) -> None:
    """However a body is cut and however few lines are taken at a time: the lines are those of the whole."""
    splitter = LineSplitter(max_bytes=MAX_BYTES)
    lines, start = [], 0
    for index in range(len(body)):
        size = sizes[index % len(sizes)]
        splitter.feed(body[start : start + size])
        lines += _taken(splitter, max_lines, max_bytes)
        assert splitter.n_kept_bytes <= MAX_BYTES
        start += size
    splitter.end()
    lines += _taken(splitter, max_lines, max_bytes)
    assert lines == _expected(body)
    assert splitter.n_kept_bytes == 0


def test_a_long_line_is_known_before_it_ends() -> None:
    """One byte above the limit is enough; what follows of it is dropped as it comes."""
    splitter = LineSplitter(max_bytes=MAX_BYTES)
    splitter.feed(b"x" * MAX_BYTES)
    assert splitter.take(max_lines=9, max_bytes=99) == []
    splitter.feed(b"x")
    assert splitter.take(max_lines=9, max_bytes=99) == [Line(1, None)]
    for _ in range(3):
        splitter.feed(b"y" * 1000)
        assert splitter.take(max_lines=9, max_bytes=99) == []
        assert splitter.n_kept_bytes == 0
    splitter.feed(b"y\nz\n")
    assert splitter.take(max_lines=9, max_bytes=99) == [Line(2, b"z")]


def test_the_limit_itself_is_allowed() -> None:
    """A line of exactly the limit is whole, with its end or without."""
    splitter = LineSplitter(max_bytes=MAX_BYTES)
    splitter.feed(b"x" * MAX_BYTES + b"\n" + b"y" * MAX_BYTES)
    splitter.end()
    lines = [Line(1, b"x" * MAX_BYTES), Line(2, b"y" * MAX_BYTES)]
    assert splitter.take(max_lines=9, max_bytes=99) == lines


def test_a_byte_order_mark_is_no_content() -> None:
    """At the start of the body alone, whole or in pieces; anywhere else it is content."""
    splitter = LineSplitter(max_bytes=MAX_BYTES)
    for piece in (b"\xef", b"\xbb", b"\xbfa\n\xef\xbb\xbfb\n"):
        splitter.feed(piece)
    lines = [Line(1, b"a"), Line(2, b"\xef\xbb\xbfb")]
    assert splitter.take(max_lines=9, max_bytes=99) == lines
