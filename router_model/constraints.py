"""Constraints on a response that a machine can check: lengths, lists, words, JSON, case, edges."""

import difflib
import json
import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NoReturn

from router_model.errors import QualityError

Params = Mapping[str, Any]

_MAX_JSON_CHARS = 1_000_000
"""Longer text is not parsed as JSON: no useful response is that long."""

# Apostrophes and hyphens (also typographic ones) join a word, a point or comma joins the digits of a number.
_WORD = re.compile("[^\\W_]+(?:(?:['\u2019\\-\u2010\u2011]|_+|(?<=\\d)[.,](?=\\d))[^\\W_]+)*")
# A marker needs a space behind it, or it is emphasis (`**bold**`) or a negative number; `* * *` is a rule.
_BULLET = re.compile(r"^[ \t]*(?:[-*+][ \t]+|•[ \t]*)(?![-*+ \t]*$)\S", re.MULTILINE)
_NUMBERED = re.compile(r"^[ \t]*\d{1,9}[.)][ \t]+\S", re.MULTILINE)
_BLANK_LINES = re.compile(r"\n[ \t\r\f\v]*\n\s*")
_FENCE = re.compile(r"\A```(?:json)?[ \t]*\n(?P<body>.*?)\n?[ \t]*```\Z", re.DOTALL | re.IGNORECASE)
# \uff01 and \uff1f are the full-width ! and ?: like the ideographic full stop they need no space behind.
# The possessive quantifiers keep the time linear.
_TERMINATOR = re.compile(
    "(?<![.!?\u2026\u3002\uff01\uff1f])(?P<mark>[.!?\u2026\u3002\uff01\uff1f]++)[\"'\u2019\u201d\u00bb)\\]*_]*+"
    "(?P<gap>\\s+|\\Z|(?<=[\u3002\uff01\uff1f]))"
)
_ABBREVIATION = re.compile(
    r"\b(?i:mr|mrs|ms|dr|prof|sr|jr|st|vs|cf|al|dept|gen|col|capt|rev|hon)\Z"
    r"|\b(?i:(?:[a-z]\.)+[a-z])\Z"  # e.g  i.e  U.S  a.m
    r"|(?:^|\s)[A-HJ-Z]\Z",  # an initial: J. Smith
)
_BEFORE_NUMBER = re.compile(r"\b(?i:no|nos|fig|figs|eq|eqs|vol|p|pp|approx|ca|ch|sec)\Z")
_LIST_MARKER = re.compile(r"(?:\A|\n)[ \t]*\d{1,9}\Z")


@dataclass(frozen=True, slots=True)
class _Kind:
    """One kind of constraint: its parameters (name → validator) and its test."""

    parameters: Mapping[str, Callable[[Any], str | None]]
    is_met: Callable[[str, Params], bool]
    required: tuple[str, ...] = ()
    needs_one: bool = False
    """Whether at least one parameter must be there: a count without a bound says nothing."""


@dataclass(frozen=True, slots=True)
class Constraint:
    """A validated constraint. Made by ``parse_constraints`` only."""

    kind: str
    params: Params

    def is_met(self, response: str) -> bool:
        """Tell whether ``response`` (any text, not stripped) meets the constraint."""
        return _kinds()[self.kind].is_met(response.strip(), self.params)


def parse_constraints(entries: object, *, prompt_id: str) -> tuple[Constraint, ...]:
    """Validate what stands in ``constraints`` of a prompt row.

    Args:
        entries: A non-empty list of objects ``{"kind": …, parameters…}``.
        prompt_id: Named in errors.

    Raises:
        QualityError: Names the prompt, the 0-based index of the constraint, what is wrong, and the nearest
            valid name where a name is wrong.
    """
    if not isinstance(entries, list | tuple) or not entries:
        raise QualityError(
            f"prompt {prompt_id!r}: `constraints` must be a non-empty list of objects, got {_shown(entries)}"
        )
    return tuple(_parse(entry, f"prompt {prompt_id!r}, constraint {i}") for i, entry in enumerate(entries))


