"""The answer stated in a response, compared with the known one by math-verify.

Imported by no other module: ``quality.ExactAnswerScorer`` runs this file as a script, in a process of its own
that it can end. SymPy does not stop at ``9^{9^{9}}`` or ``1000000000!``, which a teacher may write, and
math-verify's own time limits rest on ``signal.alarm``, which works in a main thread only; so they are
switched off here. The process also keeps math-verify's logging and warnings out of ours. As a script the file
imports nothing of PerSyn.
"""

import json
import re
import sys
import unicodedata
from collections.abc import Sequence
from decimal import Decimal
from typing import IO, Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

MAX_TAIL_CHARS = 4000
"""Only the end of a response is read: the answer stands there, and patterns take superlinear time."""
_MAX_STATEMENT_CHARS = 300
_MAX_FORMULA_CHARS = 120

_SPELLINGS = (
    ("\u2212", "-"),  # the minus sign
    ("\\$", ""),
    ("\\%", "%"),
    ("{,}", ","),
    ("\\!", ""),
    ("\u00a0", " "),
    ("\u03c0", "\\pi "),
    ("\u221e", "\\infty "),
    ("°", ""),
)
_DELIMITERS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"))
_BOXED = re.compile(r"\\f?boxed\s*\{")
_STATEMENT = re.compile(
    r"(?:####|\banswer\b[*_`]*(?:\s+to\s+[^.\n]{1,80}?)?\s*(?:\s+is\b|:|=)[*_`]*:?)\s*", re.IGNORECASE
)
_EXPONENT = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?[eE][+-]?\d{1,2}(?!\w)")
_MIXED = re.compile(r"(?<![\d./])(\d{1,6})\s+(\d{1,6})/(\d{1,6})(?![\d/])")
_NUMBER = re.compile(r"[$€£¥₹]?\s*-?\d{1,3}(?:[ ,]\d{3})+(?:\.\d+)?|[$€£¥₹]\s*-?\d*\.?\d+")
_COMMAND = re.compile(r"\\[A-Za-z]+|\b(?:sqrt|sin|cos|tan|log|ln|exp|pi|frac)\b")
_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mathbf|textit)\s*\{([^{}]*)\}")
_ANSWER_WORD = re.compile("answer", re.IGNORECASE)
_BOX_ROW = re.compile(r"\\boxed\{[^\n]{1,80}?\}\$?(?:\s*,?\s*(?:and|or|,)\s*\$?\\boxed\{[^\n]{1,80}?\}\$?)+")
_LETTERS = re.compile(r"[^\W\d_]{2,}")
_MARKUP = re.compile(r"[$*_`\"“”]|\\[()\[\]]")
_WORDS = re.compile(r"[^\W\d_][^\d=^+*/<>\\]*|\([^\W\d_]\)")


def is_equivalent(response: str, answer: str) -> bool:
    """Tell whether the answer that ``response`` states equals ``answer``.

    The stated answer is the last ``\\boxed{}``; without one, what the last "answer is …", "answer: …" or
    "####" states; without that, the last number or formula. Numbers are equal up to 6 decimals, and 50%
    equals both 50 and 0.5; formulas are equal if SymPy can show it; units are dropped. An answer in words
    (``east``, ``(B)``) is compared as text, in any case.

    Args:
        response: The whole response; its last ``MAX_TAIL_CHARS`` characters are read.
        answer: A number, a formula in LaTeX or plain, a word, or a worked solution that ends in ``\\boxed{}``
            or ``####``.
    """
    tail, gold = _normal(response[-MAX_TAIL_CHARS:]), _gold(_normal(answer))
    if _is_words(gold):
        return _same_words(gold, _stated_words(tail))
    golds = _parsed(_as_math(gold))
    readings = (_parsed(text) for text in _candidates(tail))
    return any(bool(verify(golds, stated, timeout_seconds=None)) for stated in readings if golds and stated)


def _normal(text: str) -> str:
    """Spell numbers one way: ASCII digits, ``$`` and ``%`` unescaped, no exponent, 7/2 for 3 1/2."""
    text = "".join(str(unicodedata.decimal(c)) if c.isdecimal() else c for c in text)
    for old, new in _SPELLINGS:
        text = text.replace(old, new)
    text = _EXPONENT.sub(lambda match: format(Decimal(match[0]), "f"), text)
    return _MIXED.sub(lambda m: f"{int(m[1]) * int(m[3]) + int(m[2])}/{m[3]}", text).strip()


