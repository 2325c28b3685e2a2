"""What the service answers, read into the types of the contract."""

from typing import Annotated, Any, TypeVar

from pydantic import Discriminator, Tag, TypeAdapter, ValidationError

from clients.errors import ServiceResponseError
from clients.schemas import (
    AnsweredItem,
    FailedItem,
    RoutedItem,
    RouteResponse,
    RouteSummary,
    SynthesisSummary,
    SynthesizeResponse,
    TeachersResponse,
    UnroutedItem,
)

RouteItem = RoutedItem | UnroutedItem
StreamedItem = AnsweredItem | FailedItem | SynthesisSummary
Answer = TypeVar("Answer")


def _line_kind(line: Any) -> str:
    """Tag of one line of a stream: the status of an item; a summary has none, but counts."""
    fields = line if isinstance(line, dict) else {}
    return str(fields.get("status", "summary" if "ok" in fields else "unknown"))


ROUTED: TypeAdapter[RouteResponse] = TypeAdapter(RouteResponse)
SYNTHESIZED: TypeAdapter[SynthesizeResponse] = TypeAdapter(SynthesizeResponse)
TEACHERS: TypeAdapter[TeachersResponse] = TypeAdapter(TeachersResponse)
SYNTHESIZED_LINE: TypeAdapter[StreamedItem] = TypeAdapter(
    Annotated[
        Annotated[AnsweredItem, Tag("ok")]
        | Annotated[FailedItem, Tag("error")]
        | Annotated[SynthesisSummary, Tag("summary")],
        Discriminator(_line_kind),
    ]
)
ROUTED_LINE: TypeAdapter[RouteItem | RouteSummary] = TypeAdapter(
    Annotated[
        Annotated[RoutedItem, Tag("ok")]
        | Annotated[UnroutedItem, Tag("error")]
        | Annotated[RouteSummary, Tag("summary")],
        Discriminator(_line_kind),
    ]
)


def parse(form: TypeAdapter[Answer], payload: bytes) -> Answer:
    """An answer, or one line of it.

    Raises:
        ServiceResponseError: It has another form. Its content is not quoted.
    """
    try:
        return form.validate_json(payload)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the body"
        raise ServiceResponseError(
            f"the service answered in a form that this client does not know: {where}: {first['msg']}",
            status=200,
            problem={},
            retryable=False,
        ) from None


class Lines:
    """NDJSON lines of a byte stream. ``iter_lines`` of httpx also splits at U+2028, which JSON may hold."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, chunk: bytes) -> list[bytes]:
        """The lines that ``chunk`` completes."""
        self._rest += chunk
        *whole, rest = self._rest.split(b"\n")
        self._rest = rest
        return [bytes(line) for line in whole if line.strip()]

    def end(self) -> list[bytes]:
        """The last line if no newline ended it."""
        return [bytes(self._rest)] if self._rest.strip() else []
