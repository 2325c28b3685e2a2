"""Structured logs: one line per event, from ``service`` and from the libraries alike. No prompts at INFO."""

import logging
import sys
from collections.abc import Sequence
from typing import Literal

import structlog
from structlog.typing import EventDict, Processor

_HANDLER_NAME = "persyn"
# At INFO these would tell of each upstream call and of each connection.
_NOISY = ("httpx", "httpcore", "aiohttp.access", "uvicorn.access")


def configure_logging(level: str, log_format: Literal["json", "console"]) -> None:
    """Send every record of this process to stderr, rendered alike. A second call replaces the first.

    Events of ``service`` are written straight: as a record of ``logging`` one of them costs more than all
    else that a cached decision takes. Records of libraries come through one handler.
    """
    structlog.configure(
        processors=[*_shared_processors(), *_renderers(log_format)],
        logger_factory=_Lines,
        wrapper_class=structlog.make_filtering_bound_logger(level),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.set_name(_HANDLER_NAME)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*_shared_processors(), structlog.stdlib.ExtraAdder()],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                _without_copies,
                *_renderers(log_format),
            ],
        )
    )
    root = logging.getLogger()
    for present in list(root.handlers):
        if present.get_name() == _HANDLER_NAME:
            root.removeHandler(present)
    root.addHandler(handler)
    root.setLevel(level)
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.WARNING)


class _Lines:
    """The end of the chain of an event: one line on stderr, whole even where threads write at once."""

    def __init__(self, name: str) -> None:
        self.name = name

    def debug(self, line: str) -> None:
        sys.stderr.write(line + "\n")

    info = warning = error = critical = debug


def _shared_processors() -> Sequence[Processor]:
    return (
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
    )


def _without_copies(_logger: object, _method: str, event: EventDict) -> EventDict:
    """Drop the copies of the event that uvicorn and other formatters leave on a record."""
    for name in ("message", "color_message"):
        event.pop(name, None)
    return event


def _renderers(log_format: Literal["json", "console"]) -> Sequence[Processor]:
    if log_format == "console":
        # exc_info is rendered by the console renderer itself.
        return (structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty()),)
    return (structlog.processors.format_exc_info, structlog.processors.JSONRenderer())
