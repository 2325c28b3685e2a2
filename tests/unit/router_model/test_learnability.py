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
from router_model.learnability import (
    Student,
    _logprobs_and_ranks,
    load_student,
    make_student,
    score_learnability,
)
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


def plain_token_scores(student: Student, ids: list[int], n_prompt_tokens: int) -> list[tuple[float, int]]:
    """One pair alone, all logits, log-softmax in float64, a loop over the response: log p and rank."""
    with torch.inference_mode():
        logits = student.model(input_ids=torch.tensor([ids])).logits[0].double()
    logprobs = torch.log_softmax(logits, dim=-1)
    return [
        (
            float(logprobs[slot - 1, ids[slot]]),
            1 + int((logits[slot - 1] > logits[slot - 1, ids[slot]]).sum()),
        )
        for slot in range(n_prompt_tokens, len(ids))
    ]


def plain_mean_logprob(student: Student, ids: list[int], n_prompt_tokens: int) -> float:
    scores = plain_token_scores(student, ids, n_prompt_tokens)
    return sum(logprob for logprob, _ in scores) / len(scores)


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


def test_rank_surprisal_equals_a_plain_float64_loop(smollm2: Student) -> None:
    """On a real student: ranks by strictly greater logits, clipped at 100, over the sum of surprisals."""
    clipped = 0
    for (messages, response), found in zip(
        PAIRS[1::4], score_learnability(smollm2, PAIRS[1::4]), strict=True
    ):
        scores = plain_token_scores(smollm2, *encode_chat_pair(smollm2.tokenizer, messages, response))
        clipped += sum(rank > 100 for _, rank in scores)
        expected = sum(min(rank, 100) for _, rank in scores) / sum(-logprob for logprob, _ in scores)
        assert found.rank_surprisal == pytest.approx(expected, rel=2e-3)
    assert clipped > 0  # the clip was at work


def test_a_response_of_one_token(smollm2: Student) -> None:
    """One token is a step of its own: both means are its log-probability, the ratio is its rank over it."""
    one = pair("Answer yes or no: is water wet?", "Yes")
    [found] = score_learnability(smollm2, [one], with_local=True)
    [(logprob, rank)] = plain_token_scores(smollm2, *encode_chat_pair(smollm2.tokenizer, *one))
    assert found.n_tokens == 1
    assert found.mean_logprob == found.local_logprob == pytest.approx(logprob, abs=1e-3)
    assert found.rank_surprisal == pytest.approx(rank / -logprob, rel=1e-2)


def test_log_probabilities_keep_their_digits_and_ties_their_rank() -> None:
    """Where p is all but 1 the surprisal is its small true value, not 0; equal logits are no greater ones."""
    logits = torch.tensor([[30.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.0, 200.0, 100.0]])
    logprobs, ranks = _logprobs_and_ranks(logits, torch.tensor([0, 1, 0]))
    expected = [-math.log1p(2 * math.exp(-30)), -math.log(3), -200.0]
    assert logprobs.tolist() == pytest.approx(expected, rel=1e-6)
    assert ranks.tolist() == [1, 1, 3]


STEPS = [
    "20 * 24 = 480",
    "3 * 24 = 72",
    "480 - 72",
    "= 408",
    "Check: 17.",
    "So 408.",
    "Purple monkeys.",
]


def plain_local_logprob(student: Student, prompt: str, response: str) -> float:
    """Each line alone with the prompt and the four lines before it, in float64; lines by their tokens."""
    ids, n_prompt_tokens = encode_chat_pair(student.tokenizer, *pair(prompt, response))
    lines: list[list[int]] = [[]]
    for token in ids[n_prompt_tokens:]:
        lines[-1].append(token)
        if "\n" in student.tokenizer.decode([token]):
            lines.append([])
    means = []
    for number, line in enumerate(lines):
        before = [token for earlier in lines[max(0, number - 4) : number] for token in earlier]
        context = [*ids[:n_prompt_tokens], *before]
        means.append(plain_mean_logprob(student, [*context, *line], len(context)))
    return sum(means) / len(means)


