"""Canonical JSON and content hashes."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clients.canonical import canonical_json, content_hash, messages_hash, without_none

scalars = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
)
documents = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(documents)
def test_canonical_json_is_lossless_ascii(document):
    """Canonical JSON reads back as the same value and needs no encoding beyond ASCII."""
    text = canonical_json(document)
    assert json.loads(text) == document
    assert text.isascii()


@given(st.dictionaries(st.text(), documents, min_size=2, max_size=6))
def test_key_order_does_not_change_the_hash(document):
    """Two dictionaries with the same members hash the same whatever their order."""
    assert content_hash(document) == content_hash(dict(reversed(document.items())))


def test_nested_key_order_does_not_change_the_hash():
    """Order is ignored at every depth, not only at the top."""
    assert content_hash([{"a": {"x": 1, "y": 2}}]) == content_hash([{"a": {"y": 2, "x": 1}}])


def test_list_order_changes_the_hash():
    """Turns in another order are another chat."""
    assert content_hash([1, 2]) != content_hash([2, 1])


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_numbers_that_json_lacks_are_refused(number):
    """NaN and infinities have no JSON text and raise."""
    with pytest.raises(ValueError, match="JSON"):
        canonical_json({"temperature": number})


def test_lone_surrogate_can_be_hashed():
    """A prompt with a lone surrogate has a hash, distinct from that of its replacement."""
    broken, mended = ({"role": "user", "content": text} for text in ("a\ud800", "a\ufffd"))
    assert messages_hash([broken]) != messages_hash([mended])


def test_hash_is_that_of_the_documented_text():
    """The hash is SHA-256 of sorted, compact, ASCII JSON, so that other tools can compute it."""
    assert canonical_json({"b": "é", "a": [1, 0.5]}) == '{"a":[1,0.5],"b":"\\u00e9"}'
    assert content_hash({}) == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"


def test_without_none_keeps_what_is_merely_falsy():
    """Only null means absent: zero, false and empty values stay."""
    body = {"temperature": 0, "top_p": 0.0, "seed": 0, "stop": [], "logprobs": False, "user": "", "n": None}
    assert without_none(body) == {name: value for name, value in body.items() if name != "n"}
    assert "n" not in without_none(body)
