"""``persyn.yaml``: its schema, strict reading with line numbers, and what the other layers need of it."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    AnyHttpUrl,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from clients.canonical import canonical_json
from clients.errors import ConfigurationError
from clients.types import (
    HeadChoice,
    LearnabilityMeasure,
    License,
    Limits,
    Price,
    Project,
    StudentSpec,
    TeacherSpec,
)
from router_model.yaml_file import YamlFile, read_yaml, unknown_key

Identifier = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[^\s/]+(/[^\s/]+)*$")]
Named = TypeVar("Named", "StudentSection", "TeacherSection")


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class StudentSection(_Section):
    """One model to be trained on the data."""

    id: Identifier
    family: str | None = None
    model: Annotated[str, Field(min_length=1, description="Hub id, local folder, or a .gguf file.")]
    checkpoint: Annotated[str, Field(min_length=1, description="Folder where `serve` finds its router.")]


class PriceSection(_Section):
    """US dollars per million tokens."""

    input_usd_per_mtok: Annotated[float, Field(ge=0)] = 0.0
    output_usd_per_mtok: Annotated[float, Field(ge=0)] = 0.0


class LimitsSection(_Section):
    """What the endpoint may be asked for."""

    concurrency: Annotated[int, Field(ge=1, le=4096)] = 16
    requests_per_min: Annotated[int, Field(ge=1)] | None = None
    tokens_per_min: Annotated[int, Field(ge=1)] | None = None


class LicenseSection(_Section):
    """Terms of the teacher's answers."""

    name: str = "unknown"
    outputs_may_train: bool | None = None


def _json(value: dict[str, Any]) -> dict[str, Any]:
    try:
        canonical_json(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"holds what no request can carry: {error}") from None
    return value


JsonObject = Annotated[dict[str, Any], AfterValidator(_json)]


def _plain_url(url: str) -> str:
    try:
        parsed = AnyHttpUrl(url)
    except ValidationError as error:
        raise ValueError(f"is no http address: {error.errors()[0]['msg']}") from None
    if parsed.username or parsed.password:
        raise ValueError("holds a user name or password; name a variable in api_key_env instead")
    return url.rstrip("/")


class TeacherSection(_Section):
    """Endpoint + model + system prompt + sampling. One model can be several teachers."""

    id: Identifier
    base_url: Annotated[str, AfterValidator(_plain_url)]
    model: Annotated[str, Field(min_length=1)]
    api_key_env: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] | None = Field(
        None, description="Name of the environment variable that holds the key; never the key itself."
    )
    family: str | None = None
    size_b: Annotated[float, Field(gt=0)] | None = Field(None, description="Billions of parameters.")
    system_prompt: str | None = None
    sampling: JsonObject = Field(default_factory=dict)
    extra_body: JsonObject = Field(default_factory=dict)
    price: PriceSection | None = None
    limits: LimitsSection = LimitsSection()
    timeout_s: Annotated[float, Field(gt=0)] = 120.0
    license: LicenseSection = LicenseSection()

    def spec(self, environment: Mapping[str, str] | None = None) -> TeacherSpec:
        """The teacher with its key read from the environment.

        Raises:
            ConfigurationError: The variable that ``api_key_env`` names is unset or empty.
        """
        values = os.environ if environment is None else environment
        api_key = values.get(self.api_key_env) if self.api_key_env else None
        if self.api_key_env and not api_key:
            raise ConfigurationError(
                f"teacher {self.id!r} needs the environment variable {self.api_key_env}, which is not set"
            )
        if api_key and not (api_key.isascii() and api_key.isprintable()):
            raise ConfigurationError(
                f"{self.api_key_env} holds a line break or other characters that no header can carry"
            )
        return TeacherSpec(
            id=self.id,
            base_url=self.base_url,
            model=self.model,
            api_key=api_key,
            family=self.family,
            size_b=self.size_b,
            system_prompt=self.system_prompt,
            sampling=self.sampling,
            extra_body=self.extra_body,
            price=None if self.price is None else Price(**self.price.model_dump()),
            limits=Limits(**self.limits.model_dump()),
            timeout_s=self.timeout_s,
            license=License(**self.license.model_dump()),
        )


class CalibrationSection(_Section):
    """The prompts that every teacher answers."""

    prompts: Annotated[str, Field(min_length=1)]
    sample: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    test_fraction: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.2, description="Share of the prompts held out for the report, where rows name no split themselves."
    )


