"""Streams of ``POST /route`` under way: back-pressure, clients that stall or leave, many lines, shutdown."""

import functools
import json
import os
import shutil
import subprocess
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from httpx_aiohttp import AiohttpTransport
from structlog.testing import capture_logs

from service.settings import Settings
from tests.integration.serving import Served, problem, project_of, serving, until
from tests.integration.streaming import (
    NDJSON,
    ScriptedModel,
    StreamClient,
    metric,
    route_lines,
    scripted_service,
)

WINDOW = 64
STALL_S = 1.0


@pytest.fixture(scope="module")
def scripted(
    checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Served, ScriptedModel]]:
    """A service on a scripted model, with the window that it has by default."""
    with scripted_service(checkpoint, tmp_path_factory.mktemp("scripted")) as running:
        yield running


@pytest.fixture(scope="module")
def narrow(
    checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Served, ScriptedModel]]:
    """A service on a scripted model, with a small window, short lines and two streams."""
    with scripted_service(
        checkpoint,
        tmp_path_factory.mktemp("narrow"),
        stream_window=WINDOW,
        max_line_bytes=20_000,
        max_streams=2,
        max_queued_prompts=8,
    ) as running:
        yield running


@pytest.fixture(scope="module")
def impatient(
    checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Served, ScriptedModel]]:
    """A service on a scripted model that waits a second for a client."""
    folder = tmp_path_factory.mktemp("impatient")
    with scripted_service(checkpoint, folder, stream_stall_s=STALL_S, stream_window=WINDOW) as running:
        yield running


def prompt_lines(n_lines: int) -> Iterator[bytes]:
    """Lines with ids that say their number, from 1."""
    for number in range(1, n_lines + 1):
        yield b'{"id": "%d", "prompt": "Prompt number %d"}\n' % (number, number)


def assert_nothing_is_held(served: Served) -> None:
    """Every permit comes back, and the router may be closed."""
    services = served.app.state.services
    (student,) = services.students
    until(lambda: services.streams.n_held == 0)
    assert services.bulk.n_in_work == 0
    assert student.served._n_users == 0
    assert metric(served, "persyn_route_streams_open") == 0


def assert_whole(content: bytes, n_lines: int) -> None:
    """All lines are answered, in order, and the summary agrees."""
    *items, summary = map(json.loads, content.splitlines())
    assert [item["line"] for item in items] == list(range(1, n_lines + 1))
    assert [item["id"] for item in items] == [str(n) for n in range(1, n_lines + 1)]
    assert {item["status"] for item in items} == {"ok"}
    assert (summary["ok"], summary["failed"], summary["lines"], summary["error"]) == (
        n_lines,
        0,
        n_lines,
        None,
    )


