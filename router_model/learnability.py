"""Learnability: how close a teacher's response is to what the student itself would say.

One forward pass of the student before any training, with the prompt as context through the student's chat
template, gives the log-probability and the rank of each response token; ``learnability_measures`` makes
numbers of them. The mean log-probability is equation (1) of PerSyn (arXiv 2510.10925), in nats:

    r_l(y, theta) = (1 / |y|) * sum_t log p_theta(y_t | y_<t, x)

Only response tokens count; the end-of-turn token is not one of them (see ``encode_chat_pair``).

The local measure judges each step of a response given the prompt and the four steps before it, and so must
hide the steps before those: the sixth step and each later one are read once more, in a window of five
steps. That is up to five times the response tokens, and only done where it is asked for.

All teachers answer the same prompt, so a prompt is read once for all its responses (see ``branches``). A
student whose layers do not take such a mask reads prompt and response pair by pair.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from clients.types import ChatMessage
from router_model.branches import Branch, BranchBatch, branch_batches, make_batch, pack
from router_model.errors import RouterError
from router_model.learnability_measures import (
    CONTEXT_STEPS,
    local_logprob,
    mean_logprob,
    rank_surprisal,
    step_lengths,
    step_starts,
)
from router_model.pretrained import load_pretrained, load_tokenizer, locate_model, max_positions
from router_model.tokenization import encode_chat_prompt, plain_ids, sanitize, token_starts

MAX_PROMPT_TOKENS = 2048
"""A longer prompt keeps its end, where the response begins."""

MAX_RESPONSE_TOKENS = 512
"""A longer response keeps its beginning."""

_CHARS_PER_TOKEN = 32
"""Characters of a response read per token of its limit; real text has 1 to 6."""

_LOGIT_ROWS = 512
"""Positions whose logits exist at once: 512 x 49152 float32 are 100 MB."""

_TOLERANCE_NATS = 1e-3


@dataclass(frozen=True, slots=True)
class LearnabilityScore:
    """Learnability of one response.

    A measure is NaN for a response without tokens, for which it is undefined: the caller treats it as a
    missing cell, never as a number.

    Attributes:
        mean_logprob: Nats per response token, at most 0; higher is closer to the student.
        rank_surprisal: Rank per nat, above 0; lower is closer.
        n_tokens: Response tokens that count.
        truncated: Whether the prompt or the response was cut to its limit.
        local_logprob: Nats per token, mean over steps, at most 0; higher is closer. None if not asked for.
    """

    mean_logprob: float
    rank_surprisal: float
    n_tokens: int
    truncated: bool
    local_logprob: float | None = None


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
class _Response:
    """One pair as tokens. ``step_lengths`` is empty where the local measure is not asked for."""

    index: int
    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    truncated: bool
    step_lengths: tuple[int, ...]

    def branches(self) -> list[Branch]:
        """What is read: the response, and a window for each step that must not see all that is before it."""
        branches = [Branch(self.index, self.prompt, self.tokens)]
        ends = list(accumulate(self.step_lengths, initial=0))
        for step in range(CONTEXT_STEPS + 1, len(self.step_lengths)):
            first, own, end = ends[step - CONTEXT_STEPS], ends[step], ends[step + 1]
            branches.append(Branch(self.index, self.prompt, self.tokens[first:end], step, own - first))
        return branches

    def score(self, found: Mapping[int, "_TokenScores"]) -> LearnabilityScore:
        """All measures, from the token scores of each branch by its step."""
        whole = found[0]
        local = None
        if self.step_lengths:
            bounds = list(accumulate(self.step_lengths))[:-1]
            steps = np.split(whole.logprobs_T, bounds)
            windows = {step: scores.logprobs_T for step, scores in found.items() if step}
            local = local_logprob([windows.get(step, own) for step, own in enumerate(steps)])
        return LearnabilityScore(
            mean_logprob=mean_logprob(whole.logprobs_T),
            rank_surprisal=rank_surprisal(whole.logprobs_T, whole.ranks_T),
            n_tokens=len(self.tokens),
            truncated=self.truncated,
            local_logprob=local,
        )


class _TokenScores(NamedTuple):
    """Log-probability in nats, and rank from 1, of each scored token."""

    logprobs_T: NDArray[np.float64]
    ranks_T: NDArray[np.int64]


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
    with_local: bool = False,
    token_budget: int = 4096,
    progress: Callable[[int], None] | None = None,
) -> list[LearnabilityScore]:
    """Learnability of each response, in input order.

    A prompt keeps its last ``MAX_PROMPT_TOKENS`` tokens, a response its first ``MAX_RESPONSE_TOKENS``, fewer
    for a student with fewer positions. Company and order change a log-probability by less than 1e-3 nats.

    Args:
        student: From ``load_student``.
        pairs: Prompt messages and response. Pairs of one prompt share its cost if they come in one call.
        with_local: Whether ``local_logprob`` is wanted, which reads long responses several times.
        token_budget: Padded tokens per forward pass; a longer pair goes alone.
        progress: Called with the number of pairs done since the last call.

    Raises:
        RouterError: The student's chat template does not take a prompt; ``details["index"]`` says which. Or
            its tokenizer does not tell where tokens begin, which ``with_local`` needs.
    """
    scores: dict[int, LearnabilityScore] = {}
    pending: dict[int, _Response] = {}
    for response in _encode(student, pairs, with_local=with_local):
        if response.tokens:
            pending[response.index] = response
        else:
            undefined = math.nan if with_local else None
            scores[response.index] = LearnabilityScore(
                math.nan, math.nan, 0, response.truncated, local_logprob=undefined
            )
    if progress is not None and scores:
        progress(len(scores))
    for index, found in _read(student, pending.values(), token_budget):
        scores[index] = pending[index].score(found)
        if progress is not None:
            progress(1)
    return [scores[index] for index in range(len(pairs))]


def _encode(
    student: Student, pairs: Sequence[tuple[Sequence[ChatMessage], str]], *, with_local: bool
) -> Iterator[_Response]:
    max_chars = student.max_response_tokens * _CHARS_PER_TOKEN
    texts = [sanitize(text[:max_chars]) for _, text in pairs]
    ids = plain_ids(student.tokenizer, texts)
    starts = token_starts(student.tokenizer, texts) if with_local else None
    for index, ((messages, whole_text), response) in enumerate(zip(pairs, ids, strict=True)):
        try:
            prompt = encode_chat_prompt(student.tokenizer, messages)
        except RouterError as error:
            raise RouterError(f"pair {index}: {error.message}", details={"index": index}) from error
        kept = response[: student.max_response_tokens]
        cut = len(prompt) > student.max_prompt_tokens or len(kept) < len(response)
        # Without template and beginning-of-text token an empty prompt has no token to predict from.
        context = tuple(prompt[-student.max_prompt_tokens :]) or (student.tokenizer.eos_token_id or 0,)
        lengths = step_lengths(step_starts(texts[index]), starts[index][: len(kept)]) if starts else []
        yield _Response(
            index, context, tuple(kept), cut or len(whole_text) > max_chars, step_lengths=tuple(lengths)
        )


def _read(
    student: Student, responses: Collection[_Response], token_budget: int
) -> Iterator[tuple[int, dict[int, _TokenScores]]]:
    """The token scores of each response, branch by branch, as soon as all its branches have been read."""
    branches_of = {response.index: response.branches() for response in responses}
    found: dict[int, dict[int, _TokenScores]] = {index: {} for index in branches_of}
    branches = [branch for own in branches_of.values() for branch in own]
    for rows, shared in branch_batches(
        branches, token_budget=token_budget, shared_tokens=student.shared_tokens
    ):
        batch = make_batch(rows)
        logprobs, ranks = _token_scores(student, batch, shared=shared)
        sizes = [len(branch.scored) for branch in batch.branches]
        parts = (torch.split_with_sizes(values, sizes) for values in (logprobs, ranks))
        for branch, own_logprobs, own_ranks in zip(batch.branches, *parts, strict=True):
            own = found[branch.index]
            own[branch.step] = _TokenScores(own_logprobs.numpy(), own_ranks.numpy())
            if len(own) == len(branches_of[branch.index]):
                yield branch.index, found.pop(branch.index)


def _token_scores(student: Student, batch: BranchBatch, *, shared: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability (float64) and rank (int64) of each scored token, branch after branch."""
    inputs: dict[str, Any] = {"input_ids": batch.ids_BT, "use_cache": False}
    if shared:
        inputs |= {"attention_mask": batch.branch_mask(), "position_ids": batch.positions_BT}
    else:
        inputs["attention_mask"] = batch.padding_mask()
    with torch.inference_mode():
        if student.body is None:
            states = student.model(**inputs).logits.flatten(0, 1)[batch.picked]
        else:
            states = student.body(**inputs).last_hidden_state.flatten(0, 1)[batch.picked]
        parts = []
        for start in range(0, len(states), _LOGIT_ROWS):
            part = states[start : start + _LOGIT_ROWS]
            logits = (part if student.body is None else student.head(part)).float()
            parts.append(_logprobs_and_ranks(logits, batch.targets[start : start + _LOGIT_ROWS]))
    logprobs, ranks = zip(*parts, strict=True)
    return torch.cat(logprobs), torch.cat(ranks)


def _logprobs_and_ranks(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability and rank of each row's target. The logits are overwritten.

    -log p_t = log(1 + sum_{v != t} exp(l_v - l_t)): unlike l_t - logsumexp(l) it keeps its digits where p is
    close to 1, so that the surprisal of an easy response is no rounding error.
    """
    chosen = logits.gather(1, targets[:, None])
    ranks = 1 + (logits > chosen).sum(dim=1)
    others = logits.scatter_(1, targets[:, None], -math.inf).logsumexp(dim=1)
    odds = others.double() - chosen[:, 0].double()
    return -torch.logaddexp(odds, torch.zeros_like(odds)), ranks


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
    branches = [Branch(index, prompt, response) for index, response in enumerate(responses)]
    rows = pack(branches, token_budget=0)
    try:
        fast, _ = _token_scores(student, make_batch(pack(branches) if shared else rows), shared=shared)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        return False  # not made for such inputs: the plain way stays
    expected, _ = _token_scores(plain, make_batch(rows), shared=False)
    return fast.shape == expected.shape and bool((fast - expected).abs().max() < _TOLERANCE_NATS)