def test_local_logprob_equals_a_plain_loop_over_windows(smollm2: Student) -> None:
    """Each step sees the prompt and the four steps before it, whether the response is read alone or not."""
    prompt, response = "17 * 24?", "\n".join(STEPS)
    expected = plain_local_logprob(smollm2, prompt, response)
    pairs = [pair(prompt, "408."), pair(prompt, response)]
    for found in (
        score_learnability(smollm2, pairs, with_local=True)[1],
        score_learnability(smollm2, pairs[1:], with_local=True, token_budget=64)[0],
    ):
        assert found.local_logprob == pytest.approx(expected, abs=1e-3)
        assert found.mean_logprob != pytest.approx(expected, abs=1e-2)


def test_windows_of_a_student_that_cannot_share_prompts(smollm2: Student) -> None:
    """With recurrent layers each window is a row of its own, and the local measure is the same."""
    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=49152, hidden_size=32, num_hidden_layers=2, state_size=4, initializer_range=0.5
    )
    student = small_student(smollm2, MambaForCausalLM(config))
    response = "\n".join(STEPS)
    [found] = score_learnability(student, [pair(PROMPTS[1], response)], with_local=True)
    assert found.local_logprob == pytest.approx(plain_local_logprob(student, PROMPTS[1], response), abs=1e-3)


def test_a_tokenizer_that_tells_no_positions_is_refused(smollm2: Student) -> None:
    """The local measure must know where each token begins; the others do not."""
    tokenizer = copy.copy(smollm2.tokenizer)
    tokenizer.__class__ = type("Blind", (type(tokenizer),), {"is_fast": False})
    student = make_student("blind", smollm2.model, tokenizer)
    assert score_learnability(student, PAIRS[:1])[0].mean_logprob < 0
    with pytest.raises(RouterError, match="Blind does not tell where"):
        score_learnability(student, PAIRS[:1], with_local=True)


def test_prompts_are_shared_on_a_real_student(smollm2: Student) -> None:
    """SmolLM2 reads a prompt once for all its responses, and makes logits for the response alone."""
    assert smollm2.shared_tokens == math.inf
    assert smollm2.body is not None


def test_company_and_order_change_nothing(smollm2: Student) -> None:
    """A pair has the same value alone, in a batch of any budget, and in any order."""
    together = score_learnability(smollm2, PAIRS)
    backwards = score_learnability(smollm2, PAIRS[::-1], token_budget=300)[::-1]
    alone = [score_learnability(smollm2, [one])[0] for one in PAIRS[::4]]
    for found, expected in (*zip(backwards, together, strict=True), *zip(alone, together[::4], strict=True)):
        assert found.mean_logprob == pytest.approx(expected.mean_logprob, abs=1e-3)
        assert found.rank_surprisal == pytest.approx(expected.rank_surprisal, rel=2e-3)


def test_fitting_responses_are_more_learnable(smollm2: Student) -> None:
    """The answer to the question is likelier under the student than that to another one, and than noise."""
    fitting, other, noise = score_learnability(
        smollm2,
        [pair(PROMPTS[0], RESPONSES[0]), pair(PROMPTS[2], RESPONSES[0]), pair(PROMPTS[0], RESPONSES[3])],
    )
    assert noise.mean_logprob < other.mean_logprob < fitting.mean_logprob < 0
    assert noise.local_logprob is None  # not asked for


def test_end_of_turn_is_not_counted(smollm2: Student) -> None:
    """A control token in a response is scored as its characters; no end-of-turn token adds to the mean."""
    bare, marked = score_learnability(smollm2, [pair(PROMPTS[0], "Red."), pair(PROMPTS[0], "Red.<|im_end|>")])
    assert bare.n_tokens == len(smollm2.tokenizer("Red.").input_ids)
    assert marked.n_tokens > bare.n_tokens + 1


def test_empty_response_is_undefined(smollm2: Student) -> None:
    """A response without tokens has no mean: NaN, in its place, and the others are scored."""
    first, empty, last = score_learnability(smollm2, [PAIRS[0], pair(PROMPTS[0], ""), PAIRS[1]])
    assert math.isnan(empty.mean_logprob)
    assert math.isnan(empty.rank_surprisal)
    [local] = score_learnability(smollm2, [pair(PROMPTS[0], "")], with_local=True)
    assert local.local_logprob is not None
    assert math.isnan(local.local_logprob)
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
    pairs = [*PAIRS[:3], pair(PROMPTS[1], "\n".join(STEPS[:6])), pair("x", "")]
    score_learnability(smollm2, pairs, token_budget=64, with_local=True, progress=steps.append)
    assert sum(steps) == 5
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
