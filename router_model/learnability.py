"""Learnability: how likely the student already finds a teacher's response.

Equation (1) of PerSyn (arXiv 2510.10925): the mean log-probability per response token under the student
before any training, in nats, with the prompt as context through the student's chat template:

    r_l(y, theta) = (1 / |y|) * sum_t log p_theta(y_t | y_<t, x)

Only response tokens count; the end-of-turn token is not one of them (see ``encode_chat_pair``).

All teachers answer the same prompt, so a prompt is read once for all its responses: the responses follow
it in one row, each at the positions right after the prompt, and a mask lets each see the prompt and
itself alone. A student whose layers do not take such a mask reads prompt and response pair by pair.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from clients.types import ChatMessage
from router_model.backbone import (
    length_batches,
    load_pretrained,
    load_tokenizer,
    locate_model,
    max_positions,
)
from router_model.errors import RouterError
from router_model.tokenization import encode_chat_prompt, plain_ids

MAX_PROMPT_TOKENS = 2048
"""A longer prompt keeps its end, where the response begins."""

MAX_RESPONSE_TOKENS = 512
"""A longer response keeps its beginning."""

_CHARS_PER_TOKEN = 32
"""Characters of a response read per token of its limit; real text has 1 to 6."""

_ROW_TOKENS = 512
"""Length of a packed row: the cost of attention grows with its square, matrix products are full by then."""

_LOGIT_ROWS = 512
"""Positions whose logits exist at once: 512 x 49152 float32 are 100 MB."""

_TOLERANCE_NATS = 1e-3


@dataclass(frozen=True, slots=True)
class LearnabilityScore:
    """Learnability of one response.

    Attributes:
        mean_logprob: Nats per response token, at most 0. NaN for a response without tokens, whose mean is
            undefined: the caller treats it as a missing cell, never as a number.
        n_tokens: Response tokens that count.
        truncated: Whether the prompt or the response was cut to its limit.
    """

    mean_logprob: float
    n_tokens: int
    truncated: bool


@dataclass(frozen=True, slots=True, eq=False)
class Student:
    """The model to be trained, as it is before training. Made by ``load_student``; used from one thread.

    Attributes:
        body: The model without its output layer, or ``None`` if its logits are more than that layer.
        head: The output layer, hidden states to logits.
        shared_tokens: Length of prompt and response up to which a prompt can be shared by its responses:
            0 for recurrent layers, the window for sliding attention.
    """

    name: str
    model: Any
    tokenizer: Any
    max_prompt_tokens: int
    max_response_tokens: int
    body: Any
    head: Callable[[torch.Tensor], torch.Tensor]
    shared_tokens: float


@dataclass(frozen=True, slots=True)
class _Pair:
    index: int
    prompt: tuple[int, ...]
    response: tuple[int, ...]
    truncated: bool

    @property
    def n_tokens(self) -> int:
        return len(self.prompt) + len(self.response)


@dataclass(slots=True)
class _Row:
    """One sequence for the model: prompts, each followed by some of its responses."""

    groups: list[tuple[tuple[int, ...], list[_Pair]]] = field(default_factory=list)
    n_tokens: int = 0

    def room_for(self, pair: _Pair) -> int:
        """Tokens that the pair would add."""
        shared = bool(self.groups) and self.groups[-1][0] == pair.prompt
        return len(pair.response) if shared else pair.n_tokens

    def add(self, pair: _Pair) -> None:
        self.n_tokens += self.room_for(pair)
        if not self.groups or self.groups[-1][0] != pair.prompt:
            self.groups.append((pair.prompt, []))
        self.groups[-1][1].append(pair)


@dataclass(frozen=True, slots=True, eq=False)
class _Batch:
    """Rows padded on the right. A token's branch is its response or prompt, its root its prompt."""

    pairs: list[_Pair]
    ids_BT: torch.Tensor
    positions_BT: torch.Tensor
    branch_BT: torch.Tensor
    root_BT: torch.Tensor
    picked: torch.Tensor
    """Index into the flattened rows of the token before each response token."""
    targets: torch.Tensor


def load_student(name: str) -> Student:
    """Load a student in float32 on the CPU: hub id, local folder or ``.gguf`` file.

    Raises:
        BackboneError: It cannot be loaded.
    """
    source = locate_model(name)
    return make_student(name, load_pretrained(AutoModelForCausalLM, source), load_tokenizer(source))


