"""Responses as branches of their prompts: rows in which a prompt stands once for all that follows it.

A branch is a response, or a part of one, at the positions right after its prompt. Branches of one prompt
stand behind it in one row, and a mask lets each see the prompt and itself alone.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from router_model.batches import length_batches

_ROW_TOKENS = 512
"""Length of a packed row: the cost of attention grows with its square, matrix products are full by then."""


@dataclass(frozen=True, slots=True)
class Branch:
    """Tokens after a prompt.

    Attributes:
        index: Of the response among all responses.
        step: 0 for the whole response, else the number of the step whose tokens are scored.
        n_given: Leading tokens that are context and not scored.
    """

    index: int
    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    step: int = 0
    n_given: int = 0

    @property
    def n_tokens(self) -> int:
        """Tokens of prompt and branch."""
        return len(self.prompt) + len(self.tokens)

    @property
    def scored(self) -> tuple[int, ...]:
        """The tokens that are scored."""
        return self.tokens[self.n_given :]


@dataclass(slots=True)
class Row:
    """One sequence for the model: prompts, each followed by some of its branches."""

    groups: list[tuple[tuple[int, ...], list[Branch]]] = field(default_factory=list)
    n_tokens: int = 0

    def room_for(self, branch: Branch) -> int:
        """Tokens that the branch would add."""
        shared = bool(self.groups) and self.groups[-1][0] == branch.prompt
        return len(branch.tokens) if shared else branch.n_tokens

    def add(self, branch: Branch) -> None:
        """Put a branch behind its prompt."""
        self.n_tokens += self.room_for(branch)
        if not self.groups or self.groups[-1][0] != branch.prompt:
            self.groups.append((branch.prompt, []))
        self.groups[-1][1].append(branch)


@dataclass(frozen=True, slots=True, eq=False)
class BranchBatch:
    """Rows padded on the right. ``branch_BT`` and ``root_BT`` are -1 in the padding."""

    branches: list[Branch]
    ids_BT: torch.Tensor
    positions_BT: torch.Tensor
    branch_BT: torch.Tensor
    """Slot at which the token's branch or prompt begins."""
    root_BT: torch.Tensor
    """Slot at which the token's prompt begins."""
    picked: torch.Tensor
    """Index into the flattened rows of the token before each scored token."""
    targets: torch.Tensor
    """The scored tokens, branch after branch."""

    def padding_mask(self) -> torch.Tensor:
        """1 for a token, 0 in the padding, BT: for rows of one branch."""
        return (self.branch_BT >= 0).long()

    def branch_mask(self) -> torch.Tensor:
        """Additive mask (B, 1, T, T): a token sees its own branch and its prompt, up to itself."""
        same_BTT = self.branch_BT[:, :, None] == self.branch_BT[:, None, :]
        prompt_BTT = self.root_BT[:, :, None] == self.branch_BT[:, None, :]
        allowed_BTT = (same_BTT | prompt_BTT).tril()
        mask_BTT = torch.zeros(allowed_BTT.shape).masked_fill(~allowed_BTT, torch.finfo(torch.float32).min)
        return mask_BTT[:, None]


def branch_batches(
    branches: Sequence[Branch], *, token_budget: int, shared_tokens: float
) -> Iterator[tuple[list[Row], bool]]:
    """Rows that go through the model together, and whether their branches share prompts.

    Args:
        token_budget: Padded tokens per batch; a longer branch goes alone.
        shared_tokens: Length of prompt and branch up to which a prompt may be shared.
    """
    sharing = [branch for branch in branches if branch.n_tokens <= shared_tokens]
    alone = [branch for branch in branches if branch.n_tokens > shared_tokens]
    for rows, shared in ((pack(sharing, token_budget), True), (pack(alone, 0), False)):
        for batch in length_batches([row.n_tokens for row in rows], token_budget=token_budget):
            yield [rows[index] for index in batch], shared


def pack(branches: Sequence[Branch], token_budget: int = _ROW_TOKENS) -> list[Row]:
    """Rows of branches; with a budget of 0 one row for each.

    A row ends at 512 tokens, later if most of it would be a long prompt again.
    """
    rows: list[Row] = []
    for branch in sorted(
        branches, key=lambda branch: (len(branch.prompt), branch.prompt, len(branch.tokens))
    ):
        limit = min(token_budget, max(_ROW_TOKENS, 3 * len(branch.prompt)))
        if not rows or rows[-1].n_tokens + rows[-1].room_for(branch) > limit:
            rows.append(Row())
        rows[-1].add(branch)
    return rows


def make_batch(rows: Sequence[Row]) -> BranchBatch:
    """The tensors of some rows, each as wide as the longest."""
    width = max(row.n_tokens for row in rows)
    ids_BT = torch.zeros(len(rows), width, dtype=torch.long)
    positions_BT = torch.zeros_like(ids_BT)
    branch_BT = torch.full_like(ids_BT, -1)
    root_BT = torch.full_like(ids_BT, -1)
    branches: list[Branch] = []
    picked: list[int] = []
    for row_index, row in enumerate(rows):
        start = 0
        for prompt, members in row.groups:
            root = start
            # A prompt is all context: none of its tokens is scored.
            pieces = [(prompt, 0, len(prompt)), *((b.tokens, len(prompt), b.n_given) for b in members)]
            for piece, position, n_given in pieces:
                end = start + len(piece)
                ids_BT[row_index, start:end] = torch.tensor(piece)
                positions_BT[row_index, start:end] = torch.arange(position, position + len(piece))
                branch_BT[row_index, start:end] = start
                root_BT[row_index, start:end] = root
                before = [root + len(prompt) - 1, *range(start, end - 1)]
                picked += [row_index * width + slot for slot in before[n_given:]]
                start = end
            branches += members
    targets = torch.tensor([token for branch in branches for token in branch.scored])
    return BranchBatch(branches, ids_BT, positions_BT, branch_BT, root_BT, torch.tensor(picked), targets)
