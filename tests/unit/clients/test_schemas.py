"""What the service accepts: strict fields, one form of prompt, plain JSON, bounded sampling."""

import json

import pytest
from pydantic import TypeAdapter, ValidationError

from clients.schemas import (
    MAX_PROMPTS_PER_CALL,
    AnsweredItem,
    FailedItem,
    PromptBody,
    RouteRequest,
    SynthesizedItem,
    SynthesizeRequest,
)
from clients.types import STRATEGIES

CHAT = [{"role": "system", "content": "s"}, {"role": "user", "content": "u", "name": "n"}]


def _refusal(model, body):
    """Fields and messages of a refused body."""
    with pytest.raises(ValidationError) as raised:
        model.model_validate(body)
    return {(".".join(map(str, error["loc"])), error["msg"]) for error in raised.value.errors()}


def _fields(model, body):
    return {field for field, _ in _refusal(model, body)}


# --- prompts


def test_three_forms_of_a_prompt():
    """A bare text, a text with an id and a chat list are all prompts."""
    request = RouteRequest.model_validate(
        {"prompts": ["hi", {"id": "p2", "prompt": "ho"}, {"id": "p3", "messages": CHAT}]}
    )
    assert [prompt.id for prompt in request.prompts] == [None, "p2", "p3"]
    assert [prompt.chat() for prompt in request.prompts] == [
        ({"role": "user", "content": "hi"},),
        ({"role": "user", "content": "ho"},),
        tuple(CHAT),
    ]


def test_chat_turns_pass_through_untouched():
    """Vendor keys and content parts are kept; nothing is added that was not sent."""
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "u"}], "cache_control": {"type": "ephemeral"}},
        {"role": "tool", "content": "42", "tool_call_id": "c1"},
    ]
    assert PromptBody.model_validate({"messages": turns}).chat() == tuple(turns)


@pytest.mark.parametrize("body", [{"id": "p"}, {"prompt": "hi", "messages": CHAT}, {"prompt": None}])
def test_neither_or_both_forms_are_refused(body):
    """A prompt is a text or a chat list, and the refusal says so."""
    ((field, message),) = _refusal(RouteRequest, {"prompts": [body]})
    assert field == "prompts.0"
    assert "either prompt" in message


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"prompt": "hi", "id": ""}, "id"),
        ({"prompt": 5}, "prompt"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"prompt": "hi", "mesages": []}, "mesages"),
    ],
)
def test_refused_prompt_is_named_by_its_field(body, field):
    """The refusal names the field, with its place in the list."""
    assert any(
        name.startswith(f"prompts.1.{field}") for name in _fields(RouteRequest, {"prompts": ["x", body]})
    )


def test_number_of_prompts_is_bounded():
    """At least one prompt and at most the documented number."""
    assert _fields(RouteRequest, {"prompts": []}) == {"prompts"}
    assert _fields(RouteRequest, {}) == {"prompts"}
    assert len(RouteRequest.model_validate({"prompts": ["x"] * MAX_PROMPTS_PER_CALL}).prompts) == 10_000
    assert _fields(RouteRequest, {"prompts": ["x"] * (MAX_PROMPTS_PER_CALL + 1)}) == {"prompts"}


# --- plain JSON

NOT_UNICODE = {
    "bare prompt": {"prompts": ["a\ud800"]},
    "prompt": {"prompts": [{"prompt": "\udfff"}]},
    "id": {"prompts": [{"id": "\ud800", "prompt": "x"}]},
    "content": {"prompts": [{"messages": [{"role": "user", "content": "\ud800"}]}]},
    "content part": {"prompts": [{"messages": [{"role": "user", "content": [{"text": ["\ud800"]}]}]}]},
    "vendor key": {"prompts": [{"messages": [{"role": "user", "content": "x", "meta": {"k": "\ud800"}}]}]},
    "name of a vendor key": {
        "prompts": [{"messages": [{"role": "user", "content": "x", "m": {"\ud800": 1}}]}]
    },
    "student": {"prompts": ["x"], "student": "\ud800"},
    "teacher": {"prompts": ["x"], "teachers": ["\ud800"]},
    "exclusion": {"prompts": ["x"], "exclude": ["\ud800"]},
    "sampling": {"prompts": ["x"], "sampling": {"stop": ["\ud800"]}},
}


@pytest.mark.parametrize("where", NOT_UNICODE)
def test_lone_surrogates_are_refused_wherever_they_hide(where):
    """Text that is not valid Unicode is refused, read from JSON or given as parsed values."""
    body = NOT_UNICODE[where]
    assert _refusal(SynthesizeRequest, body)
    with pytest.raises(ValidationError):
        SynthesizeRequest.model_validate_json(json.dumps(body))


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize(
    "text",
    [
        '{"prompts": ["x"], "sampling": {"temperature": %s}}',
        '{"prompts": ["x"], "sampling": {"logit_bias": {"1": [%s]}}}',
        '{"prompts": [{"messages": [{"role": "user", "content": "x", "weight": %s}]}]}',
        '{"prompts": [{"messages": [{"role": "user", "content": [{"weight": %s}]}]}]}',
        '{"prompts": ["x"], "alpha": %s}',
        '{"prompts": ["x"], "temperature": %s}',
        '{"prompts": ["x"], "cost_weight": %s}',
        '{"prompts": ["x"], "mix_strong_share": %s}',
        '{"prompts": ["x"], "car_beta": %s}',
    ],
)
def test_numbers_that_json_lacks_are_refused(text, number):
    """NaN and infinities, which Python's JSON reader lets pass, are refused everywhere."""
    assert _refusal(SynthesizeRequest, json.loads(text % number))


