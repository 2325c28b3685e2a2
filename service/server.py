"""``persyn serve``: one process that listens, serves, and drains on SIGTERM."""

import gc
import signal
import socket
from contextlib import suppress

from rich.markup import escape
from rich.table import Table
from typing_extensions import override

from clients.errors import ConfigurationError
from clients.types import Project
from service.app import Server, create_app, open_cache
from service.settings import PREFIX, Settings

_ALLOCATIONS_PER_COLLECTION = 20_000
"""Of objects that may be in circles; Python's own 700 are those of two calls."""


def serve_project(settings: Settings, project: Project) -> None:
    """Serve until SIGTERM or SIGINT; returns when the open calls are drained.

    Raises:
        ConfigurationError: The port is taken.
        PersynError: A checkpoint, a backbone or the cache cannot be opened.
        SystemExit: Code 1; the start failed for another reason, which the log tells.
    """
    listener = _listen(settings)
    app = create_app(settings, project)
    server = _OwnProcess(app, settings)
    # After the drain uvicorn raises the signal anew for whoever handled it before: both are a clean end.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with suppress(KeyboardInterrupt):
            server.run(sockets=[listener])
    except SystemExit as exit_:
        # uvicorn's own way out of a failed start, with a code that means something else here.
        raise (app.state.startup_error or SystemExit(1)) from exit_
    finally:
        signal.signal(signal.SIGTERM, before)


class _OwnProcess(Server):
    """A server to which the whole process belongs."""

    @override
    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """See ``uvicorn.Server.startup``. What is loaded by now is no more looked at for garbage."""
        await super().startup(sockets)
        gc.collect()
        gc.freeze()
        gc.set_threshold(_ALLOCATIONS_PER_COLLECTION)


async def ping_cache(settings: Settings) -> str:
    """Open the response cache that the service would use and ask it for a sign of life; says which it is.

    Raises:
        PersynError: It cannot be opened or does not answer.
    """
    cache = open_cache(settings)
    try:
        await cache.ping()
    finally:
        await cache.aclose()
    return str(settings.cache_path) if settings.redis_url is None else "Redis answers"


def settings_table() -> Table:
    """The ``PERSYN_*`` variables with their defaults, from the model that reads them."""
    table = Table("Environment variable", "Default", "Meaning", box=None)
    table.columns[0].no_wrap = True
    table.columns[1].overflow = "fold"
    for name, field in Settings.model_fields.items():
        default = field.get_default(call_default_factory=True, validated_data={})
        shown = f"{default:.10g}" if isinstance(default, float) else str(default)
        table.add_row(
            PREFIX + name.upper(),
            "unset" if default is None or default == () else escape(shown),
            escape(field.description or ""),
        )
    return table


def _listen(settings: Settings) -> socket.socket:
    """Bind before the models load: a busy port is found at once."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
    except OSError as error:
        listener.close()
        raise ConfigurationError(
            f"cannot listen on {settings.host} port {settings.port}: {error.strerror}; choose another --port"
        ) from error
    return listener
