"""Fixtures of the integration tests: a trained router, a scripted endpoint, and a service that runs."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from clients.testing import FakeTeacher, echo
from service.settings import Settings
from tests.integration.serving import Served, project_of, serving, train_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, minilm_path: Path) -> Path:
    """A router trained on 48 prompts."""
    return train_checkpoint(tmp_path_factory.mktemp("router"), minilm_path)


@pytest.fixture(scope="session")
def shared_teacher() -> Iterator[FakeTeacher]:
    """One endpoint behind all teachers; each test sets its script through ``teacher``."""
    with FakeTeacher() as running:
        yield running


@pytest.fixture
def teacher(shared_teacher: FakeTeacher) -> FakeTeacher:
    """The endpoint with the default script and nothing recorded."""
    shared_teacher.script = echo
    shared_teacher.requests.clear()
    return shared_teacher


@pytest.fixture(scope="session")
def served(
    checkpoint: Path, shared_teacher: FakeTeacher, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """A service with SQLite cache and a body limit of 2 MiB."""
    cache_path = tmp_path_factory.mktemp("cache") / "responses.sqlite"
    settings = Settings(port=0, cache_path=cache_path, max_body_bytes=2 * 2**20, threads=2)
    with serving(settings, project_of(checkpoint, shared_teacher.base_url)) as running:
        yield running


@pytest.fixture
def http(served: Served) -> Iterator[httpx.Client]:
    """A plain HTTP client of the service."""
    with httpx.Client(base_url=served.base_url, timeout=60.0) as client:
        yield client