def _gold(answer: str) -> str:
    boxed = _last_boxed(answer)
    if boxed is not None:
        return boxed
    return _bare(answer.rpartition("####")[2])


def _bare(text: str) -> str:
    """``text`` without Markdown emphasis, one pair of math delimiters and a full stop."""
    text = text.strip().strip("*_`").strip()
    text = text[:-1].rstrip() if text.endswith(".") else text
    for left, right in _DELIMITERS:
        inner = text[len(left) : -len(right)]
        if text.startswith(left) and text.endswith(right) and inner and left not in inner:
            return inner.strip()
    return text.strip("*_`").strip()


def _last_boxed(text: str) -> str | None:
    """Content of the last ``\\boxed{…}`` whose braces are balanced."""
    for opening in reversed(list(_BOXED.finditer(text))):
        depth = 1
        for i in range(opening.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[i], 0) * (text[i - 1] != "\\")
            if depth == 0:
                return text[opening.end() : i].strip()
    return None


def _candidates(tail: str) -> Sequence[str]:
    """Texts to read the answer from: one, or for a row of boxes the last box and the row."""
    boxed = _last_boxed(tail)
    if boxed is not None:
        rows = [match[0] for match in _BOX_ROW.finditer(tail)]
        return [_as_math(boxed), *rows[-1:]]
    bare = _bare(tail)
    if _is_formula(bare):
        return [_as_math(bare)]
    stated = _statement(tail)[:_MAX_STATEMENT_CHARS].lstrip("*_` ")
    line = _bare(stated.partition("\n")[0])
    text = _as_math(line) if _is_formula(line) else f"The final answer is {stated}"
    if stated and _parsed(text):
        return [text]
    # math-verify prefers a number near the word "answer"; without that word, the last number counts.
    return [_ANSWER_WORD.sub("result", tail)]


def _statement(tail: str) -> str:
    """What follows the last "answer is", "answer:" or "####"; empty if there is none."""
    ends = [match.end() for match in _STATEMENT.finditer(tail)]
    return tail[ends[-1] :].strip() if ends else ""


def _is_formula(text: str) -> bool:
    """Whether ``text`` is one formula and nothing else, such as ``2\\sqrt{3}`` or ``x^2+1``."""
    if not text or len(text) > _MAX_FORMULA_CHARS or "\n" in text or "$" in text:
        return False
    return _LETTERS.search(_COMMAND.sub(" ", _TEXT.sub(" ", text))) is None


def _as_math(text: str) -> str:
    """``text`` in the form in which math-verify reads all of it."""
    return text if _NUMBER.fullmatch(text) else f"\\boxed{{{text}}}"


def _is_words(gold: str) -> bool:
    return _WORDS.fullmatch(_TEXT.sub(r"\1", gold)) is not None


def _stated_words(tail: str) -> str:
    boxed = _last_boxed(tail)
    if boxed is not None:
        return boxed
    return _statement(tail).partition("\n")[0] or tail.rpartition("\n")[2]


def _same_words(gold: str, stated: str) -> bool:
    """Whether ``stated`` is ``gold``, or starts with it and goes on behind a mark: ``(B) because …``."""
    gold = _plain(gold).strip("(). ")
    return re.match(rf"\(?{re.escape(gold)}(?:\s*$|\s*[.,;:)!])", _plain(stated)) is not None


def _plain(text: str) -> str:
    return " ".join(_MARKUP.sub("", _TEXT.sub(r"\1", text)).casefold().split())


def _parsed(text: str) -> list[Any]:
    extraction = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    return list(parse(text, extraction, parsing_timeout=None))


def serve(requests: IO[str], replies: IO[str]) -> None:
    """Say ``ready``, then answer each line ``{"response": …, "answer": …}`` with a line ``1`` or ``0``."""
    replies.write("ready\n")
    replies.flush()
    for line in requests:
        request = json.loads(line)
        replies.write(f"{int(is_equivalent(request['response'], request['answer']))}\n")
        replies.flush()


if __name__ == "__main__":
    serve(sys.stdin, sys.stdout)
