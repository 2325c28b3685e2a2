"""Prompts of different lengths in batches of bounded size."""

from collections.abc import Iterator, Sequence


def length_batches(lengths: Sequence[int], *, token_budget: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, longest batch last, each within the budget of padded tokens.

    One item that is longer than the budget is a batch of its own.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[index] > token_budget:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def token_batches(lengths: Sequence[int], *, token_budget: int) -> Iterator[list[int]]:
    """Indices in order, in batches within the budget of tokens; one item above the budget goes alone."""
    batch: list[int] = []
    n_tokens = 0
    for index, length in enumerate(lengths):
        if batch and n_tokens + length > token_budget:
            yield batch
            batch, n_tokens = [], 0
        batch.append(index)
        n_tokens += length
    if batch:
        yield batch
