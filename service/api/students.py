"""The students and their routers: what serves now, and reading checkpoints anew."""

from dataclasses import asdict
from typing import Annotated

from fastapi import APIRouter, Body

from clients.schemas import ReloadedStudent, ReloadRequest, ReloadResponse, StudentsResponse, StudentState
from service.api.dependencies import OpenServices
from service.api.problems import documented
from service.students import Student

handlers = APIRouter(tags=["students"])


@handlers.get("/students", responses=documented(401, 503), summary="Students and their routers")
async def students(services: OpenServices) -> StudentsResponse:
    """Which checkpoint serves each student, since when, and why a reload failed if one did."""
    known = services.students
    return StudentsResponse(
        students=[await _student_state(student, known.failures.get(student.spec.id)) for student in known]
    )


@handlers.post(
    "/admin/reload",
    responses=documented(400, 401, 404, 409, 413, 422, 500, 503),
    summary="Read checkpoints anew",
)
async def reload(
    services: OpenServices, request: Annotated[ReloadRequest | None, Body()] = None
) -> ReloadResponse:
    """Replace routers by what their checkpoint folders hold now.

    Each student's old router serves until the new one has done a forward pass, and goes on serving if it
    cannot: then the answer is 409 and says why. Calls in progress end with the router they began with.
    """
    reloaded = await services.students.reload(None if request is None else request.student)
    return ReloadResponse(reloaded=[ReloadedStudent(**asdict(item)) for item in reloaded])


async def _student_state(student: Student, failure: str | None) -> StudentState:
    manifest = student.manifest
    return StudentState(
        id=student.spec.id,
        family=student.spec.family,
        checkpoint_id=manifest.checkpoint_id,
        alpha=manifest.alpha,
        head=manifest.head,
        teachers=list(student.teachers),
        backbone=manifest.backbone.name,
        engine=student.router.backbone.precision,
        ready=await student.is_ready(),
        loaded=student.loaded.isoformat(timespec="seconds"),
        reload_failure=failure,
    )
