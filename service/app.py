"""Composition root: the application of one project, and everything it opens and closes, in order."""

import asyncio
import importlib.metadata
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import structlog
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive, Scope, Send
from typing_extensions import override

from clients.cache import ResponseCache
from clients.dispatcher import Dispatcher
from clients.errors import ConfigurationError, PersynError
from clients.redis_cache import RedisCache, RedisRows
from clients.registry import Registry
from clients.sqlite_cache import SqliteCache
from clients.types import Project
from service.admission import Admission
from service.api import route, route_stream, students, synthesize, system
from service.api.dependencies import Services, StreamLimits
from service.api.docs import add_docs
from service.api.problems import MEDIA_TYPE, OptionsPlace, problem_response
from service.bulk_routing import BulkRouting
from service.connections import Connection
from service.decision_cache import DecisionCache, RowMemory, writing
from service.loading import ServingOptions
from service.log import configure_logging
from service.metrics import Metrics
from service.middleware import ObserveRequests, ReadBody, RequireApiKey
from service.routing import RoutingService
from service.settings import Settings
from service.students import open_students
from service.synthesis import SynthesisService

logger = structlog.get_logger(__name__)

_CHUNK_LINES = 256
"""Lines of a stream that are routed as one call, at most; a quarter of the window where that is less."""
_DESCRIPTION = "Routes each prompt to the teacher whose answer is good and learnable for your student."


