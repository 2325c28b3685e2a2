"""What the handlers need: the services of this application, and a permit."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from clients.cache import ResponseCache
from clients.registry import Registry
from service.admission import Admission
from service.bulk_routing import BulkRouting
from service.errors import NotReadyError
from service.metrics import Metrics
from service.routing import RoutingService
from service.students import Students
from service.synthesis import SynthesisService


@dataclass(frozen=True, slots=True)
class StreamLimits:
    """What one NDJSON stream may do."""

    max_line_bytes: int
    max_chunk_lines: int
    """Lines that are routed together, if so many have come."""
    stall_s: float


@dataclass(frozen=True, slots=True)
class Services:
    """All that the lifespan opened."""

    registry: Registry
    cache: ResponseCache
    students: Students
    routing: RoutingService
    synthesis: SynthesisService
    calls: Admission
    """Permits for calls of ``/synthesize``."""
    bulk: BulkRouting
    streams: Admission
    """Permits for NDJSON streams of ``/route``."""
    stream_limits: StreamLimits
    stopping: asyncio.Event
    """Set when the server has been told to stop: who can wait for long must not."""


async def get_services(request: Request) -> Services:
    """The services of this application.

    Raises:
        NotReadyError: They are not open: the application is starting or has stopped.
    """
    services: Services | None = getattr(request.app.state, "services", None)
    if services is None:
        raise NotReadyError("the service is starting or shutting down")
    return services


OpenServices = Annotated[Services, Depends(get_services)]


async def get_metrics(request: Request) -> Metrics:
    """The metrics of this application; they exist from the first moment."""
    metrics: Metrics = request.app.state.metrics
    return metrics


AppMetrics = Annotated[Metrics, Depends(get_metrics)]


async def hold_call_permit(services: OpenServices) -> AsyncIterator[ExitStack]:
    """A permit for one call. It ends with the request, or when the handler closes it.

    Raises:
        OverloadedError: None is free.
    """
    with ExitStack() as permit:
        permit.enter_context(services.calls.permits())
        yield permit


CallPermit = Annotated[ExitStack, Depends(hold_call_permit)]


async def hold_stream_permit(services: OpenServices) -> AsyncIterator[ExitStack]:
    """A permit for one stream. It ends with the request.

    Raises:
        OverloadedError: None is free.
    """
    with ExitStack() as permit:
        permit.enter_context(services.streams.permits())
        yield permit


StreamPermit = Annotated[ExitStack, Depends(hold_stream_permit)]
