"""Constraints that a machine checks, on text as models write it."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router_model import constraints
from router_model.constraints import parse_constraints
from router_model.errors import QualityError


def is_met(response: str, kind: str, **params: Any) -> bool:
    (constraint,) = parse_constraints([{"kind": kind, **params}], prompt_id="p1")
    return constraint.is_met(response)


@pytest.mark.parametrize(
    ("text", "n"),
    [
        ("Hello, world!", 2),
        ("don't stop: it's well-known", 4),
        ("don\u2019t use snake_case", 3),
        ("It costs 3.5 or 1,000 dollars", 6),
        ("**bold** — _slanted_ -- done", 3),
        ("- one\n- two", 2),
        ("cafe\u0301 na\u00efve", 2),
        ("हिन्दी भाषा", 2),
        ("... !!!", 0),
        ("a,b", 2),
    ],
)
def test_words(text: str, n: int) -> None:
    """Contractions, hyphenated words, numbers and words with combining marks are one word each."""
    assert constraints.count_words(text) == n


@pytest.mark.parametrize(
    ("text", "n"),
    [
        ("One. Two! Three?", 3),
        ("Pi is 3.14 and e is 2.71. Both are irrational.", 2),
        ("Use tools, e.g. Python, i.e. code. Done.", 2),
        ("Dr. Smith met Mr. Jones. They spoke.", 2),
        ("J. R. Tolkien wrote it.", 1),
        ('"Really?" she asked. He said "Yes."', 2),
        ("He said \u201cStop!\u201d Then he left.", 2),
        ("Wait... what? Oh\u2026 I see!", 3),
        ("Wait... What?!", 2),
        ("The answer is no. However, see fig. 3 and No. 5.", 2),
        ("1. Mix the flour.\n2. Bake it.", 2),
        ("A title\n\nA sentence.", 2),
        ("no final mark", 1),
        ("hello there. how are you? fine.", 3),
        ("It was 1999. Then came 2000.", 2),
        ("Visit example.com today. Bye.", 2),
        ("これは文です。次の文です。", 2),
        ("(It works.) Good.", 2),
        ("It is **bold.** Next.", 2),
        ("...", 0),
    ],
)
def test_sentences(text: str, n: int) -> None:
    """Decimals, abbreviations, initials, list numbers and inner quotes end no sentence."""
    assert constraints.count_sentences(text) == n


@pytest.mark.parametrize(
    ("text", "n"),
    [
        ("- a\n* b\n+ c\n\u2022 d\n\u2022e", 5),
        ("Intro:\n\n- a\n  - nested\n\nEnd.", 2),
        ("**Bold** start\n*slanted* text\n-5 degrees\n---\n* * *\n-", 0),
        ("a - b", 0),
        ("\t- tab", 1),
    ],
)
def test_bullets(text: str, n: int) -> None:
    """A bullet is a marker, a space and something; emphasis, negative numbers and rules are none."""
    assert constraints.count_bullets(text) == n


@pytest.mark.parametrize(
    ("text", "n"),
    [("1. a\n2) b\n  10. c", 3), ("1.5 litres\n2024 was good\n3.\n(4) d", 0), ("Step 1. a", 0)],
)
def test_numbered_lines(text: str, n: int) -> None:
    """`1.` and `1)` count at the start of a line; decimals and years do not."""
    assert constraints.count_numbered(text) == n


def test_paragraphs_and_lines() -> None:
    """Paragraphs are parted by blank lines, with or without spaces in them; those are no lines."""
    text = "\n\na\nb\n \t\n\n\nc\r\n\r\nd\n"
    assert constraints.count_paragraphs(text) == 3
    assert constraints.count_lines(text) == 4
    assert constraints.count_paragraphs("") == constraints.count_lines(" \n ") == 0


def test_bounds_are_inclusive_and_optional() -> None:
    """`min` and `max` are inclusive, and either may be absent or null."""
    assert is_met("one two three", "word_count", min=3, max=3)
    assert not is_met("one two three", "word_count", min=4)
    assert not is_met("one two three", "word_count", max=2)
    assert is_met("one two three", "word_count", min=None, max=3)


def test_characters_are_counted_without_the_edges() -> None:
    """White space around the response does not count as characters."""
    assert is_met("  abc\n", "char_count", min=3, max=3)


def test_words_are_found_whole_and_in_any_case() -> None:
    """`art` is not in `party`; a phrase may be broken over lines; apostrophes are alike."""
    assert is_met("The ART of war", "required_words", words=["art", "of war"])
    assert not is_met("a party", "required_words", words=["art"])
    assert is_met("machine\n  Learning!", "required_words", words=["machine learning"])
    assert is_met("I don\u2019t know C++.", "required_words", words=["don't", "c++"])
    assert not is_met("one", "required_words", words=["one", "two"])
    assert is_met("a party", "forbidden_words", words=["art", "war"])
    assert not is_met("a party at War", "forbidden_words", words=["art", "war"])


@pytest.mark.parametrize(
    ("response", "params", "met"),
    [
        (' {"a": 1} \n', {}, True),
        ("[1, 2]", {"type": "array"}, True),
        ("[1, 2]", {"type": "object"}, False),
        ('{"a": 1, "b": null}', {"keys": ["a", "b"]}, True),
        ('{"a": 1}', {"type": "object", "keys": ["a", "b"]}, False),
        ("[1]", {"keys": ["a"]}, False),
        ('```json\n{"a": 1}\n```', {"type": "object"}, True),
        ("```\n[]\n```", {"type": "array"}, True),
        ('Sure:\n```json\n{"a": 1}\n```', {}, False),
        ('```json\n{"a": 1}\n```\n```json\n{}\n```', {}, False),
        ('```python\n{"a": 1}\n```', {}, False),
        ('{"a": NaN}', {}, False),
        ("[-Infinity]", {}, False),
        ("{'a': 1}", {}, False),
        ('{"a": 1} trailing', {}, False),
        ("[" * 200_000 + "]" * 200_000, {}, False),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, {}, False),
        ("3", {}, True),
    ],
)
def test_json(response: str, params: dict[str, Any], met: bool) -> None:
    """The whole response is JSON, one fence around it allowed; NaN and bottomless nesting are not JSON."""
    assert is_met(response, "json", **params) is met


def test_case_needs_a_letter() -> None:
    """All cased letters count, digits and marks do not, and there must be a letter."""
    assert is_met("WELL, 3 ÄPFEL!", "case", value="upper")
    assert not is_met("WELL, iPhone", "case", value="upper")
    assert is_met("all small, 5", "case", value="lower")
    assert not is_met("123", "case", value="upper")
    assert not is_met("123", "case", value="lower")


def test_edges_are_compared_after_stripping() -> None:
    """White space around the response and the text is ignored; case is not."""
    assert is_met("\n Dear all, hello. Bye \n", "starts_with", text="Dear all,")
    assert is_met("hello. Bye \n", "ends_with", text=" Bye")
    assert not is_met("dear all", "starts_with", text="Dear")
    assert not is_met("Bye now", "ends_with", text="Bye")


@pytest.mark.parametrize(
    ("entry", "fragments"),
    [
        ({"kind": "word_cout", "min": 1}, ["'word_cout'", "did you mean 'word_count'"]),
        ({"kind": "zzzz"}, ["'zzzz'", "valid: word_count"]),
        ({"kind": "word_count", "mim": 1}, ["parameter 'mim'", "did you mean 'min'"]),
        ({"kind": "word_count"}, ["at least one of min, max"]),
        ({"kind": "word_count", "min": None}, ["at least one of min, max"]),
        ({"kind": "word_count", "min": -1}, ["`min`", "whole number", "-1"]),
        ({"kind": "word_count", "min": 1.5}, ["whole number"]),
        ({"kind": "word_count", "min": float("nan")}, ["whole number"]),
        ({"kind": "word_count", "min": float("inf")}, ["whole number"]),
        ({"kind": "word_count", "min": True}, ["whole number"]),
        ({"kind": "word_count", "min": "3"}, ["whole number", "'3'"]),
        ({"kind": "word_count", "min": 5, "max": 4}, ["`min` 5 is greater than `max` 4"]),
        ({"kind": "required_words"}, ["`words` is missing"]),
        ({"kind": "required_words", "words": "cat"}, ["non-empty list", "'cat'"]),
        ({"kind": "required_words", "words": []}, ["non-empty list"]),
        ({"kind": "forbidden_words", "words": ["a", " "]}, ["non-empty strings"]),
        ({"kind": "json", "type": "objct"}, ["object or array", "did you mean 'object'"]),
        ({"kind": "json", "type": "array", "keys": ["a"]}, ["`type` is array"]),
        ({"kind": "case", "value": "UPPER"}, ["upper or lower"]),
        ({"kind": "starts_with", "text": ""}, ["`text`", "non-empty string"]),
        ({"min": 3}, ["`kind` must be one of"]),
        ("word_count", ["expected an object"]),
    ],
)
def test_a_malformed_constraint_is_named(entry: object, fragments: list[str]) -> None:
    """The error names the prompt, the index of the constraint, what is wrong, and the nearest name."""
    with pytest.raises(QualityError) as caught:
        parse_constraints([{"kind": "json"}, entry], prompt_id="p7")
    assert "prompt 'p7', constraint 1" in caught.value.message
    for fragment in fragments:
        assert fragment in caught.value.message


@pytest.mark.parametrize("entries", [[], {}, "json", 3])
def test_constraints_must_be_a_list(entries: object) -> None:
    """What is no list, or an empty one, is refused: a share of nothing is no quality."""
    with pytest.raises(QualityError, match=r"prompt 'p7'.*non-empty list"):
        parse_constraints(entries, prompt_id="p7")


def test_null_parameters_are_absent() -> None:
    """A Parquet struct gives every constraint the parameters of all kinds, null where unused."""
    entry = {"kind": "case", "value": "upper", "min": None, "max": None, "words": None}
    assert is_met("ABC", **entry)


@given(st.text(max_size=300))
def test_counts_hold_for_any_text(text: str) -> None:
    """No text crashes a count, and no count exceeds what it is made of."""
    assert 0 <= constraints.count_sentences(text) <= max(1, len(text))
    assert constraints.count_bullets(text) + constraints.count_numbered(text) <= text.count("\n") + 1
    assert constraints.count_paragraphs(text) <= constraints.count_lines(text) or not text.strip()
    assert constraints.count_words(text) <= len(text)


@given(st.lists(st.sampled_from(["alpha", "it's", "well-known", "3.5"]), max_size=30))
def test_words_joined_by_spaces_are_counted_back(words: list[str]) -> None:
    """The count is that of the words put in."""
    assert constraints.count_words(" ".join(words)) == len(words)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "unit", ["a", " ", "\n", ".", '"', "a.", "- ", "1.", "a-", "_", "*", "\n ", ". ", '."']
)
def test_counts_take_linear_time(unit: str) -> None:
    """Sixty thousand characters of anything are counted at once: a model may repeat itself forever."""
    text = "x" + unit * (60_000 // len(unit)) + "y"
    for kind in ("word", "sentence", "bullet", "numbered", "paragraph", "line", "char"):
        is_met(text, f"{kind}_count", min=1)