class Application(FastAPI):
    """FastAPI that shows problems as such in the OpenAPI document and in a start that failed."""

    @override
    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ``FastAPI.__call__``. A failed start that we can name is told without traceback."""

        async def send_reason(message: Message) -> None:
            error = self.state.startup_error
            if message["type"] == "lifespan.startup.failed" and error is not None:
                message = {**message, "message": f"{type(error).__name__}: {error.message}"}
            await send(message)

        await super().__call__(scope, receive, send_reason if scope["type"] == "lifespan" else send)

    @override
    def openapi(self) -> dict[str, Any]:
        """See ``FastAPI.openapi``."""
        if self.openapi_schema is not None:
            return self.openapi_schema
        document = super().openapi()
        for operations in document["paths"].values():
            for operation in operations.values():
                for status, response in operation["responses"].items():
                    if int(status) >= 400:
                        response["content"] = {MEDIA_TYPE: response["content"]["application/json"]}
        if self.state.needs_key:
            schemes = document["components"].setdefault("securitySchemes", {})
            schemes["api_key"] = {"type": "http", "scheme": "bearer"}
            document["security"] = [{"api_key": []}]
        return document


def create_app(settings: Settings, project: Project) -> FastAPI:
    """The application of one project. Models load in its lifespan, before the first request is taken.

    A failed start leaves its ``PersynError`` in ``app.state.startup_error``.
    """
    configure_logging(settings.log_level, settings.log_format)
    version = importlib.metadata.version("persyn")
    metrics = Metrics(version)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            try:
                app.state.services = await _open(stack, settings, project, metrics)
            except PersynError as error:
                app.state.startup_error = error
                raise
            logger.info("service_ready", version=version)
            yield
            app.state.services = None
        logger.info("service_stopped")

    app = Application(
        title="PerSyn",
        version=version,
        description=_DESCRIPTION,
        lifespan=lifespan,
        redirect_slashes=False,
        docs_url=None,
        redoc_url=None,
    )
    app.state.metrics = metrics
    app.state.services = None
    app.state.startup_error = None
    # The stream of /route first: it takes NDJSON alone.
    for group in (route_stream, route, synthesize, students, system):
        app.include_router(group.handlers)
    add_docs(app)
    for kind in (PersynError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, _answer_problem)
    keys = [key.get_secret_value() for key in settings.api_keys]
    app.state.needs_key = bool(keys)
    # The last one added is the outermost.
    app.add_middleware(ReadBody, max_bytes=settings.max_body_bytes, is_stream=route_stream.is_stream)
    app.add_middleware(RequireApiKey, api_keys=keys)
    app.add_middleware(ObserveRequests, metrics=metrics)
    return app


def server_config(app: FastAPI, settings: Settings) -> uvicorn.Config:
    """How uvicorn serves the application: our logs, no banner, a bounded drain after SIGTERM."""
    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=Connection,
        log_config=None,
        access_log=False,
        server_header=False,
        ws="none",
        timeout_graceful_shutdown=settings.shutdown_grace_s,
    )


class Server(uvicorn.Server):
    """uvicorn that tells the application when the drain begins: a stream would go on until its end."""

    def __init__(self, app: FastAPI, settings: Settings) -> None:
        super().__init__(server_config(app, settings))
        self._app = app

    @override
    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """See ``uvicorn.Server.shutdown``."""
        services: Services | None = self._app.state.services
        if services is not None:
            services.stopping.set()
        await super().shutdown(sockets)


def open_cache(settings: Settings) -> ResponseCache:
    """The response cache that the settings ask for. Nothing is connected yet.

    Raises:
        ConfigurationError: The Redis URL cannot be parsed.
    """
    if settings.redis_url is None:
        return SqliteCache(settings.cache_path, ttl_s=settings.cache_ttl_s)
    try:
        return RedisCache(settings.redis_url.get_secret_value(), ttl_s=settings.cache_ttl_s)
    except ValueError as error:
        # The URL may hold a password, so it is not quoted.
        raise ConfigurationError(f"PERSYN_REDIS_URL cannot be parsed: {error}") from None


async def _open(stack: AsyncExitStack, settings: Settings, project: Project, metrics: Metrics) -> Services:
    """Open everything; ``stack`` closes it in reverse order, the batches in progress first."""
    clock = asyncio.get_running_loop().time
    registry = await stack.enter_async_context(Registry(project.teachers))
    cache = open_cache(settings)
    stack.push_async_callback(cache.aclose)
    students = await stack.enter_async_context(
        open_students(
            project.students,
            registry.ids,
            ServingOptions(
                engine=settings.engine,
                device=settings.device,
                batch_tokens=settings.batch_tokens,
                threads=settings.threads,
                n_tokenizer_threads=settings.tokenizer_threads,
            ),
            observer=metrics,
        )
    )
    queue = Admission(settings.max_queued_prompts, unit="queued prompts", clock=clock)
    prices = {spec.id: spec.price for spec in project.teachers if spec.price is not None}
    cached = await _open_decision_cache(stack, settings, metrics)
    routing = RoutingService(students, prices=prices, queue=queue, observer=metrics, cache=cached)
    dispatcher = Dispatcher(registry, cache=cache, observer=metrics)
    return Services(
        registry=registry,
        cache=cache,
        students=students,
        routing=routing,
        synthesis=SynthesisService(routing, dispatcher, observer=metrics),
        calls=Admission(settings.max_in_flight, unit="calls", clock=clock),
        bulk=BulkRouting(routing, window=settings.stream_window, observer=metrics),
        streams=Admission(settings.max_streams, unit="streams", clock=clock),
        stream_limits=StreamLimits(
            max_line_bytes=settings.max_line_bytes,
            max_chunk_lines=min(_CHUNK_LINES, max(1, settings.stream_window // 4)),
            stall_s=settings.stream_stall_s,
        ),
        stopping=asyncio.Event(),
    )


async def _open_decision_cache(
    stack: AsyncExitStack, settings: Settings, metrics: Metrics
) -> DecisionCache | None:
    """The cache of what routers say of prompts, in Redis too where the settings name one."""
    if not settings.decision_cache_mb:
        return None
    store = None
    if settings.redis_url is not None:
        store = RedisRows(settings.redis_url.get_secret_value(), ttl_s=settings.cache_ttl_s)
        stack.push_async_callback(store.aclose)
    cache = DecisionCache(
        RowMemory(round(settings.decision_cache_mb * 1e6)),
        store,
        observer=metrics,
        clock=asyncio.get_running_loop().time,
    )
    return await stack.enter_async_context(writing(cache))


async def _answer_problem(request: Request, error: Exception) -> Response:
    options_in: OptionsPlace = "query" if route_stream.is_stream(request.scope) else "body"
    return problem_response(error, request.state.request_id, options_in=options_in)