def make_student(name: str, model: Any, tokenizer: Any) -> Student:
    """A student of a loaded causal language model, after a look at what its layers can do."""
    positions = max_positions(model) or MAX_PROMPT_TOKENS + MAX_RESPONSE_TOKENS
    max_response_tokens = min(MAX_RESPONSE_TOKENS, positions // 2)
    head = model.get_output_embeddings()
    parts = {
        "name": name,
        "model": model,
        "tokenizer": tokenizer,
        "max_prompt_tokens": min(MAX_PROMPT_TOKENS, positions - max_response_tokens),
        "max_response_tokens": max_response_tokens,
        "head": head,
    }
    whole = Student(**parts, body=None, shared_tokens=0)
    split = Student(**parts, body=model.base_model, shared_tokens=0)
    student = split if head is not None and _agrees(split, whole, shared=False) else whole
    window = _attention_window(model.config.get_text_config())
    if window and _agrees(student, student, shared=True):
        return Student(**parts, body=student.body, shared_tokens=window)
    return student


def score_learnability(
    student: Student,
    pairs: Sequence[tuple[Sequence[ChatMessage], str]],
    *,
    token_budget: int = 4096,
    progress: Callable[[int], None] | None = None,
) -> list[LearnabilityScore]:
    """Mean log-probability of each response, in input order.

    A prompt keeps its last ``MAX_PROMPT_TOKENS`` tokens, a response its first ``MAX_RESPONSE_TOKENS``, fewer
    for a student with fewer positions. Company and order change a value by less than 1e-3 nats.

    Args:
        student: From ``load_student``.
        pairs: Prompt messages and response. Pairs of one prompt share its cost if they come in one call.
        token_budget: Padded tokens per forward pass; a longer pair goes alone.
        progress: Called with the number of pairs done since the last call.

    Raises:
        RouterError: The student's chat template does not take a prompt; ``details["index"]`` says which.
    """
    scores: dict[int, LearnabilityScore] = {}
    filled: list[_Pair] = []
    for pair in _encode(student, pairs):
        if pair.response:
            filled.append(pair)
        else:
            scores[pair.index] = LearnabilityScore(math.nan, 0, pair.truncated)
    if progress is not None and scores:
        progress(len(scores))
    for rows, shared in _batches(student, filled, token_budget):
        batch = _make_batch(rows)
        logprobs = _token_logprobs(student, batch, shared=shared).double()
        parts = torch.split_with_sizes(logprobs, [len(pair.response) for pair in batch.pairs])
        for pair, part in zip(batch.pairs, parts, strict=True):
            scores[pair.index] = LearnabilityScore(float(part.mean()), len(part), pair.truncated)
        if progress is not None:
            progress(len(batch.pairs))
    return [scores[index] for index in range(len(pairs))]


def _encode(student: Student, pairs: Sequence[tuple[Sequence[ChatMessage], str]]) -> Iterator[_Pair]:
    max_chars = student.max_response_tokens * _CHARS_PER_TOKEN
    responses = plain_ids(student.tokenizer, [response[:max_chars] for _, response in pairs])
    for index, ((messages, text), response) in enumerate(zip(pairs, responses, strict=True)):
        try:
            prompt = encode_chat_prompt(student.tokenizer, messages)
        except RouterError as error:
            raise RouterError(f"pair {index}: {error.message}", details={"index": index}) from error
        kept = response[: student.max_response_tokens]
        cut = len(prompt) > student.max_prompt_tokens or len(kept) < len(response) or len(text) > max_chars
        # Without template and beginning-of-text token an empty prompt has no token to predict from.
        context = tuple(prompt[-student.max_prompt_tokens :]) or (student.tokenizer.eos_token_id or 0,)
        yield _Pair(index, context, tuple(kept), cut)


def _batches(student: Student, pairs: list[_Pair], token_budget: int) -> Iterator[tuple[list[_Row], bool]]:
    """Rows that go through the model together, and whether their pairs share prompts."""
    sharing = [pair for pair in pairs if pair.n_tokens <= student.shared_tokens]
    alone = [pair for pair in pairs if pair.n_tokens > student.shared_tokens]
    for rows, shared in ((_pack(sharing, token_budget), True), (_pack(alone, 0), False)):
        for batch in length_batches([row.n_tokens for row in rows], token_budget=token_budget):
            yield [rows[index] for index in batch], shared


def _pack(pairs: list[_Pair], token_budget: int) -> list[_Row]:
    """Rows of pairs. A row ends at ``_ROW_TOKENS``, later if most of it would be a long prompt again."""
    rows: list[_Row] = []
    for pair in sorted(pairs, key=lambda pair: (len(pair.prompt), pair.prompt, len(pair.response))):
        limit = min(token_budget, max(_ROW_TOKENS, 3 * len(pair.prompt)))
        if not rows or rows[-1].n_tokens + rows[-1].room_for(pair) > limit:
            rows.append(_Row())
        rows[-1].add(pair)
    return rows


def _make_batch(rows: Sequence[_Row]) -> _Batch:
    width = max(row.n_tokens for row in rows)
    ids_BT = torch.zeros(len(rows), width, dtype=torch.long)
    positions_BT = torch.zeros_like(ids_BT)
    branch_BT = torch.full_like(ids_BT, -1)
    root_BT = torch.full_like(ids_BT, -1)
    pairs: list[_Pair] = []
    picked: list[int] = []
    for row_index, row in enumerate(rows):
        start = 0
        for prompt, members in row.groups:
            root = start
            pieces = [(prompt, 0), *((pair.response, len(prompt)) for pair in members)]
            for piece, position in pieces:
                end = start + len(piece)
                ids_BT[row_index, start:end] = torch.tensor(piece)
                positions_BT[row_index, start:end] = torch.arange(position, position + len(piece))
                branch_BT[row_index, start:end] = start
                root_BT[row_index, start:end] = root
                if position:
                    before = [root + len(prompt) - 1, *range(start, end - 1)]
                    picked += [row_index * width + slot for slot in before]
                start = end
            pairs += members
    targets = torch.tensor([token for pair in pairs for token in pair.response])
    return _Batch(pairs, ids_BT, positions_BT, branch_BT, root_BT, torch.tensor(picked), targets)


def _token_logprobs(student: Student, batch: _Batch, *, shared: bool) -> torch.Tensor:
    """Log-probability of each response token, float32, pair after pair."""
    inputs: dict[str, Any] = {"input_ids": batch.ids_BT, "use_cache": False}
    if shared:
        inputs |= {"attention_mask": _branch_mask(batch), "position_ids": batch.positions_BT}
    else:
        inputs["attention_mask"] = (batch.branch_BT >= 0).long()
    with torch.inference_mode():
        if student.body is None:
            states = student.model(**inputs).logits.flatten(0, 1)[batch.picked]
        else:
            states = student.body(**inputs).last_hidden_state.flatten(0, 1)[batch.picked]
        logprobs = []
        for start in range(0, len(states), _LOGIT_ROWS):
            part, targets = states[start : start + _LOGIT_ROWS], batch.targets[start : start + _LOGIT_ROWS]
            logits = (part if student.body is None else student.head(part)).float()
            chosen = logits.gather(1, targets[:, None])[:, 0]
            logprobs.append(chosen - logits.logsumexp(dim=1))
    return torch.cat(logprobs)


def _branch_mask(batch: _Batch) -> torch.Tensor:
    """Additive mask (B, 1, T, T): a token sees its own branch and its prompt, up to itself."""
    branch_BT, root_BT = batch.branch_BT, batch.root_BT
    same_BTT = branch_BT[:, :, None] == branch_BT[:, None, :]
    prompt_BTT = root_BT[:, :, None] == branch_BT[:, None, :]
    allowed_BTT = (same_BTT | prompt_BTT).tril()
    mask_BTT = torch.zeros(allowed_BTT.shape).masked_fill(~allowed_BTT, torch.finfo(torch.float32).min)
    return mask_BTT[:, None]


def _attention_window(config: Any) -> float:
    """Tokens over which every layer attends to all that came before; 0 with recurrent layers."""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if not all(kind.endswith("attention") and "linear" not in kind for kind in kinds):
        return 0
    # A custom mask stands for all layers, so nothing may reach beyond the narrowest of them.
    widths = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return min((float(width) for width in widths if width), default=math.inf)


def _agrees(student: Student, plain: Student, *, shared: bool) -> bool:
    """Whether a faster way through the model gives the log-probabilities of the plain way, on a probe."""
    size = int(student.model.config.get_text_config().vocab_size)
    prompt = tuple(token % size for token in (11, 23, 5, 42, 17))
    responses = [tuple(token % size for token in tokens) for tokens in ((31, 8, 77), (9, 64, 3, 12))]
    pairs = [_Pair(index, prompt, response, truncated=False) for index, response in enumerate(responses)]
    try:
        fast = _token_logprobs(
            student, _make_batch(_pack(pairs, _ROW_TOKENS if shared else 0)), shared=shared
        )
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        return False  # not made for such inputs: the plain way stays
    expected = _token_logprobs(plain, _make_batch(_pack(pairs, 0)), shared=False)
    return fast.shape == expected.shape and bool((fast - expected).abs().max() < _TOLERANCE_NATS)
