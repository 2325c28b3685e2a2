"""Prompts of four kinds, each with a teacher that is best at it: to train the router and compare engines."""

import random
from collections.abc import Iterator
from itertools import islice

from tests.bench.route.prompts import Passages, mixed_lengths

TEACHERS = ("calculator", "coder", "poet", "scholar")
"""In the order of the kinds."""

_SHORT = (
    (
        "What is {a} plus {b}?",
        "Multiply {a} by {b}.",
        "Is {a} a prime number?",
        "Divide {a} by {b} and round to two digits.",
        "A train covers {a} miles in {b} hours. How fast is it?",
        "Solve {a}x + {b} = 0 for x.",
    ),
    (
        "Write a Python function that returns the {a} largest of {b} numbers.",
        "Why does my loop over {a} rows raise an IndexError after {b} steps?",
        "Reverse a linked list of {a} nodes in C.",
        "Give me a regular expression for {a} to {b} digits.",
        "Refactor a class with {a} methods and {b} globals.",
        "Write a SQL query for the {a} best customers of {b} stores.",
    ),
    (
        "Write a poem about {a} ravens and {b} doves.",
        "A haiku on {a} autumn leaves, please.",
        "Compose {a} lines on the sea and {b} on the shore.",
        "Sing of {a} lost ships.",
        "A love letter in {a} verses that names {b} flowers.",
        "Rhyme something with {a} moons.",
    ),
    (
        "Who ruled Rome in the year {a}?",
        "Name {a} causes of the war of {b}.",
        "Explain to a child of {a} why the sky is blue.",
        "What happened to the library of Alexandria in {a} BC?",
        "Compare {a} theories of how {b} languages spread.",
        "Which {a} rivers flow through {b} countries?",
    ),
)
_OVER_PASSAGES = (
    "Count the words of this text and square the number:\n\n{text}",
    "Write the code that this describes:\n\n{text}",
    "Turn this into verse:\n\n{text}",
    "Summarise this for a lecture:\n\n{text}",
)
_SHORTEST_PASSAGE, _LONGEST_PASSAGE = 16, 160


def task_prompts(n_prompts: int, *, seed: int) -> list[tuple[int, str]]:
    """Different prompts, each with its kind; the kinds take turns, and half of them quote a passage."""
    seen: dict[str, int] = {}
    tasks = _tasks(seed, n_prompts)
    while len(seen) < n_prompts:
        kind, text = next(tasks)
        seen.setdefault(text, kind)
    return [(kind, text) for text, kind in islice(seen.items(), n_prompts)]


def _tasks(seed: int, n_prompts: int) -> Iterator[tuple[int, str]]:
    draw = random.Random(seed)
    passages = Passages(seed)
    lengths = mixed_lengths(n_prompts, shortest=_SHORTEST_PASSAGE, longest=_LONGEST_PASSAGE)
    turn = 0
    while True:
        for kind, templates in enumerate(_SHORT):
            yield kind, draw.choice(templates).format(a=draw.randrange(2, 2000), b=draw.randrange(2, 100))
            text = passages.cut(lengths[turn % n_prompts])
            turn += 1
            yield kind, _OVER_PASSAGES[kind].format(text=text)