def _parse(entry: object, where: str) -> Constraint:
    if not isinstance(entry, Mapping):
        raise QualityError(f"{where}: expected an object with a `kind`, got {_shown(entry)}")
    kinds = _kinds()
    name = entry.get("kind")
    if not isinstance(name, str):
        raise QualityError(f"{where}: `kind` must be one of {', '.join(kinds)}; got {_shown(name)}")
    if name not in kinds:
        _raise_unknown(where, "kind", name, tuple(kinds))
    kind = kinds[name]
    # A Parquet struct column fills the parameters of other kinds with null: null means "not given".
    params = {str(key): value for key, value in entry.items() if key != "kind" and value is not None}
    for key, value in params.items():
        if key not in kind.parameters:
            _raise_unknown(f"{where} ({name})", "parameter", key, tuple(kind.parameters))
        problem = kind.parameters[key](value)
        if problem is not None:
            raise QualityError(f"{where} ({name}): `{key}` {problem}, got {_shown(value)}")
    _check_presence(kind, params, f"{where} ({name})")
    return Constraint(name, params)


def _check_presence(kind: _Kind, params: Params, where: str) -> None:
    missing = [key for key in kind.required if key not in params]
    if missing:
        raise QualityError(f"{where}: parameter `{missing[0]}` is missing")
    if kind.needs_one and not params:
        raise QualityError(f"{where}: needs at least one of {', '.join(kind.parameters)}")
    if "min" in params and "max" in params and params["min"] > params["max"]:
        raise QualityError(f"{where}: `min` {params['min']} is greater than `max` {params['max']}")
    if params.get("type") == "array" and "keys" in params:
        raise QualityError(f"{where}: `keys` are keys of an object, but `type` is array")


def _raise_unknown(where: str, noun: str, name: str, valid: tuple[str, ...]) -> NoReturn:
    near = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise QualityError(
        f"{where}: unknown {noun} {_shown(name)}; {hint}valid: {', '.join(valid)}",
        details={"unknown": name, "nearest": near[0] if near else None},
    )


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def count_words(text: str) -> int:
    """Number of words: runs of letters and digits; ``don't``, ``well-known`` and ``3.5`` are one word each.

    Scripts without spaces between words, such as Chinese, count one word per run.
    """
    if not text.isascii():
        # Vowel signs and combining accents are no letters to `re`: they would cut words in two.
        text = "".join(char for char in text if not unicodedata.category(char).startswith("M"))
    return len(_WORD.findall(text))


def count_bullets(text: str) -> int:
    """Number of lines that start with ``-``, ``*``, ``+`` or ``•``, a space, and something."""
    return len(_BULLET.findall(text))


def count_numbered(text: str) -> int:
    """Number of lines that start with ``1.`` or ``1)``, a space, and something."""
    return len(_NUMBERED.findall(text))


def count_paragraphs(text: str) -> int:
    """Number of blocks parted by at least one blank line."""
    return sum(1 for block in _BLANK_LINES.split(text.strip()) if block)


def count_lines(text: str) -> int:
    """Number of lines that are not blank."""
    return sum(1 for line in text.splitlines() if line.strip())


def count_sentences(text: str) -> int:
    """Number of sentences.

    A sentence ends at ``.``, ``!``, ``?`` or an ellipsis, with closing quotes or brackets behind it, before
    white space or the end; a blank line, and text after the last mark, end one too. Decimal points,
    abbreviations, initials and list numbers end none; nor does a mark before a small letter on the same line,
    unless the text has no capitals at all.
    """
    has_capitals = any(char.isupper() for char in text)
    return sum(_sentences_in_block(block, has_capitals) for block in _BLANK_LINES.split(text.strip()))


def sentence_starts(block: str) -> list[int]:
    """Character at which each sentence of a text without blank lines begins; the first begins at 0.

    Sentences end as for ``count_sentences``. Marks without a word belong to the sentence before them.
    """
    has_capitals = any(char.isupper() for char in block)
    ends = [
        match.end() for match in _TERMINATOR.finditer(block) if _ends_sentence(block, match, has_capitals)
    ]
    starts = [0]
    for start, end in pairwise([*ends, len(block)]):
        if _WORD.search(block, start, end):
            starts.append(start)
    return starts


def _sentences_in_block(block: str, has_capitals: bool) -> int:
    n_sentences, start = 0, 0
    for match in _TERMINATOR.finditer(block):
        if not _ends_sentence(block, match, has_capitals):
            continue
        n_sentences += _WORD.search(block, start, match.start()) is not None
        start = match.end()
    return n_sentences + (_WORD.search(block, start) is not None)


