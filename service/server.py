"""``persyn serve``: one process that listens, serves, and drains on SIGTERM."""

import socket

import uvicorn

from clients.errors import ConfigurationError
from clients.types import Project
from service.app import create_app, server_config
from service.settings import Settings


def serve_project(settings: Settings, project: Project) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        ConfigurationError: The port is taken.
        PersynError: A checkpoint, a backbone or the cache cannot be opened.
    """
    listener = _listen(settings)
    app = create_app(settings, project)
    try:
        uvicorn.Server(server_config(app, settings)).run(sockets=[listener])
    except SystemExit:
        # uvicorn's own way out of a failed start, with a code that means something else here.
        if app.state.startup_error is None:
            raise
        raise app.state.startup_error from None


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