class TestManyLines:
    """Clients as people have them."""

    @pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
    @pytest.mark.parametrize(
        ("options", "n_lines"), [(["--data-binary", "@-"], 100_000), (["-X", "POST", "-T", "-"], 20_000)]
    )
    def test_curl(
        self, scripted: tuple[Served, ScriptedModel], tmp_path: Path, options: list[str], n_lines: int
    ) -> None:
        """Both ways to send a file with curl get every line answered; the service's memory stays flat."""
        served, _ = scripted
        command = ["curl", "-sS", "-H", "content-type: application/x-ndjson", *options]
        command += ["-o", str(tmp_path / "out"), f"{served.base_url}/route"]
        with (tmp_path / "in").open("wb") as file:
            file.writelines(prompt_lines(n_lines))
        route_lines(served, b"".join(prompt_lines(1_000)))
        before_bytes = highest_bytes = _resident_bytes()
        with (tmp_path / "in").open("rb") as file, subprocess.Popen(command, stdin=file) as curl:
            while curl.poll() is None:
                highest_bytes = max(highest_bytes, _resident_bytes())
                threading.Event().wait(0.01)
        assert curl.returncode == 0
        answer = (tmp_path / "out").read_bytes()
        assert_whole(answer, n_lines)
        assert len(answer) > 10 * 2**20
        assert highest_bytes - before_bytes < 10 * 2**20

    async def test_a_client_that_reads_while_it_sends(self, scripted: tuple[Served, ScriptedModel]) -> None:
        """An asynchronous httpx client streams both ways over one connection."""
        served, _ = scripted

        async def content() -> AsyncIterator[bytes]:
            for line in prompt_lines(20_000):
                yield line

        async with (
            httpx.AsyncClient(transport=AiohttpTransport(), timeout=30) as http,
            http.stream("POST", f"{served.base_url}/route", content=content(), headers=NDJSON) as response,
        ):
            assert_whole(await response.aread(), 20_000)

    def test_a_client_that_reads_when_it_has_sent(self, scripted: tuple[Served, ScriptedModel]) -> None:
        """As much as the window is read before any answer is: such a client may send that much at a time."""
        served, model = scripted
        model.gate.clear()
        with StreamClient(served) as client:
            # All of it, although not one prompt is routed.
            client.send_bytes(b"".join(prompt_lines(1024)))
            client.end()
            client.read_head()
            model.gate.set()
            assert len(list(client.lines())) == 1025
        http_response = httpx.post(
            f"{served.base_url}/route", content=prompt_lines(1024), headers=NDJSON, timeout=30
        )
        assert_whole(http_response.content, 1024)


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class TestBackPressure:
    """Nobody is read from faster than answers go out."""

    def test_who_does_not_read_is_not_read_from(self, narrow: tuple[Served, ScriptedModel]) -> None:
        """Of a body without end the service reads what the window and the buffers hold; then all goes on."""
        served, _ = narrow
        read_bytes = functools.partial(metric, served, "persyn_route_stream_read_bytes_total")
        # An error that carries its id back: as long as its line, and dear to nobody.
        line_bytes, n_lines = 10_000, 4_000
        padding = "x" * (line_bytes - 20)
        before_bytes = read_bytes()
        n_sent = 0
        with StreamClient(served, n_receive_bytes=4096) as client:

            def send() -> None:
                nonlocal n_sent
                for number in range(1, n_lines + 1):
                    client.send({"id": f"{number:06}{padding}"})
                    n_sent = number
                client.end()

            def is_stuck() -> bool:
                n_before = n_sent
                threading.Event().wait(0.2)
                return n_sent == n_before

            sender = threading.Thread(target=send)
            sender.start()
            # More than the window: answers are written until the kernel's buffers are full.
            until(lambda: read_bytes() - before_bytes > WINDOW * line_bytes and is_stuck(), timeout_s=30)
            # The window, the pieces under way, and at most 4 MB that Linux keeps of answers; of 40 MB.
            assert read_bytes() - before_bytes < 6 * 2**20
            client.read_head()
            *items, summary = client.lines()
            sender.join()
        assert read_bytes() - before_bytes > n_lines * (line_bytes - 20)
        assert [item["line"] for item in items] == list(range(1, n_lines + 1))
        assert [item["id"][:6] for item in items] == [f"{number:06}" for number in range(1, n_lines + 1)]
        assert (summary["failed"], summary["error"]) == (n_lines, None)

    def test_a_long_line_is_skipped_without_being_kept(self, narrow: tuple[Served, ScriptedModel]) -> None:
        """A line of 30 MB is one error as soon as it is too long; the lines around it are answered."""
        served, _ = narrow
        before_bytes = _resident_bytes()
        with StreamClient(served) as client:
            client.read_head()
            answers = client.lines()
            client.send("first")
            assert next(answers)["status"] == "ok"
            client.send_bytes(b'"' + b"y" * 40_000)
            failed = next(answers)
            for _ in range(300):
                client.send_bytes(b"y" * 100_000)
            client.send_bytes(b'"\n"last"\n')
            client.end()
            last, summary = answers
        assert (failed["line"], failed["error"]["type"]) == (2, "urn:persyn:problem:payload-too-large")
        assert (last["line"], last["status"]) == (3, "ok")
        assert (summary["ok"], summary["failed"]) == (2, 1)
        assert _resident_bytes() - before_bytes < 10 * 2**20

    def test_a_window_of_all_streams_together(self, narrow: tuple[Served, ScriptedModel]) -> None:
        """Two streams wait their turn within one bound and are both answered; a third is a 429."""
        served, model = narrow
        bulk = served.app.state.services.bulk
        model.gate.clear()
        with StreamClient(served) as first, StreamClient(served) as second:
            for client in (first, second):
                client.send_bytes(b"".join(prompt_lines(300)))
                client.end()
            until(lambda: bulk.n_in_work == WINDOW)
            refused = httpx.post(f"{served.base_url}/route", content=b'"x"\n', headers=NDJSON)
            assert int(refused.headers["retry-after"]) >= 1
            problem(refused, 429, "overloaded")
            model.gate.set()
            for client in (first, second):
                client.read_head()
                *items, summary = client.lines()
                assert [item["id"] for item in items] == [str(number) for number in range(1, 301)]
                assert summary["ok"] == 300
        assert_nothing_is_held(served)

    def test_interactive_callers_find_their_permits_free(self, narrow: tuple[Served, ScriptedModel]) -> None:
        """With all of the window in work, a call that fills the whole interactive queue is admitted."""
        served, model = narrow
        services = served.app.state.services
        model.gate.clear()
        with StreamClient(served) as client, ThreadPoolExecutor(1) as pool:
            client.send_bytes(b"".join(prompt_lines(1000)))
            client.end()
            until(lambda: services.bulk.n_in_work == WINDOW)
            call = pool.submit(
                httpx.post, f"{served.base_url}/route", json={"prompts": ["x"] * 8}, timeout=30
            )
            until(lambda: services.routing._queue.n_held == 8)
            model.gate.set()
            assert call.result().status_code == 200
            client.read_head()
            assert len(list(client.lines())) == 1001


