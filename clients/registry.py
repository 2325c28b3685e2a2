"""The closed set of teachers of a process: each with its connections, its limits and its health."""

import asyncio
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Self

from clients.breaker import Breaker
from clients.errors import UnknownTeacherError
from clients.limiter import Limiter
from clients.teacher import TeacherClient
from clients.types import TeacherSpec


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One teacher ready to be asked."""

    spec: TeacherSpec
    client: TeacherClient
    limiter: Limiter
    breaker: Breaker


class Registry:
    """Teachers by id. No URL, host or key ever comes from a request: an endpoint is named, not described.

    Needs a running event loop; ``async with`` closes the connections.
    """

    def __init__(self, specs: Iterable[TeacherSpec]) -> None:
        clock = asyncio.get_running_loop().time
        self._endpoints = {
            spec.id: Endpoint(spec, TeacherClient(spec), Limiter(spec.limits, clock=clock), Breaker(clock))
            for spec in specs
        }

    def __iter__(self) -> Iterator[Endpoint]:
        return iter(self._endpoints.values())

    @property
    def ids(self) -> tuple[str, ...]:
        """Ids of all teachers, in the order of the project file."""
        return tuple(self._endpoints)

    def get(self, teacher_id: str) -> Endpoint:
        """The endpoint of a teacher.

        Raises:
            UnknownTeacherError: The id is not in the project file.
        """
        try:
            return self._endpoints[teacher_id]
        except KeyError:
            near = get_close_matches(teacher_id, self._endpoints, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UnknownTeacherError(
                f"no teacher {teacher_id!r}; known: {', '.join(self._endpoints)}{hint}"
            ) from None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close all connections."""
        for endpoint in self:
            await endpoint.client.aclose()
