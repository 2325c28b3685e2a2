"""Value types shared by all layers: teachers, prompts, decisions, responses, provenance."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

ChatMessage = Mapping[str, Any]
"""One OpenAI chat message: ``role``, ``content`` and vendor keys."""

CacheMode = Literal["use", "refresh", "off"]
Strategy = Literal["persyn", "strong", "mix", "family_strong", "car", "best_single", "random"]
LearnabilityMeasure = Literal["mean_logprob", "rank_surprisal", "local_logprob"]
"""What learnability is measured by; the measures are defined in ``router_model.learnability_measures``."""
HeadChoice = Literal[
    "auto",
    "constant",
    "ridge",
    "knn",
    "cluster",
    "mlp",
    "bt",
    "paper_bt",
    "soft_bt",
    "regression",
    "listwise",
    "plackett_luce",
    "regret",
]
"""Heads that training fits: ``auto``, predictors of a reward, and objectives."""
STRATEGIES: tuple[Strategy, ...] = (
    "persyn",
    "strong",
    "mix",
    "family_strong",
    "car",
    "best_single",
    "random",
)

MIX_STRONG_SHARE = 0.2
"""``mix`` is one part strong to four parts weak (Li et al., arXiv 2502.12143)."""

CAR_BETA = 1.0
"""Weight of the student's loss in ``car``."""


@dataclass(frozen=True, slots=True)
class Price:
    """Price of one teacher, US dollars per million tokens."""

    input_usd_per_mtok: float = 0.0
    output_usd_per_mtok: float = 0.0


@dataclass(frozen=True, slots=True)
class Limits:
    """What one teacher's endpoint may be asked for. ``None`` is unlimited."""

    concurrency: int = 16
    requests_per_min: int | None = None
    tokens_per_min: int | None = None


@dataclass(frozen=True, slots=True)
class License:
    """Terms of a teacher's answers, recorded with every data set."""

    name: str = "unknown"
    outputs_may_train: bool | None = None


@dataclass(frozen=True, slots=True)
class TeacherSpec:
    """A teacher: endpoint + model + system prompt + sampling. One model can be several teachers."""

    id: str
    base_url: str
    model: str
    api_key: str | None = field(default=None, repr=False)
    family: str | None = None
    size_b: float | None = None
    system_prompt: str | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    price: Price | None = None
    """``None``: not stated. Its answers are booked at 0, and no choice by cost takes them for free."""
    limits: Limits = Limits()
    timeout_s: float = 120.0
    license: License = License()


@dataclass(frozen=True, slots=True)
class StudentSpec:
    """A student as the service sees it: its id, its family, and where its router lies."""

    id: str
    checkpoint: str
    family: str | None = None
    backbone: str | None = None
    """Where the router's backbone lies, if not where it lay in training."""


@dataclass(frozen=True, slots=True)
class Project:
    """What the service needs of ``persyn.yaml``. The first student is the default."""

    teachers: tuple[TeacherSpec, ...]
    students: tuple[StudentSpec, ...]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt: an id and an OpenAI chat list. ``extra`` is carried through untouched."""

    id: str
    messages: tuple[ChatMessage, ...]
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one upstream call, as the teacher counted them."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Completion:
    """What one teacher answered: the parsed OpenAI body with its choices kept whole."""

    choices: tuple[Mapping[str, Any], ...]
    served_model: str
    usage: Usage
    created: str
    """RFC 3339 time at which the teacher answered."""
    system_fingerprint: str | None = None

    @property
    def content(self) -> str:
        """Text of the first choice."""
        return str(self.choices[0]["message"].get("content") or "")

    @property
    def finish_reason(self) -> str:
        """Why the worst choice stopped: ``stop`` only if all choices did."""
        reasons = [str(choice.get("finish_reason") or "unknown") for choice in self.choices]
        return next((reason for reason in reasons if reason != "stop"), "stop")


@dataclass(frozen=True, slots=True)
class RoutingDecision:
    """Which teacher answers one prompt, and why. All mappings are keyed by allowed teacher id."""

    prompt_id: str
    teacher: str
    distribution: Mapping[str, float]
    strengths: Mapping[str, float]
    quality: Mapping[str, float]
    learnability: Mapping[str, float]
    expected_reward: Mapping[str, float]
    propensity: float
    """Probability with which the strategy chooses this teacher for this prompt."""
    margin: float
    """Strength of the best allowed teacher minus that of the second, 0 if there is one only."""
    uncertain: bool
    """Whether that lead is within what the router cannot tell apart."""
    input_tokens: int
    truncated: bool
    conformal_set: tuple[str, ...] = ()
    """Teachers that may well be the best one, strongest first; empty where the router was not calibrated."""
    out_of_distribution: bool = False
    """Whether the prompt is unlike those that the router was trained on."""


@dataclass(frozen=True, slots=True)
class Assignment:
    """One prompt, its teacher, and the facts of the decision that the provenance records."""

    prompt: Prompt
    teacher: str
    checkpoint_id: str | None = None
    strategy: str | None = None
    distribution: Mapping[str, float] = field(default_factory=dict)
    propensity: float | None = None
    student: str | None = None
    fallbacks: tuple[str, ...] = ()
    """Teachers to try next, best first. Empty: a substitute would change the data set unnoticed."""


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where one answer came from. Built in ``dispatcher.py`` only."""

    teacher: str
    served_model: str
    checkpoint_id: str | None
    strategy: str | None
    student: str | None
    distribution: Mapping[str, float]
    propensity: float | None
    sampling: Mapping[str, Any]
    prompt_hash: str
    attempts: int
    fallback_from: str | None
    cache: Literal["hit", "miss", "refresh", "off"]
    usage: Usage
    cost_usd: float
    latency_s: float
    finish_reason: str
    created: str
    persyn_version: str


@dataclass(frozen=True, slots=True)
class Answered:
    """One prompt answered."""

    prompt: Prompt
    completion: Completion
    provenance: Provenance


@dataclass(frozen=True, slots=True)
class Failed:
    """One prompt that no allowed teacher answered. ``error`` says why."""

    prompt: Prompt
    teacher: str
    error: Exception