def test_pairs_of_surrogates_are_ordinary_text():
    """An escaped emoji is accepted as the character it is."""
    request = RouteRequest.model_validate_json('{"prompts": ["\\ud83d\\ude00"]}')
    assert request.prompts[0].prompt == "\U0001f600"


# --- /route


def test_defaults_of_route():
    """Only prompts are required; the rest has the documented defaults."""
    dumped = RouteRequest.model_validate({"prompts": ["x"]}).model_dump(exclude={"prompts"})
    assert dumped == {
        "student": None,
        "strategy": "persyn",
        "teachers": None,
        "exclude": [],
        "alpha": None,
        "temperature": 0.0,
        "seed": 0,
        "cost_weight": 0.0,
        "top_k": None,
        "mix_strong_share": 0.2,
        "car_beta": 1.0,
    }


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("strategy", "best"),
        ("teachers", []),
        ("teachers", "a"),
        ("alpha", -0.1),
        ("alpha", 1.1),
        ("temperature", -1),
        ("temperature", 101),
        ("seed", 0.5),
        ("cost_weight", -1),
        ("cost_weight", 1e10),
        ("mix_strong_share", -0.1),
        ("mix_strong_share", 1.1),
        ("car_beta", -1),
        ("car_beta", 1e7),
        ("top_k", 0),
        ("student", 5),
    ],
)
def test_values_out_of_range_are_refused_by_name(field, value):
    """A value outside its range is refused, naming the field."""
    assert _fields(RouteRequest, {"prompts": ["x"], field: value}) == {field}


@pytest.mark.parametrize("model", [RouteRequest, SynthesizeRequest])
def test_unknown_field_is_refused_by_name(model):
    """A misspelt field is an error that names it, never silently ignored."""
    assert _fields(model, {"prompts": ["x"], "aplha": 0.5}) == {"aplha"}


def test_every_strategy_is_accepted():
    """The accepted strategies are those of the contract."""
    for strategy in STRATEGIES:
        assert RouteRequest.model_validate({"prompts": ["x"], "strategy": strategy}).strategy == strategy


def test_falsy_values_survive():
    """Zero is a choice, not an absence."""
    body = {"prompts": ["x"], "alpha": 0, "seed": 0, "sampling": {"temperature": 0, "seed": 0, "top_p": None}}
    request = SynthesizeRequest.model_validate(body)
    assert request.alpha == 0.0
    assert request.sampling == {"temperature": 0, "seed": 0, "top_p": None}


# --- /synthesize


def test_defaults_of_synthesize():
    """By default: cached, not streamed, within five minutes, and no substitute teachers."""
    request = SynthesizeRequest.model_validate({"prompts": ["x"]})
    assert (request.fallback, request.cache, request.deadline_s, request.stream) == (
        False,
        "use",
        300.0,
        False,
    )
    assert request.sampling == {}


@pytest.mark.parametrize("name", ["messages", "model", "stream", "stream_options"])
def test_sampling_may_not_change_what_is_asked_of_whom(name):
    """Sampling parameters that would change the request itself are refused by name."""
    ((_, message),) = _refusal(SynthesizeRequest, {"prompts": ["x"], "sampling": {name: None}})
    assert f"sampling may not set {name}" in message


@pytest.mark.parametrize("n_samples", [0, -1, 129, 1.5, "2", True])
def test_number_of_samples_is_bounded(n_samples):
    """``n`` is an integer from 1 to 128."""
    ((_, message),) = _refusal(SynthesizeRequest, {"prompts": ["x"], "sampling": {"n": n_samples}})
    assert "from 1 to 128" in message


@pytest.mark.parametrize("n_samples", [1, 128, None])
def test_allowed_numbers_of_samples(n_samples):
    """The bounds themselves, and null, are allowed."""
    body = {"prompts": ["x"], "sampling": {"n": n_samples}}
    assert SynthesizeRequest.model_validate(body).sampling == {"n": n_samples}


@pytest.mark.parametrize(
    ("field", "value"),
    [("deadline_s", 0), ("deadline_s", 3601), ("cache", "on"), ("sampling", []), ("stream", "perhaps")],
)
def test_synthesize_values_out_of_range_are_refused_by_name(field, value):
    """A value outside its range is refused, naming the field."""
    assert _fields(SynthesizeRequest, {"prompts": ["x"], field: value}) == {field}


def test_items_are_told_apart_by_their_status():
    """An item is read as answered or failed by its status alone."""
    error = {"type": "t", "title": "t", "detail": "d", "source": "teacher", "retryable": True}
    item = TypeAdapter(SynthesizedItem)
    assert isinstance(item.validate_python({"id": "p", "status": "error", "error": error}), FailedItem)
    with pytest.raises(ValidationError, match="provenance"):
        item.validate_python({"id": "p", "status": "ok", "error": error})
    assert AnsweredItem.model_fields["status"].default == "ok"