class QualitySection(_Section):
    """How answers are judged."""

    kind: Literal["reward_model", "exact_answer", "verifiable"]
    model: str | None = Field(None, description="Reward model: hub id or local folder.")

    @model_validator(mode="after")
    def _model_where_needed(self) -> "QualitySection":
        if (self.kind == "reward_model") != (self.model is not None):
            raise ValueError("model is needed for kind reward_model, and for no other kind")
        return self


class RewardSection(_Section):
    """r = (1 - alpha) * quality + alpha * learnability, both normalised within the prompt."""

    alpha: Annotated[float, Field(ge=0, le=1)] = 0.4
    normalize: Literal["minmax", "zscore", "rank", "none"] = "minmax"
    learnability: LearnabilityMeasure = Field(
        "mean_logprob",
        description="Measure of learnability. local_logprob reads the responses up to five times more.",
    )


class RouterSection(_Section):
    """The model that chooses."""

    backbone: Annotated[str, Field(min_length=1, description="Hub id, local folder, or a .gguf file.")]
    head: HeadChoice = "auto"
    max_tokens: Annotated[int, Field(ge=8)] = 2048
    views: Annotated[
        list[str] | None,
        Field(description="Hidden states to use, such as last@22; several layers by default.", min_length=1),
    ] = None


class ProjectFile(_Section):
    """The whole of ``persyn.yaml``."""

    version: Literal[1]
    students: Annotated[list[StudentSection], Field(min_length=1)]
    teachers: Annotated[list[TeacherSection], Field(min_length=1)]
    calibration: CalibrationSection
    quality: QualitySection
    reward: RewardSection = RewardSection()
    router: RouterSection

    @model_validator(mode="after")
    def _unique_ids(self) -> "ProjectFile":
        for name, sections in (("students", self.students), ("teachers", self.teachers)):
            ids = [section.id for section in sections]
            repeated = sorted({identifier for identifier in ids if ids.count(identifier) > 1})
            if repeated:
                raise ValueError(f"{name}: id {repeated[0]!r} is given twice")
        return self

    def student(self, student_id: str | None) -> StudentSection:
        """The student of that id, or the first.

        Raises:
            ConfigurationError: No such student.
        """
        if student_id is None:
            return self.students[0]
        for section in self.students:
            if section.id == student_id:
                return section
        known = ", ".join(section.id for section in self.students)
        raise ConfigurationError(f"no student {student_id!r}; known: {known}")

    def key_variables(self) -> tuple[str, ...]:
        """Names of the environment variables that hold teachers' keys."""
        return tuple(section.api_key_env for section in self.teachers if section.api_key_env)

    def teacher_specs(
        self, environment: Mapping[str, str] | None = None, *, with_keys: bool = True
    ) -> tuple[TeacherSpec, ...]:
        """All teachers, with their keys unless they are only named and not asked.

        Raises:
            ConfigurationError: The variable of a key is not set.
        """
        if not with_keys:
            keyless = [section.model_copy(update={"api_key_env": None}) for section in self.teachers]
            return tuple(section.spec({}) for section in keyless)
        return tuple(section.spec(environment) for section in self.teachers)

    def project(self) -> Project:
        """What the service needs."""
        students = tuple(
            StudentSpec(section.id, section.checkpoint, section.family, self.router.backbone)
            for section in self.students
        )
        return Project(teachers=self.teacher_specs(), students=students)


def load_project(path: Path) -> ProjectFile:
    """Read ``persyn.yaml``. Relative paths in it are relative to its folder.

    Raises:
        ConfigurationError: With the line of each mistake, and for an unknown key the nearest valid one.
    """
    file = read_yaml(path, otherwise="`persyn init` writes an example")
    try:
        project = ProjectFile.model_validate(file.content)
    except ValidationError as error:
        raise ConfigurationError("\n".join(_explain(file, error))) from None
    return _with_resolved_paths(project, path.parent)


def project_schema() -> dict[str, Any]:
    """JSON Schema of ``persyn.yaml``, for editors."""
    return ProjectFile.model_json_schema()


def _explain(file: YamlFile, error: ValidationError) -> list[str]:
    return [
        f"{file.path}:{file.line(item['loc'])}: {_mistake(item['loc'], item['type'], item['msg'])}"
        for item in error.errors(include_url=False)
    ]


def _mistake(location: tuple[int | str, ...], kind: str, message: str) -> str:
    where = ".".join(str(part) for part in location) or "the file"
    if kind == "extra_forbidden":
        return unknown_key(where, str(location[-1]), _valid_keys(location[:-1]))
    return f"{where}: {message.removeprefix('Value error, ')}"