class TestClientsThatLeaveOrStall:
    """Work for nobody is given up, and what was held comes back."""

    def test_left_in_the_middle_of_sending(self, narrow: tuple[Served, ScriptedModel]) -> None:
        """Permits come back and the rest is not routed."""
        served, _ = narrow
        with StreamClient(served) as client:
            client.read_head()
            client.send("a")
            assert next(client.lines())["status"] == "ok"
            client.send_bytes(b'"half a li')
        assert_nothing_is_held(served)
        assert route_lines(served, b'"b"\n')[-1]["ok"] == 1

    def test_left_while_the_model_works(self, narrow: tuple[Served, ScriptedModel]) -> None:
        """After the whole body: the prompts that wait are dropped before the model, and counted."""
        served, model = narrow
        dropped = metric(served, "persyn_route_dropped_prompts_total")
        model.gate.clear()
        with StreamClient(served) as client:
            client.send_bytes(b"".join(prompt_lines(40)), end=True)
            until(lambda: served.app.state.services.bulk.n_in_work == 40)
        assert_nothing_is_held(served)
        n_before = model.n_prompts
        model.gate.set()
        assert route_lines(served, b'"b"\n')[-1]["ok"] == 1
        # The batch that was on the thread, and b.
        n_begun = model.n_prompts - n_before - 1
        assert metric(served, "persyn_route_dropped_prompts_total") - dropped == 40 - n_begun

    def test_left_without_having_read(self, narrow: tuple[Served, ScriptedModel]) -> None:
        """A client that goes while the service waits for it to read gives everything back."""
        served, _ = narrow
        padding = "x" * 10_000
        read = metric(served, "persyn_route_stream_read_bytes_total")
        with StreamClient(served, n_receive_bytes=4096) as client:
            client.socket.setblocking(False)
            content = b'{"id": "%b"}\n' % padding.encode()
            chunk = b"%x\r\n%b\r\n" % (len(content), content)
            pending = b""
            # Until the service has stopped reading and the kernel takes no more.
            while True:
                pending = pending or chunk * 100
                try:
                    pending = pending[client.socket.send(pending) :]
                except BlockingIOError:
                    if metric(served, "persyn_route_stream_read_bytes_total") - read >= WINDOW * 10_000:
                        break
        assert_nothing_is_held(served)

    def test_nothing_comes(self, impatient: tuple[Served, ScriptedModel]) -> None:
        """A sender that stops is told so, after its answers."""
        served, _ = impatient
        with StreamClient(served) as client:
            client.send("a")
            client.send_bytes(b'"half')
            client.read_head()
            item, summary = client.lines()
            assert (item["status"], summary["ok"], summary["lines"]) == ("ok", 1, 1)
            assert summary["error"]["type"] == "urn:persyn:problem:stream-stalled"
            assert (summary["error"]["source"], summary["error"]["retryable"]) == ("client", True)
            assert f"{STALL_S:g} seconds" in summary["error"]["detail"]
        assert_nothing_is_held(served)

    def test_answers_are_not_taken(
        self, impatient: tuple[Served, ScriptedModel], caplog: pytest.LogCaptureFixture
    ) -> None:
        """Who sends without end and reads nothing is cut off, in the middle of sending: it does not hang."""
        served, _ = impatient

        def send_on(client: StreamClient) -> None:
            while True:
                client.send({"id": "x" * 10_000})

        with capture_logs() as entries, StreamClient(served, n_receive_bytes=4096) as client:
            with pytest.raises(ConnectionError):
                send_on(client)
            assert_nothing_is_held(served)
        # Of uvicorn, for which an answer without an end is an error.
        assert [record for record in caplog.records if record.levelname == "ERROR"] == []
        assert [entry["log_level"] for entry in entries if entry["event"] == "stream_not_taken"] == [
            "warning"
        ]
        assert not [entry for entry in entries if entry["log_level"] == "error"]


