"""Logs: one JSON line per event, whoever wrote it."""

import json
import logging
from collections.abc import Iterator

import pytest
import structlog

from service.log import configure_logging


@pytest.fixture(autouse=True)
def _restore_logging() -> Iterator[None]:
    """The root logger is as it was after each test."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:], root.level = handlers, level
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


def test_service_and_library_write_the_same_kind_of_line(capsys: pytest.CaptureFixture[str]) -> None:
    """structlog events and standard records both become JSON with event, level, time and request id."""
    configure_logging("INFO", "json")
    structlog.contextvars.bind_contextvars(request_id="r-1")
    structlog.get_logger("service.x").info("thing_done", n=3)
    logging.getLogger("clients.x").warning("teacher_failed", extra={"teacher": "a"})
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [(line["event"], line["level"], line["request_id"]) for line in lines] == [
        ("thing_done", "info", "r-1"),
        ("teacher_failed", "warning", "r-1"),
    ]
    assert lines[0]["n"] == 3
    assert lines[1]["teacher"] == "a"
    assert all("time" in line for line in lines)


def test_a_traceback_stays_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """An exception is one JSON line with its traceback inside, so that a collector keeps it whole."""
    configure_logging("INFO", "json")
    try:
        _ = 1 / 0
    except ZeroDivisionError:
        structlog.get_logger("service.x").exception("broken")
    (line,) = capsys.readouterr().err.splitlines()
    assert "ZeroDivisionError" in json.loads(line)["exception"]


def test_configuring_twice_does_not_double_the_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """A second application in the process replaces the handler."""
    configure_logging("INFO", "json")
    configure_logging("INFO", "json")
    structlog.get_logger("service.x").info("once")
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_level_is_obeyed(capsys: pytest.CaptureFixture[str]) -> None:
    """Below the level nothing is written, and chatty libraries write warnings only."""
    configure_logging("INFO", "console")
    structlog.get_logger("service.x").debug("detail")
    logging.getLogger("httpx").info("HTTP Request: POST http://teacher")
    assert capsys.readouterr().err == ""
    structlog.get_logger("service.x").info("shown")
    assert "shown" in capsys.readouterr().err
