"""A service whose model is scripted, and a client that holds both ends of a stream in its hands."""

import json
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import httpx
import pytest

from service import backbone_work
from service.settings import Settings
from tests.integration.serving import Served, project_of, serving

NDJSON = {"content-type": "application/x-ndjson"}


class ScriptedModel:
    """Stands for the forward pass: the router's own answer to the first prompt is given for all.

    Everything else is real: sockets, server, middleware, tokenizer, batches, decisions.
    """

    def __init__(self) -> None:
        self.n_prompts = 0
        self.lengths: list[list[int]] = []
        """Tokens of each prompt, batch by batch."""
        self.gate = threading.Event()
        """Batches wait for it."""
        self.gate.set()
        self._outputs: list[Any] = []
        self._answer_jobs = backbone_work.answer_jobs

    def answer_jobs(self, backbone: Any, jobs: Sequence[Any]) -> Sequence[Any]:
        """See ``router_model.joint_inference.answer_jobs``."""
        if not self._outputs:
            self._outputs += self._answer_jobs(backbone, jobs[:1])
        assert self.gate.wait(60)
        self.n_prompts += len(jobs)
        self.lengths.append([len(job.prompt.ids) for job in jobs])
        return self._outputs * len(jobs)


@contextmanager
def scripted_service(
    checkpoint: Path, tmp_path: Path, **settings: Any
) -> Iterator[tuple[Served, ScriptedModel]]:
    """A service on a scripted model, while the block runs; by default it caches no decision."""
    model = ScriptedModel()
    plain = {"port": 0, "cache_path": tmp_path / "c.sqlite", "threads": 1, "decision_cache_mb": 0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backbone_work, "answer_jobs", model.answer_jobs)
        with serving(
            Settings(**{**plain, **settings}),
            project_of(checkpoint, "http://127.0.0.1:9"),
        ) as served:
            try:
                yield served, model
            finally:
                # A closed gate would hold up the drain.
                model.gate.set()


def route_lines(served: Served, content: Any, **options: Any) -> list[dict[str, Any]]:
    """Send a whole stream and read the answer when it is sent."""
    http_response = httpx.post(
        f"{served.base_url}/route", content=content, headers=NDJSON, params=options, timeout=60
    )
    assert http_response.status_code == 200, http_response.text
    assert http_response.headers["content-type"] == "application/x-ndjson"
    return [json.loads(line) for line in http_response.content.splitlines()]


def metric(served: Served, name: str) -> float:
    """The value of a metric without labels, or with the labels that are part of the name."""
    for line in httpx.get(f"{served.base_url}/metrics").text.splitlines():
        if line.startswith(f"{name} "):
            return float(line.rpartition(" ")[2])
    pytest.fail(f"no metric {name}")


class StreamClient:
    """One NDJSON stream on a plain socket: the test says when a line is sent and when an answer is read.

    Args:
        n_receive_bytes: Size of the kernel's buffer for what is not read yet.
    """

    def __init__(self, served: Served, *, query: str = "", n_receive_bytes: int | None = None) -> None:
        self.socket = socket.socket()
        if n_receive_bytes is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, n_receive_bytes)
        self.socket.settimeout(30)
        host, _, port = served.base_url.removeprefix("http://").partition(":")
        self.socket.connect((host, int(port)))
        self.socket.sendall(
            f"POST /route{query} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/x-ndjson\r\n"
            "transfer-encoding: chunked\r\n\r\n".encode()
        )
        self._file = self.socket.makefile("rb")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close both directions."""
        self._file.close()
        self.socket.close()

    def send(self, *prompts: Any) -> None:
        """Send prompts as one chunk."""
        self.send_bytes(b"".join(json.dumps(prompt).encode() + b"\n" for prompt in prompts))

    def send_bytes(self, content: bytes, *, end: bool = False) -> None:
        """Send one chunk, and with it the end of the body if so."""
        self.socket.sendall(b"%x\r\n%s\r\n" % (len(content), content) + (b"0\r\n\r\n" if end else b""))

    def end(self) -> None:
        """Say that the body has ended."""
        self.socket.sendall(b"0\r\n\r\n")

    def read_head(self) -> str:
        """Status line and headers."""
        lines = []
        while (line := self._file.readline()) not in (b"\r\n", b""):
            lines.append(line)
        return b"".join(lines).decode()

    def lines(self) -> Iterator[dict[str, Any]]:
        """The lines of the answer, to its end; ``ConnectionError`` if it has none."""
        rest = b""
        while True:
            size = self._file.readline()
            if not size.endswith(b"\r\n"):
                raise ConnectionError("the answer has no end")
            n_bytes = int(size, 16)
            *whole, rest = (rest + self._file.read(n_bytes)).split(b"\n")
            self._file.read(2)
            yield from map(json.loads, whole)
            if not n_bytes:
                assert not rest
                return