def test_a_stream_needs_a_key(checkpoint: Path, tmp_path: Path) -> None:
    """Without a valid key a stream is a 401 before its body is read; with one it is served."""
    settings = Settings(port=0, api_keys="key-a", cache_path=tmp_path / "c", threads=1)
    with serving(settings, project_of(checkpoint, "http://127.0.0.1:9")) as served:
        for headers in (NDJSON, {**NDJSON, "authorization": "Bearer key-b"}):
            refused = httpx.post(f"{served.base_url}/route", content=b'"x"\n', headers=headers)
            problem(refused, 401, "unauthorized")
        with StreamClient(served) as client:
            # No byte of a body has come.
            assert client.read_head().startswith("HTTP/1.1 401 ")
        headers = {**NDJSON, "authorization": "Bearer key-a", "x-request-id": "stream-7"}
        http_response = httpx.post(f"{served.base_url}/route", content=b'"x"\n', headers=headers)
        assert http_response.headers["x-request-id"] == "stream-7"
        assert json.loads(http_response.content.splitlines()[-1])["ok"] == 1


def test_shutdown_ends_a_stream_in_order(checkpoint: Path, tmp_path: Path) -> None:
    """What was read is answered, the summary says where to go on, and the service need not be killed."""
    with ExitStack() as stack:
        served, model = stack.enter_context(scripted_service(checkpoint, tmp_path, shutdown_grace_s=30))
        client = stack.enter_context(StreamClient(served))
        model.gate.clear()
        client.send("a", "b", "c")
        until(lambda: served.app.state.services.bulk.n_in_work == 3)
        stopping = served.app.state.services.stopping
        lines: list[dict[str, Any]] = []

        def read() -> None:
            until(stopping.is_set)
            client.send("d")
            model.gate.set()
            client.read_head()
            lines.extend(client.lines())
            client.close()

        reader = threading.Thread(target=read)
        reader.start()
        # The server is told to stop here, and the block below waits for it.
        stack.callback(reader.join)
        served.server.should_exit = True
        reader.join(30)
    assert [line.get("id") is not None for line in lines] == [True, True, True, False]
    summary = lines[-1]
    assert (summary["ok"], summary["lines"]) == (3, 3)
    assert summary["error"]["type"] == "urn:persyn:problem:not-ready"
    assert summary["error"]["retryable"] is True
