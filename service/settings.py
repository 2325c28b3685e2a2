"""Settings of the process, from ``PERSYN_*`` environment variables: the reader of the environment."""

import os
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from clients.errors import ConfigurationError

PREFIX = "PERSYN_"
_REDIS_SCHEMES = ("redis://", "rediss://", "unix://")


def _split_keys(value: Any) -> Any:
    return [key.strip() for key in value.split(",") if key.strip()] if isinstance(value, str) else value


ApiKeys = Annotated[tuple[SecretStr, ...], NoDecode, BeforeValidator(_split_keys)]


def cache_folder() -> Path:
    """Where this user's caches lie."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "persyn"


def _default_cache_path() -> Path:
    return cache_folder() / "responses.sqlite"


class Settings(BaseSettings):
    """How this process serves. What it serves stands in ``persyn.yaml``."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_ignore_empty=True, extra="forbid", frozen=True, hide_input_in_errors=True
    )

    host: str = Field("127.0.0.1", description="Address to listen on. Beyond loopback, api_keys is needed.")
    port: int = Field(8080, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    api_keys: ApiKeys = Field(
        (), description="Comma-separated keys; one must come as `Authorization: Bearer` with each request."
    )
    redis_url: SecretStr | None = Field(
        None,
        description="Redis for the response cache (an SQLite file if unset) and for what routers said.",
    )
    cache_path: Path = Field(
        default_factory=_default_cache_path, description="The SQLite file of the response cache."
    )
    cache_ttl_s: float = Field(
        30 * 86400.0,
        gt=0,
        description="Seconds for which a response is kept, and in Redis what a router said.",
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field("INFO", description="Least level logged.")
    log_format: Literal["json", "console"] = Field("json", description="One JSON line per event, or text.")
    max_body_bytes: int = Field(16 * 2**20, ge=1024, description="Longest request body.")
    max_in_flight: int = Field(256, ge=1, description="Calls of /synthesize served at one time.")
    max_queued_prompts: int = Field(
        2048,
        ge=1,
        description="Prompts that may wait for the router; if none wait, any call is let in.",
    )
    max_line_bytes: int = Field(
        2**20, ge=1024, description="Longest line of an NDJSON stream; a longer one is an error."
    )
    max_streams: int = Field(16, ge=1, description="NDJSON streams served at one time.")
    stream_window: int = Field(
        1024,
        ge=1,
        description="Prompts of NDJSON streams that may wait for the router, all streams together; and "
        "prompts of one stream that are read but whose answers are not yet written.",
    )
    stream_stall_s: float = Field(
        60.0, gt=0, description="Seconds for which an NDJSON stream may stand still before it is ended."
    )
    decision_cache_mb: float = Field(
        64.0,
        ge=0,
        description="Memory for what routers said of prompts, in MB; 0 turns it off, that in Redis included.",
    )
    batch_tokens: int = Field(
        2048, ge=1, description="Tokens that share one forward pass; a longer prompt goes alone."
    )
    engine: Literal["auto", "fp32", "bf16"] = Field(
        "auto",
        description="Arithmetic of the backbones; auto takes bf16 where the hardware has it and the "
        "checkpoint has passed the gate in training.",
    )
    device: str = Field("cpu", min_length=1, description="Torch device of the backbones: cpu, cuda, cuda:1.")
    tokenizer_threads: int = Field(2, ge=1, description="Threads that turn prompts into tokens.")
    threads: int | None = Field(
        None, ge=1, description="Cores for the routers, a batch on each; unset, as many as torch chooses."
    )
    shutdown_grace_s: int = Field(
        30, ge=0, description="Seconds that open calls get to finish after SIGTERM."
    )

    @field_validator("log_level", mode="before")
    @classmethod
    def _upper_case(cls, value: Any) -> Any:
        return value.upper() if isinstance(value, str) else value

    @field_validator("api_keys")
    @classmethod
    def _keys_fit_a_header(cls, keys: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        for key in keys:
            secret = key.get_secret_value()
            if not (secret and secret.isascii() and secret.isprintable() and " " not in secret):
                raise ValueError("a key must be printable ASCII without spaces, else no header can carry it")
        return keys

    @field_validator("redis_url")
    @classmethod
    def _redis_scheme(cls, url: SecretStr | None) -> SecretStr | None:
        if url is not None and not url.get_secret_value().startswith(_REDIS_SCHEMES):
            raise ValueError(f"must start with {', '.join(_REDIS_SCHEMES)}")
        return url

    @model_validator(mode="after")
    def _open_to_the_network_only_with_keys(self) -> Self:
        if not self.api_keys and not _is_loopback(self.host):
            raise ValueError(
                f"host {self.host!r} is open to the network: set {PREFIX}API_KEYS, or listen on 127.0.0.1"
            )
        return self


def load_settings(*, known: Iterable[str] = (), **flags: Any) -> Settings:
    """The settings of this process: command-line flags, then the environment, then defaults.

    Args:
        known: Further environment names with the prefix that are meant for somebody else, such as the
            ``api_key_env`` names of a project file.
        flags: Values by field name; ``None`` is a flag that was not given.

    Raises:
        ConfigurationError: A variable is misspelt or has a value that does not fit. Values are not quoted.
    """
    _refuse_misspelt(os.environ, known)
    given = {name: value for name, value in flags.items() if value is not None}
    try:
        return Settings(**given)
    except ValidationError as error:
        reasons = [_reason(fault["loc"], fault["msg"], given) for fault in error.errors(include_input=False)]
        raise ConfigurationError("; ".join(reasons)) from None


def _reason(loc: tuple[int | str, ...], message: str, flags: Mapping[str, Any]) -> str:
    text = message.removeprefix("Value error, ")
    if not loc:
        return text
    name = str(loc[0])
    return f"{'--' + name.replace('_', '-') if name in flags else PREFIX + name.upper()}: {text}"


def prepare_runtime() -> None:
    """What libraries read when they are loaded: call it before torch is imported.

    What is set already stays.
    """
    # Prompts are tokenised on threads of our own; more below them would only wait for the cores.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _refuse_misspelt(environment: Iterable[str], known: Iterable[str]) -> None:
    valid = [PREFIX + name.upper() for name in Settings.model_fields]
    accepted = {*valid, *known}
    for name in sorted(environment):
        # Names are matched without case, as pydantic-settings reads them.
        if name.upper().startswith(PREFIX) and name not in accepted and name.upper() not in valid:
            near = get_close_matches(name.upper(), valid, n=1, cutoff=0.0)[0]
            raise ConfigurationError(f"environment variable {name} is not a setting; did you mean {near}?")


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