def _valid_keys(location: tuple[int | str, ...]) -> list[str]:
    """Keys of the section at ``location``, read off the JSON Schema."""
    schema = project_schema()
    node: Mapping[str, Any] = schema
    for part in location:
        node = node["items"] if isinstance(part, int) else node["properties"][part]
        if "$ref" in node:
            node = schema["$defs"][node["$ref"].rsplit("/", 1)[-1]]
    return list(node.get("properties", {}))


def _with_resolved_paths(project: ProjectFile, folder: Path) -> ProjectFile:
    resolved = project.model_copy(deep=True)
    for student in resolved.students:
        student.checkpoint = str(folder / student.checkpoint)
        student.model = resolve_model(student.model, folder)
    resolved.calibration.prompts = str(folder / resolved.calibration.prompts)
    resolved.router.backbone = resolve_model(resolved.router.backbone, folder)
    if resolved.quality.model is not None:
        resolved.quality.model = resolve_model(resolved.quality.model, folder)
    return resolved


def resolve_model(name: str, folder: Path) -> str:
    """A local model as an absolute path; any other name is a hub id and stays."""
    try:
        local = folder / Path(name).expanduser()
    except RuntimeError as error:
        raise ConfigurationError(f"{name}: {error}") from None
    return str(local.resolve()) if local.exists() else name


def example_project() -> str:
    """The commented example that ``persyn init`` writes."""
    return EXAMPLE.replace("__SCHEMA__", SCHEMA_FILE)


def schema_text() -> str:
    """The schema as the text of a file."""
    return json.dumps(project_schema(), indent=2) + "\n"


SCHEMA_FILE = "persyn.schema.json"

EXAMPLE = """\
# yaml-language-server: $schema=./__SCHEMA__
version: 1

# One router per student; the first is the default.
students:
  - id: qwen2.5-0.5b
    family: qwen
    model: Qwen/Qwen2.5-0.5B              # hub id, local folder, or a .gguf file
    checkpoint: runs/qwen2.5-0.5b/checkpoint

# A teacher = endpoint + model + system prompt + sampling: one model can be several teachers.
teachers:
  - id: qwen2.5-72b
    base_url: http://127.0.0.1:8000/v1    # any OpenAI-compatible endpoint
    model: Qwen/Qwen2.5-72B-Instruct
    # api_key_env: TEACHER_KEY            # the name of a variable, never the key itself
    family: qwen
    size_b: 72
    sampling: {temperature: 0.7, top_p: 0.95, max_tokens: 1024}
    # Without a price its cost is unknown, which a choice by cost takes for dear. State 0 where it is free.
    price: {input_usd_per_mtok: 0.9, output_usd_per_mtok: 0.9}
    limits: {concurrency: 16}
    timeout_s: 120
    license: {name: qwen, outputs_may_train: true}
  - id: qwen2.5-7b-terse
    base_url: http://127.0.0.1:8001/v1
    model: Qwen/Qwen2.5-7B-Instruct
    family: qwen
    size_b: 7
    system_prompt: Answer in as few words as the question allows.
    sampling: {temperature: 0.3, max_tokens: 512}
    price: {input_usd_per_mtok: 0.1, output_usd_per_mtok: 0.1}
    license: {name: apache-2.0, outputs_may_train: true}

# The prompts that every teacher answers, once.
calibration: {prompts: prompts.jsonl, sample: 2500, seed: 0}

# How answers are judged: verifiable (constraints in the prompt rows), exact_answer (column answer),
# or reward_model with a model.
quality: {kind: verifiable}

# reward = (1 - alpha) * quality + alpha * learnability, both normalised within the prompt.
# Learnability is measured by mean_logprob, rank_surprisal or local_logprob.
reward: {alpha: 0.4, normalize: minmax, learnability: mean_logprob}

router: {backbone: sentence-transformers/all-MiniLM-L6-v2, head: auto, max_tokens: 512}
"""

EXAMPLE_PROMPTS = (
    {
        "id": "rivers-1",
        "prompt": "Name two long rivers, one bullet each.",
        "constraints": [{"kind": "bullet_count", "min": 2, "max": 2}],
        "split": "test",
    },
    {
        "id": "bread-1",
        "prompt": "List exactly three things one needs to bake bread, as bullets.",
        "constraints": [{"kind": "bullet_count", "min": 3, "max": 3}],
        "split": "train",
    },
    {
        "id": "tides-1",
        "prompt": "Explain tides in one sentence of at most 25 words. Mention the moon.",
        "constraints": [
            {"kind": "sentence_count", "min": 1, "max": 1},
            {"kind": "word_count", "max": 25},
            {"kind": "required_words", "words": ["moon"]},
        ],
        "split": "train",
    },
)
