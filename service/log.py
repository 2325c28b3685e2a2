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
    """Send every record of this process through one handler on stderr. A second call replaces it."""
    shared = _shared_processors()
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.set_name(_HANDLER_NAME)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.ExtraAdder()],
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


def _shared_processors() -> Sequence[Processor]:
    return (
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.PositionalArgumentsFormatter(),
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
