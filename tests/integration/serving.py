"""A real service on a loopback port: a router trained on the spot, and uvicorn in a thread."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI

from clients.types import Price, Project, StudentSpec, TeacherSpec
from router_model.pipeline.train import TrainSettings, train_router
from service.app import Server, create_app
from service.settings import Settings

MATHS = ["What is {n} plus {n}?", "Multiply {n} by seven.", "Is {n} a prime number?", "Divide {n} by three."]
VERSE = [
    "Write a poem about {n} ravens.",
    "A haiku on {n} autumn leaves, please.",
    "Compose {n} lines on the sea.",
    "Sing of {n} lost ships.",
]
TEACHERS = ("calculator", "novice", "poet")


class Silent:
    """A Progress that shows nothing."""

    def start(self, stage: str, *, total: int, done: int = 0) -> None:
        """Nothing is shown."""

    def advance(self, n_items: int = 1, *, n_errors: int = 0, cost_usd: float = 0.0) -> None:
        """Nothing is shown."""

    def finish(self) -> None:
        """Nothing is shown."""

    def note(self, message: str) -> None:
        """Nothing is shown."""


def train_checkpoint(
    folder: Path, backbone: Path, teachers: Sequence[str] = TEACHERS, *, max_tokens: int = 256
) -> Path:
    """A router for which the first teacher is good at sums, the last at verse, any other at neither."""
    folder.mkdir(parents=True, exist_ok=True)
    scores = folder / "scores.jsonl"
    with scores.open("w") as file:
        for kind, templates in enumerate((MATHS, VERSE)):
            for number in range(24):
                text = templates[number % len(templates)].format(n=number + 2)
                for column, teacher in enumerate(teachers):
                    good = column == (0 if kind == 0 else len(teachers) - 1)
                    row = {
                        "prompt_id": f"{kind}-{number}",
                        "prompt": text,
                        "teacher": teacher,
                        "quality": (0.9 if good else 0.2) + 0.001 * number,
                        "learnability": (-0.8 if good else -1.3 if column == 1 else -1.6) - 0.001 * number,
                        "family": f"family-{column}",
                        "size_b": 1.0 + column,
                    }
                    file.write(json.dumps(row) + "\n")
    checkpoint = folder / "checkpoint"
    settings = TrainSettings(
        student="tiny", student_family="family-1", backbone=str(backbone), head="ridge", max_tokens=max_tokens
    )
    train_router(scores, checkpoint, settings, progress=Silent())
    return checkpoint


def teacher_spec(teacher_id: str, base_url: str) -> TeacherSpec:
    """A teacher at a FakeTeacher's address, with a price."""
    return TeacherSpec(
        id=teacher_id,
        base_url=base_url,
        model=f"model-{teacher_id}",
        api_key="upstream-secret",
        sampling={"temperature": 0.7},
        price=Price(1.0, 2.0),
        timeout_s=60.0,
    )


def project_of(checkpoint: Path, base_url: str, teachers: Sequence[str] = TEACHERS) -> Project:
    """A project with one student and these teachers."""
    student = StudentSpec("tiny", str(checkpoint), family="family-1")
    return Project(tuple(teacher_spec(teacher, base_url) for teacher in teachers), (student,))


class _Server(Server):
    """A server that says when it takes requests, or that it never will."""

    def __init__(self, app: FastAPI, settings: Settings) -> None:
        super().__init__(app, settings)
        self.settled = threading.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.settled.set()


@dataclass(frozen=True)
class Served:
    """A service that runs."""

    app: FastAPI
    base_url: str
    server: Server


@contextmanager
def serving(settings: Settings, project: Project) -> Iterator[Served]:
    """Run the service in a thread while the block runs; leaving it waits for the drain."""
    app = create_app(settings, project)
    server = _Server(app, settings)

    def run() -> None:
        try:
            server.run()
        finally:
            server.settled.set()

    thread = threading.Thread(target=run, name="served")
    thread.start()
    try:
        assert server.settled.wait(120)
        assert server.started, app.state.startup_error
        port = server.servers[0].sockets[0].getsockname()[1]
        yield Served(app, f"http://127.0.0.1:{port}", server)
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


def problem(http_response: httpx.Response, status: int, slug: str) -> dict[str, Any]:
    """The problem document, checked for what every one of them has."""
    assert http_response.status_code == status, http_response.text
    assert http_response.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = http_response.json()
    assert body["type"] == f"urn:persyn:problem:{slug}"
    assert body["request_id"] == http_response.headers["x-request-id"]
    assert body["status"] == status
    return body


def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Wait for something that another thread does."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it never happened"
        threading.Event().wait(0.01)


def chat(text: str) -> list[dict[str, str]]:
    """A lone user turn."""
    return [{"role": "user", "content": text}]
