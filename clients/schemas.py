"""The HTTP contract: what the service reads and writes, used by the service and by its Python client."""

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, model_validator

from clients.canonical import canonical_json
from clients.types import CAR_BETA, MIX_STRONG_SHARE, CacheMode, Strategy

MAX_PROMPTS_PER_CALL = 10_000
MAX_DEPTH = 100
"""Nesting of vendor fields. pydantic writes no more than 255 levels."""

_SURROGATE = re.compile("[\ud800-\udfff]")

NonEmptyText = Annotated[str, StringConstraints(min_length=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


def _require_json(value: Any) -> None:
    """Refuse what Python reads from a body and no answer could carry back.

    That is NaN, infinities, lone surrogates, and nesting deeper than a JSON writer follows. pydantic checks
    none of them inside ``Any``, and surrogates not in a plain ``str``.
    """
    stack = [(value, 0)]
    while stack:
        member, depth = stack.pop()
        if depth > MAX_DEPTH:
            raise ValueError(f"lists and objects are nested deeper than {MAX_DEPTH} levels")
        if isinstance(member, dict):
            stack += [(inner, depth + 1) for pair in member.items() for inner in pair]
        elif isinstance(member, list):
            stack += [(inner, depth + 1) for inner in member]
        elif isinstance(member, str) and _SURROGATE.search(member):
            raise ValueError("a text holds a lone surrogate, which is not valid Unicode")
    canonical_json(value)


class ChatMessageBody(BaseModel):
    """One OpenAI chat message; vendor keys are kept."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]]

    @model_validator(mode="after")
    def _is_json(self) -> "ChatMessageBody":
        _require_json(self.content)
        _require_json(self.model_extra)
        return self


class PromptBody(_Strict):
    """One prompt: a text or an OpenAI chat list. Without an id it gets one from its content."""

    id: NonEmptyText | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessageBody], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _one_form(self) -> "PromptBody":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt (a text) or messages (a chat list)")
        _require_json(self.prompt)
        return self

    def chat(self) -> tuple[dict[str, Any], ...]:
        """The prompt as an OpenAI chat list."""
        if self.messages is None:
            return ({"role": "user", "content": self.prompt},)
        return tuple(message.model_dump(exclude_unset=True) for message in self.messages)


def _text_to_prompt(value: Any) -> Any:
    return {"prompt": value} if isinstance(value, str) else value


PromptInput = Annotated[PromptBody, BeforeValidator(_text_to_prompt, json_schema_input_type=str | PromptBody)]


def _require_one_call(prompts: Any) -> Any:
    """Say what to do with too many prompts, before any of them is looked at."""
    if isinstance(prompts, list) and len(prompts) > MAX_PROMPTS_PER_CALL:
        raise ValueError(
            f"a call takes at most {MAX_PROMPTS_PER_CALL:,} prompts, not {len(prompts):,}; POST /route takes "
            "any number as a stream (content-type application/x-ndjson, one prompt per line), and the"
            " command `persyn synthesize` takes a file"
        )
    return prompts


class _Prompts(_Strict):
    prompts: Annotated[
        list[PromptInput],
        BeforeValidator(_require_one_call),
        Field(min_length=1, max_length=MAX_PROMPTS_PER_CALL),
    ]


class RouteParameters(_Strict):
    """How teachers are chosen: fields of a JSON request, query parameters of an NDJSON stream."""

    student: NonEmptyText | None = Field(
        None, description="Student id; the first of the project file if absent."
    )
    strategy: Strategy = "persyn"
    teachers: Annotated[list[NonEmptyText], Field(min_length=1)] | None = Field(
        None, description="Allow-list of teacher ids; all of the checkpoint if absent."
    )
    exclude: list[NonEmptyText] = Field(default_factory=list, description="Teacher ids never to choose.")
    alpha: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="Weight of learnability, any from 0 to 1; that of the checkpoint if absent."
    )
    temperature: Annotated[float, Field(ge=0, le=100)] = Field(
        0.0, description="0 takes the best teacher; above, the teacher is sampled. Of `persyn` alone."
    )
    seed: int = Field(0, description="Sampling depends on this and on the prompt's id alone.")
    cost_weight: Annotated[float, Field(ge=0, le=1e9)] = Field(
        0.0,
        description="What one US dollar of expected answer cost takes off the value by which the strategy "
        "ranks, in the unit of that value. Not of `mix` and `random`.",
    )
    top_k: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Only the k strongest allowed teachers stay candidates for each prompt."
    )
    mix_strong_share: Annotated[float, Field(ge=0, le=1)] = Field(
        MIX_STRONG_SHARE, description="Share of the prompts that `mix` gives to the strongest teacher."
    )
    car_beta: Annotated[float, Field(ge=0, le=1e6)] = Field(
        CAR_BETA, description="Weight of the student's loss in `car`."
    )


class RouteRequest(RouteParameters, _Prompts):
    """``POST /route``."""


class DecisionBody(BaseModel):
    """Which teacher answers one prompt, and why. All mappings are keyed by candidate."""

    id: str
    teacher: str
    distribution: dict[str, float] = Field(description="Softmax of the strengths; sums to 1.")
    strengths: dict[str, float] = Field(description="Bradley-Terry logits at the alpha used.")
    quality: dict[str, float] = Field(description="Expected quality, on the scale of the score table.")
    learnability: dict[str, float] = Field(
        description="Expected learnability, higher is closer to the student; empty if not trained on."
    )
    expected_reward: dict[str, float] = Field(
        description="Expected mixed reward at the alpha used, on the normalised scale."
    )
    propensity: float = Field(description="Probability with which the strategy chooses this teacher.")
    margin: float = Field(description="Strength of the best candidate minus that of the second; 0 if alone.")
    uncertain: bool = Field(description="Whether the margin is within one standard error of itself.")
    conformal_set: list[str] = Field(
        description="Candidates that may well be the best one, strongest first; empty if not calibrated."
    )
    out_of_distribution: bool = Field(
        description="Whether the prompt is unlike those that the router was trained on."
    )
    input_tokens: int
    truncated: bool


class RouteResponse(BaseModel):
    """Answer of ``POST /route``, in the order of the prompts."""

    checkpoint_id: str
    student: str
    strategy: Strategy
    alpha: float = Field(description="The weight of learnability that was used.")
    coverage: float | None = Field(
        description="Share of the prompts whose best teacher is in `conformal_set`; null if not calibrated."
    )
    decisions: list[DecisionBody]


class SynthesizeRequest(RouteRequest):
    """``POST /synthesize``: the fields of ``/route`` and how to generate."""

    sampling: dict[str, Any] = Field(
        default_factory=dict, description="OpenAI parameters that override the teacher's own; n is allowed."
    )
    fallback: bool = Field(
        False, description="Ask the next teacher if the chosen one fails. Changes the mix of the data set."
    )
    cache: CacheMode = "use"
    deadline_s: Annotated[float, Field(gt=0, le=3600)] = 300.0
    stream: bool = Field(False, description="Answer as NDJSON, one item per line as it completes.")

    @model_validator(mode="after")
    def _sampling_is_only_sampling(self) -> "SynthesizeRequest":
        forbidden = sorted({"messages", "model", "stream", "stream_options"} & self.sampling.keys())
        if forbidden:
            raise ValueError(f"sampling may not set {', '.join(forbidden)}")
        _require_json(self.sampling)
        n_samples = self.sampling.get("n")
        if n_samples is not None and not (type(n_samples) is int and 1 <= n_samples <= 128):
            raise ValueError("sampling.n must be an integer from 1 to 128")
        return self


class UsageBody(BaseModel):
    """Token counts as the teacher gave them."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0


class ProvenanceBody(BaseModel):
    """Where one answer came from."""

    teacher: str
    served_model: str
    checkpoint_id: str | None
    strategy: str | None
    student: str | None
    distribution: dict[str, float]
    propensity: float | None
    sampling: dict[str, Any]
    prompt_hash: str
    attempts: int
    fallback_from: str | None
    cache: Literal["hit", "miss", "refresh", "off"]
    usage: UsageBody
    cost_usd: float
    latency_s: float
    finish_reason: str
    created: str
    persyn_version: str


class ErrorBody(BaseModel):
    """Why one item failed, and who is at fault."""

    type: str
    title: str
    detail: str
    source: Literal["client", "persyn", "teacher", "cache"]
    retryable: bool


class AnsweredItem(BaseModel):
    """One prompt answered."""

    id: str
    status: Literal["ok"] = "ok"
    teacher: str
    messages: list[dict[str, Any]]
    choices: list[dict[str, Any]]
    provenance: ProvenanceBody


class FailedItem(BaseModel):
    """One prompt that was not answered."""

    id: str
    status: Literal["error"] = "error"
    teacher: str | None = None
    error: ErrorBody


SynthesizedItem = Annotated[AnsweredItem | FailedItem, Field(discriminator="status")]


class RoutedItem(DecisionBody):
    """One line of a ``/route`` stream: the decision for the prompt of one line."""

    status: Literal["ok"] = "ok"
    line: int = Field(description="Line of the request that this answers, from 1, blank lines counted.")
    checkpoint_id: str


class UnroutedItem(BaseModel):
    """One line of a ``/route`` stream: why the line of the request got no decision."""

    id: str | None = Field(description="Of the prompt, where it can be told.")
    status: Literal["error"] = "error"
    line: int
    error: ErrorBody


class RouteSummary(BaseModel):
    """Last line of a ``/route`` stream. A stream without it was broken off."""

    ok: int
    failed: int
    lines: int = Field(description="The last line of the request that is answered; go on after it.")
    checkpoint_id: str
    student: str
    strategy: Strategy
    alpha: float
    coverage: float | None
    error: ErrorBody | None = Field(
        description="Why the stream ended before the request did; null if everything is answered."
    )


class SynthesisSummary(BaseModel):
    """Totals of one call. Usage counts what teachers generated for it: a cached answer adds nothing."""

    ok: int = 0
    failed: int = 0
    cached: int = 0
    usage: UsageBody = Field(default_factory=UsageBody)
    cost_usd: float = 0.0


class SynthesizeResponse(BaseModel):
    """Answer of ``POST /synthesize``, in the order of the prompts."""

    checkpoint_id: str
    items: list[SynthesizedItem]
    summary: SynthesisSummary


class TeacherState(BaseModel):
    """One teacher as it is now."""

    id: str
    model: str
    family: str | None
    size_b: float | None
    price: dict[str, float] | None = Field(description="Null where the project file states none.")
    limits: dict[str, int | None]
    in_flight: int
    breaker: Literal["closed", "open", "half_open"]
    students: list[str] = Field(description="Students whose router can choose this teacher.")


class TeachersResponse(BaseModel):
    """Answer of ``GET /teachers``."""

    teachers: list[TeacherState]


class StudentState(BaseModel):
    """One student and the router that serves it now."""

    id: str
    family: str | None
    checkpoint_id: str
    alpha: float = Field(description="The weight of learnability where a request names none.")
    head: str
    teachers: list[str]
    backbone: str
    engine: Literal["fp32", "bf16"] = Field(description="Arithmetic of the backbone.")
    ready: bool
    loaded: str = Field(description="RFC 3339 time since which this router serves.")
    reload_failure: str | None = Field(
        description="Why the last reload failed; null if it did not. The router from before serves."
    )


class StudentsResponse(BaseModel):
    """Answer of ``GET /students``. The first is the default."""

    students: list[StudentState]


class ReloadRequest(_Strict):
    """``POST /admin/reload``."""

    student: NonEmptyText | None = Field(None, description="Student id; all if absent.")


class ReloadedStudent(BaseModel):
    """One student after a reload."""

    student: str
    checkpoint_id: str
    previous_checkpoint_id: str


class ReloadResponse(BaseModel):
    """Answer of ``POST /admin/reload``."""

    reloaded: list[ReloadedStudent]


class Problem(BaseModel):
    """RFC 9457 problem document."""

    type: str
    title: str
    status: int
    detail: str
    source: Literal["client", "persyn", "teacher", "cache"]
    retryable: bool
    request_id: str | None = None
    errors: list[dict[str, Any]] | None = Field(None, description="Fields that failed validation.")
