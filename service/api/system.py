"""Health, metrics and the state of the teachers."""

import asyncio
from dataclasses import asdict
from typing import Literal

import structlog
from fastapi import APIRouter, Response
from pydantic import BaseModel

from clients.cache import ResponseCache
from clients.errors import CacheError
from clients.registry import Endpoint
from clients.schemas import TeachersResponse, TeacherState
from service.api.dependencies import AppMetrics, OpenServices
from service.api.problems import documented
from service.errors import NotReadyError
from service.metrics import CONTENT_TYPE

logger = structlog.get_logger(__name__)

handlers = APIRouter(tags=["system"])

_CACHE_PATIENCE_S = 1.0


class Liveness(BaseModel):
    """Answer of ``GET /livez``."""

    status: Literal["alive"] = "alive"


class Readiness(BaseModel):
    """Answer of ``GET /readyz``. A failed cache makes answers dearer, not impossible."""

    status: Literal["ready"] = "ready"
    students: list[str]
    cache: Literal["ok", "failed"]


@handlers.get("/livez", summary="Whether the process runs")
async def livez() -> Liveness:
    """Answers as long as the event loop turns."""
    return Liveness()


@handlers.get("/readyz", responses=documented(503), summary="Whether prompts can be routed now")
async def readyz(services: OpenServices) -> Readiness:
    """True when every student has done a real forward pass and takes prompts."""
    waiting = [student.spec.id for student in services.students if not await student.is_ready()]
    if waiting:
        raise NotReadyError(f"students that do not take prompts now: {', '.join(waiting)}")
    return Readiness(
        students=[student.spec.id for student in services.students],
        cache=await _cache_state(services.cache),
    )


@handlers.get(
    "/metrics",
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **documented(401)},
    response_class=Response,
    summary="Prometheus metrics",
)
async def metrics(app_metrics: AppMetrics) -> Response:
    """All metrics in the Prometheus text format."""
    return Response(app_metrics.exposition(), headers={"content-type": CONTENT_TYPE})


@handlers.get("/teachers", responses=documented(401, 503), summary="Live state of the teachers")
async def teachers(services: OpenServices) -> TeachersResponse:
    """Limits, calls in flight, breaker and price of each teacher. No key and no URL is shown."""
    return TeachersResponse(
        teachers=[
            _teacher_state(endpoint, services.students.of_teacher(endpoint.spec.id))
            for endpoint in services.registry
        ]
    )


def _teacher_state(endpoint: Endpoint, students: list[str]) -> TeacherState:
    spec = endpoint.spec
    return TeacherState(
        id=spec.id,
        model=spec.model,
        family=spec.family,
        size_b=spec.size_b,
        price=None if spec.price is None else asdict(spec.price),
        limits=asdict(spec.limits),
        in_flight=endpoint.limiter.n_in_flight,
        breaker=endpoint.breaker.state,
        students=students,
    )


async def _cache_state(cache: ResponseCache) -> Literal["ok", "failed"]:
    try:
        async with asyncio.timeout(_CACHE_PATIENCE_S):
            await cache.ping()
    except (CacheError, TimeoutError) as error:
        logger.warning("cache_not_usable", reason=str(error) or "it does not answer in time")
        return "failed"
    return "ok"
