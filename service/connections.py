"""Connections of the server that an application can cut off."""

from starlette.types import Scope
from typing_extensions import override
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_EXTENSION = "persyn.abort"


class Connection(HttpToolsProtocol):
    """uvicorn's connection, which tells each request how to cut it off.

    uvicorn closes a connection only when the client has read everything. One that reads nothing, and waits
    in the middle of sending, would wait for ever.
    """

    @override
    def on_message_begin(self) -> None:
        """See ``HttpToolsProtocol.on_message_begin``."""
        super().on_message_begin()
        self.scope["extensions"] = {_EXTENSION: {"abort": self.transport.abort}}


def abort(scope: Scope) -> bool:
    """Cut off the connection of a request, whatever is not sent yet; false where the server cannot."""
    extension = scope.get("extensions", {}).get(_EXTENSION)
    if extension is not None:
        extension["abort"]()
    return extension is not None
