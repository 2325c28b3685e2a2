"""The recipe of a fine-tuning run: every number that shapes it, read strictly from YAML."""

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from clients.errors import ConfigurationError
from router_model.objectives import OBJECTIVES
from router_model.reward import Normalization
from router_model.views import Pooling
from router_model.yaml_file import read_yaml, unknown_key


def _known_objective(name: str) -> str:
    if name not in OBJECTIVES:
        raise ValueError(f"unknown objective {name!r}: expected one of {list(OBJECTIVES)}")
    return name


Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]


class FineTuneRecipe(BaseModel):
    """How a backbone and its linear head are trained together.

    ``backbone``, ``alpha`` and ``normalization`` say what a run starts from and how its rewards are mixed:
    they are for the caller of ``fine_tune``, which takes both as they are.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    backbone: Annotated[str, Field(min_length=1, description="Hub id, local folder, or a .gguf file.")]
    alpha: Annotated[float, Field(ge=0, le=1, description="Weight of learnability in the reward.")] = 0.4
    normalization: Normalization = "minmax"
    objective: Annotated[str, AfterValidator(_known_objective)] = "soft_bt"
    temperature: Annotated[Positive, Field(description="Of the objective; some have no use for it.")] = 1.0
    pooling: Annotated[
        Pooling | None, Field(description="By default `mean` for encoders, `last` for decoders.")
    ] = None
    max_tokens: Annotated[int, Field(ge=1, description="Per prompt; a longer one is cut.")] = 2048
    learning_rate: Positive = 4e-6
    head_learning_rate: Annotated[
        Positive | None, Field(description="Of the linear head, by default that of the backbone.")
    ] = None
    beta1: Share = 0.9
    beta2: Share = 0.999
    epsilon: Positive = 1e-8
    weight_decay: Annotated[NotNegative, Field(description="Of matrices; biases and norms have none.")] = 0.0
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_share: Annotated[Share, Field(description="Part of all steps in which the rate rises.")] = 0.03
    clip_norm: Annotated[Positive, Field(description="Largest norm of a step's gradient.")] = 1.0
    epochs: Count = 10
    patience: Annotated[
        int, Field(ge=1, description="Epochs without a lower held-out regret before training stops.")
    ] = 2
    held_out_share: Annotated[
        float, Field(gt=0, lt=1, description="Part of the prompts that early stopping looks at.")
    ] = 0.1
    batch_prompts: Annotated[int, Field(ge=1, description="Prompts per step of the optimizer.")] = 64
    tokens_per_pass: Annotated[
        int,
        Field(ge=1, description="Padded tokens per forward pass; a batch takes as many as it needs."),
    ] = 16384
    bf16: Annotated[bool, Field(description="bfloat16 autocast on a GPU; weights stay in float32.")] = True
    gradient_checkpointing: Annotated[bool, Field(description="Less memory for a third more time.")] = False

    def rate_factor(self, step: int, n_steps: int) -> float:
        """What the learning rates are multiplied by in a step, from 0, out of ``n_steps``."""
        n_warmup = math.ceil(self.warmup_share * n_steps)
        if step < n_warmup:
            return (step + 1) / n_warmup
        if self.schedule == "constant":
            return 1.0
        return (1 + math.cos(math.pi * (step - n_warmup) / max(n_steps - n_warmup, 1))) / 2


def read_recipe(path: Path) -> FineTuneRecipe:
    """Read a recipe from YAML.

    Raises:
        ConfigurationError: The file cannot be read, or a key is unknown, missing, repeated or out of its
            range; the message names each such key and its line.
    """
    file = read_yaml(path, otherwise="a recipe is keys with their values, as those in recipes/")
    try:
        return FineTuneRecipe.model_validate(file.content)
    except ValidationError as error:
        mistakes = [
            f"{path}:{file.line(item['loc'])}: {_mistake(item)}" for item in error.errors(include_url=False)
        ]
        raise ConfigurationError("\n".join(mistakes)) from None


def _mistake(item: Any) -> str:
    key, message = str(item["loc"][0]), str(item["msg"]).removeprefix("Value error, ")
    if item["type"] == "extra_forbidden":
        return unknown_key(key, key, list(FineTuneRecipe.model_fields))
    if item["type"] == "float_type" and _is_number(item["input"]):
        return f"{key}: YAML reads {item['input']} as text: write it with a point, such as 4.0e-6"
    return f"{key}: {message}"


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True
