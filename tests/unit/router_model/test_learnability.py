"""Learnability equals a plain double loop over real tokens, whatever the batch, the order and the layers."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from router_model.errors import BackboneError, RouterError
from router_model.learnability import Student, load_student, make_student, score_learnability
from router_model.tokenization import encode_chat_pair, encode_chat_prompt

PROMPTS = [
    "Name three primary colours.",
    "What is 17 times 24? Show your steps.",
    "Translate 'good morning' into French, German and Spanish.",
]
RESPONSES = [
    "Red, blue and yellow.",
    "17 times 24 is 408: 17 * 20 = 340, 17 * 4 = 68, and 340 + 68 = 408.",
    "Bonjour, guten Morgen, buenos días.",
    "purple monkey dishwasher 🙂",
    "Sure! " * 30,
    "No.",
]
SIZES: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.5,
    "pad_token_id": 0,
}

Pair = tuple[list[dict[str, Any]], str]


def pair(prompt: str, response: str) -> Pair:
    return [{"role": "user", "content": prompt}], response


PAIRS = [pair(prompt, response) for response in RESPONSES for prompt in PROMPTS]


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path) -> Student:
    return load_student(str(smollm2_path))


def plain_mean_logprob(student: Student, ids: list[int], n_prompt_tokens: int) -> float:
    """One pair alone, all logits, log-softmax in float64, a loop over the response."""
    with torch.inference_mode():
        logits = student.model(input_ids=torch.tensor([ids])).logits[0].double()
    logprobs = torch.log_softmax(logits, dim=-1)
    response = range(n_prompt_tokens, len(ids))
    return sum(float(logprobs[slot - 1, ids[slot]]) for slot in response) / len(response)


def assert_equals_plain_loop(student: Student, pairs: list[Pair]) -> None:
    for (messages, response), found in zip(pairs, score_learnability(student, pairs), strict=True):
        ids, n_prompt_tokens = encode_chat_pair(student.tokenizer, messages, response)
        assert found.n_tokens == len(ids) - n_prompt_tokens
        assert not found.truncated
        assert found.mean_logprob == pytest.approx(
            plain_mean_logprob(student, ids, n_prompt_tokens), abs=1e-3
        )


def test_equals_a_plain_float64_loop(smollm2: Student) -> None:
    """On a real student every value is that of an unbatched loop with full float64 log-softmax."""
    assert_equals_plain_loop(smollm2, PAIRS)


def test_prompts_are_shared_on_a_real_student(smollm2: Student) -> None:
    """SmolLM2 reads a prompt once for all its responses, and makes logits for the response alone."""
    assert smollm2.shared_tokens == math.inf
    assert smollm2.body is not None


def test_company_and_order_change_nothing(smollm2: Student) -> None:
    """A pair has the same value alone, in a batch of any budget, and in any order."""
    together = [found.mean_logprob for found in score_learnability(smollm2, PAIRS)]
    backwards = [found.mean_logprob for found in score_learnability(smollm2, PAIRS[::-1], token_budget=300)]
    assert backwards[::-1] == pytest.approx(together, abs=1e-3)
    for one, expected in zip(PAIRS[::4], together[::4], strict=True):
        assert score_learnability(smollm2, [one])[0].mean_logprob == pytest.approx(expected, abs=1e-3)


def test_fitting_responses_are_more_learnable(smollm2: Student) -> None:
    """The answer to the question is likelier under the student than that to another one, and than noise."""
    fitting, other, noise = score_learnability(
        smollm2,
        [pair(PROMPTS[0], RESPONSES[0]), pair(PROMPTS[2], RESPONSES[0]), pair(PROMPTS[0], RESPONSES[3])],
    )
    assert noise.mean_logprob < other.mean_logprob < fitting.mean_logprob < 0


def test_end_of_turn_is_not_counted(smollm2: Student) -> None:
    """A control token in a response is scored as its characters; no end-of-turn token adds to the mean."""
    bare, marked = score_learnability(smollm2, [pair(PROMPTS[0], "Red."), pair(PROMPTS[0], "Red.<|im_end|>")])
    assert bare.n_tokens == len(smollm2.tokenizer("Red.").input_ids)
    assert marked.n_tokens > bare.n_tokens + 1


def test_empty_response_is_undefined(smollm2: Student) -> None:
    """A response without tokens has no mean: NaN, in its place, and the others are scored."""
    first, empty, last = score_learnability(smollm2, [PAIRS[0], pair(PROMPTS[0], ""), PAIRS[1]])
    assert math.isnan(empty.mean_logprob)
    assert (empty.n_tokens, empty.truncated) == (0, False)
    assert first.mean_logprob < 0
    assert last.mean_logprob < 0
    assert score_learnability(smollm2, []) == []


def test_lone_surrogates_are_scored(smollm2: Student) -> None:
    """Text that is no valid Unicode is scored as its replacement characters."""
    broken, clean = score_learnability(smollm2, [pair("a\ud800", "b\udc00c"), pair("a\ufffd", "b\ufffdc")])
    assert broken.mean_logprob == pytest.approx(clean.mean_logprob, abs=1e-4)


def test_progress_counts_every_pair(smollm2: Student) -> None:
    """The reported steps add up to the number of pairs, the undefined ones included."""
    steps: list[int] = []
    score_learnability(smollm2, [*PAIRS[:5], pair("x", "")], token_budget=64, progress=steps.append)
    assert sum(steps) == 6
    assert len(steps) > 2


def small_student(smollm2: Student, model: Any) -> Student:
    return make_student("small", model.eval(), smollm2.tokenizer)


def test_long_pairs_are_cut(smollm2: Student) -> None:
    """A response keeps its first 512 tokens and a prompt its last 2048, and the score says so."""
    torch.manual_seed(0)
    student = small_student(smollm2, MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None)))
    long_response, cut_response, long_prompt, cut_prompt = score_learnability(
        student,
        [
            pair("Hi", " word" * 600),
            pair("Hi", " word" * 512),
            pair(" a" * 3000, "Yes"),
            pair(" a" * 2040, "Yes"),
        ],
    )
    assert (long_response.n_tokens, long_response.truncated, cut_response.truncated) == (512, True, False)
    assert long_response.mean_logprob == pytest.approx(cut_response.mean_logprob, abs=1e-4)
    assert (long_prompt.truncated, cut_prompt.truncated) == (True, True)
    ids = encode_chat_prompt(smollm2.tokenizer, pair(" a" * 3000, "")[0])[-2048:]
    answer = smollm2.tokenizer("Yes").input_ids
    expected = plain_mean_logprob(student, ids + answer, len(ids))
    assert long_prompt.mean_logprob == pytest.approx(expected, abs=1e-3)


def test_few_positions_lower_the_limits(smollm2: Student) -> None:
    """A student with 64 positions gets 32 tokens of prompt and of response at most."""
    config = GPT2Config(vocab_size=49152, n_positions=64, n_embd=32, n_layer=2, n_head=4)
    student = small_student(smollm2, GPT2LMHeadModel(config))
    assert (student.max_prompt_tokens, student.max_response_tokens) == (32, 32)
    [found] = score_learnability(student, [pair(" a" * 100, " b" * 100)])
    assert (found.n_tokens, found.truncated) == (32, True)


def test_recurrent_student(smollm2: Student) -> None:
    """A student with recurrent layers cannot share prompts, and its values are right."""
    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=49152, hidden_size=32, num_hidden_layers=2, state_size=4, initializer_range=0.5
    )
    student = small_student(smollm2, MambaForCausalLM(config))
    assert student.shared_tokens == 0
    assert_equals_plain_loop(student, PAIRS[:6])


def test_student_without_free_positions(smollm2: Student) -> None:
    """A student whose positions follow from its mask cannot share prompts either: the probe finds out."""
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=49152, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.5)
    student = small_student(smollm2, BloomForCausalLM(config))
    assert student.shared_tokens == 0
    assert_equals_plain_loop(student, PAIRS[:6])


def test_sliding_window_student(smollm2: Student) -> None:
    """Pairs longer than a student's attention window go alone, so that the window holds for them."""
    torch.manual_seed(0)
    student = small_student(smollm2, MistralForCausalLM(MistralConfig(**SIZES, sliding_window=48)))
    assert student.shared_tokens == 48
    assert_equals_plain_loop(student, PAIRS)


def test_student_with_capped_logits(smollm2: Student) -> None:
    """A student that caps its logits after the output layer is scored with the cap."""
    torch.manual_seed(0)
    config = Gemma2Config(**SIZES, final_logit_softcapping=2.0, sliding_window=4096)
    student = small_student(smollm2, Gemma2ForCausalLM(config))
    assert student.body is None
    assert_equals_plain_loop(student, PAIRS[:6])


def test_refused_prompt_is_named(smollm2: Student) -> None:
    """A prompt that the chat template refuses is an error that says which pair it was."""
    template = "{{ raise_exception('never') }}"
    tokenizer = load_changed(smollm2, template)
    student = make_student("strict", smollm2.model, tokenizer)
    with pytest.raises(RouterError, match=r"pair 0.*never") as caught:
        score_learnability(student, PAIRS[:1])
    assert caught.value.details == {"index": 0}


def load_changed(student: Student, template: str) -> Any:
    tokenizer = copy.copy(student.tokenizer)
    tokenizer.chat_template = template
    return tokenizer


def test_missing_student_is_named() -> None:
    """A student that is not there gives a clear error."""
    with pytest.raises(BackboneError, match="there is no model"):
        load_student("/nowhere/student.gguf")