def _ends_sentence(block: str, match: re.Match[str], has_capitals: bool) -> bool:
    before, following = (
        block[max(0, match.start() - 32) : match.start()],
        block[match.end() : match.end() + 1],
    )
    if not following:
        return True
    if has_capitals and following.islower() and "\n" not in match["gap"]:
        return False  # `"Really?" she asked`, `wait... what`
    if match["mark"] != ".":
        return True
    if _ABBREVIATION.search(before) or _LIST_MARKER.search(before):
        return False
    return not (following.isdigit() and _BEFORE_NUMBER.search(before))


def has_phrase(text: str, phrase: str) -> bool:
    """Whether the words of ``phrase`` stand in ``text`` as whole words, in any case and spacing."""
    pattern = r"\s+".join(re.escape(part) for part in _folded(phrase).split())
    return re.search(rf"(?<!\w){pattern}(?!\w)", _folded(text)) is not None


def _folded(text: str) -> str:
    return unicodedata.normalize("NFC", text).casefold().replace("\u2019", "'")


def parse_json(text: str) -> tuple[bool, Any]:
    """Parse a whole text as JSON (RFC 8259).

    One fence of three backticks (``json`` or no language) around all of it is accepted: chat models write it
    even when asked for JSON alone. NaN and Infinity are not JSON, nor is text nested too deep to parse.

    Returns:
        Whether it is JSON, and its value.
    """
    stripped = text.strip()
    fence = _FENCE.match(stripped)
    body = fence["body"] if fence else stripped
    if len(body) > _MAX_JSON_CHARS:
        return False, None
    try:
        return True, json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return False, None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _is_json(text: str, params: Params) -> bool:
    valid, value = parse_json(text)
    expected = {"object": dict, "array": list}.get(params.get("type", ""), object)
    keys = params.get("keys", ())
    if not valid or not isinstance(value, expected):
        return False
    return not keys or (isinstance(value, dict) and all(key in value for key in keys))


def _has_case(text: str, params: Params) -> bool:
    # str.isupper and str.islower look at cased letters only and demand at least one.
    return text.isupper() if params["value"] == "upper" else text.islower()


def _within(count: Callable[[str], int]) -> _Kind:
    def is_met(text: str, params: Params) -> bool:
        n = count(text)
        return bool(params.get("min", n) <= n <= params.get("max", n))

    return _Kind({"min": _check_count, "max": _check_count}, is_met, needs_one=True)


def _check_count(value: Any) -> str | None:
    whole = isinstance(value, int | float) and not isinstance(value, bool) and value >= 0 and value % 1 == 0
    return None if whole else "must be a whole number of at least 0"


def _check_text(value: Any) -> str | None:
    return None if isinstance(value, str) and value.strip() else "must be a non-empty string"


def _check_texts(value: Any) -> str | None:
    valid = isinstance(value, list | tuple) and value and not any(_check_text(item) for item in value)
    return None if valid else "must be a non-empty list of non-empty strings"


def _one_of(*choices: str) -> Callable[[Any], str | None]:
    def check(value: Any) -> str | None:
        if isinstance(value, str) and value in choices:
            return None
        near = difflib.get_close_matches(str(value), choices, n=1)
        return f"must be {' or '.join(choices)}" + (f" (did you mean {near[0]!r}?)" if near else "")

    return check


def _kinds() -> Mapping[str, _Kind]:
    """Every kind of constraint, by name."""
    words = {"words": _check_texts}
    text = {"text": _check_text}
    return {
        "word_count": _within(count_words),
        "sentence_count": _within(count_sentences),
        "bullet_count": _within(count_bullets),
        "numbered_count": _within(count_numbered),
        "paragraph_count": _within(count_paragraphs),
        "line_count": _within(count_lines),
        "char_count": _within(len),
        "required_words": _Kind(words, lambda t, p: all(has_phrase(t, w) for w in p["words"]), ("words",)),
        "forbidden_words": _Kind(
            words, lambda t, p: not any(has_phrase(t, w) for w in p["words"]), ("words",)
        ),
        "json": _Kind({"type": _one_of("object", "array"), "keys": _check_texts}, _is_json),
        "case": _Kind({"value": _one_of("upper", "lower")}, _has_case, ("value",)),
        "starts_with": _Kind(text, lambda t, p: t.startswith(p["text"].strip()), ("text",)),
        "ends_with": _Kind(text, lambda t, p: t.endswith(p["text"].strip()), ("text",)),
    }
