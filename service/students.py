"""Student id → its loaded router: loaded and warmed at the start, on the thread that will use it."""

import asyncio
import functools
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import structlog

from clients.errors import ConfigurationError
from clients.types import StudentSpec
from router_model.backbone import Backbone
from router_model.checkpoint import Manifest, read_checkpoint
from router_model.inference import Router
from router_model.outlook import RouterOutput
from service.batching import Batcher, BatchObserver, running
from service.errors import UnknownStudentError

logger = structlog.get_logger(__name__)

BackboneKey = tuple[str, str, int, str | None]
"""Fingerprint, frame, token limit, fine-tuned weights: what makes two backbones the same."""

_CHARS_PER_TOKEN = 4
_WARM_UP_TEXT = "Warm up."


@dataclass(frozen=True, slots=True)
class ScoredPrompt:
    """One prompt's row in the output of the batch it was scored in."""

    output: RouterOutput
    row: int


@dataclass(frozen=True, slots=True, eq=False)
class Student:
    """One student with its router, ready to score prompts."""

    spec: StudentSpec
    manifest: Manifest
    backbone: Backbone
    batcher: Batcher[str, ScoredPrompt]

    @property
    def teachers(self) -> tuple[str, ...]:
        """Ids of the teachers that its router can choose, in column order."""
        return tuple(teacher.id for teacher in self.manifest.teachers)

    @property
    def ready(self) -> bool:
        """Whether prompts can be scored now. A student exists only after its warm-up pass."""
        return self.batcher.running

    async def score(self, texts: Sequence[str]) -> list[ScoredPrompt | Exception]:
        """Score prompts together with those of other callers; an error stands in place of its own prompt."""
        return await self.batcher.submit(texts)


class Students:
    """The closed set of students of a process. The first is the default."""

    def __init__(self, students: Iterable[Student]) -> None:
        self._students = {student.spec.id: student for student in students}

    def __iter__(self) -> Iterator[Student]:
        return iter(self._students.values())

    def get(self, student_id: str | None) -> Student:
        """The student of an id, the default one for ``None``.

        Raises:
            UnknownStudentError: The id is not in the project file.
        """
        if student_id is None:
            return next(iter(self._students.values()))
        try:
            return self._students[student_id]
        except KeyError:
            near = get_close_matches(student_id, self._students, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UnknownStudentError(
                f"no student {student_id!r}; known: {', '.join(self._students)}{hint}"
            ) from None

    def of_teacher(self, teacher_id: str) -> list[str]:
        """Ids of the students whose router can choose a teacher."""
        return [student.spec.id for student in self._students.values() if teacher_id in student.teachers]


@asynccontextmanager
async def open_students(
    specs: Sequence[StudentSpec],
    teacher_ids: Sequence[str],
    *,
    thread: Executor,
    batch_tokens: int,
    threads: int | None,
    observer: BatchObserver,
) -> AsyncIterator[Students]:
    """Load every student, do a forward pass of each, and serve while the block runs.

    Args:
        teacher_ids: The teachers of the project.
        thread: The model thread: one worker.
        threads: Torch threads, torch's own choice if ``None``.

    Raises:
        ConfigurationError: No student, or a router that was trained with teachers the project lacks.
        CheckpointError: A checkpoint cannot be used.
        BackboneError: A backbone cannot be loaded.
    """
    if not specs:
        raise ConfigurationError("the project file defines no student; serve needs at least one")
    loop = asyncio.get_running_loop()
    async with AsyncExitStack() as stack:
        students = []
        for router, spec in zip(
            await loop.run_in_executor(thread, _load_routers, specs, teacher_ids, threads), specs, strict=True
        ):
            work = functools.partial(_score, router)
            cost = functools.partial(_estimated_tokens, max_tokens=router.backbone.max_tokens)
            batcher: Batcher[str, ScoredPrompt] = Batcher(
                work, cost=cost, budget=batch_tokens, thread=thread, observer=observer
            )
            await stack.enter_async_context(running(batcher))
            students.append(Student(spec, router.manifest, router.backbone, batcher))
        yield Students(students)


def _load_routers(
    specs: Sequence[StudentSpec], teacher_ids: Sequence[str], threads: int | None
) -> list[Router]:
    """Load and warm the routers. Students with the same backbone share it in memory."""
    backbones: dict[BackboneKey, Backbone] = {}
    routers = []
    for spec in specs:
        router = _load_router(spec, backbones, threads)
        _require_known_teachers(spec, router.manifest, teacher_ids)
        router.score([_WARM_UP_TEXT])
        logger.info("student_loaded", student=spec.id, checkpoint_id=router.manifest.checkpoint_id)
        routers.append(router)
    return routers


def _load_router(spec: StudentSpec, backbones: dict[BackboneKey, Backbone], threads: int | None) -> Router:
    folder = Path(spec.checkpoint)
    _, manifest = read_checkpoint(folder)
    wanted = manifest.backbone
    key = (wanted.fingerprint, wanted.frame, wanted.max_tokens, wanted.weights_sha256)
    router = Router.load(folder, backbones.get(key), moved_to=spec.backbone, threads=threads)
    backbones[key] = router.backbone
    return router


def _require_known_teachers(spec: StudentSpec, manifest: Manifest, teacher_ids: Sequence[str]) -> None:
    trained = [teacher.id for teacher in manifest.teachers]
    missing = manifest.teachers_beyond(teacher_ids)
    if missing:
        raise ConfigurationError(
            f"the router of student {spec.id!r} ({spec.checkpoint}) was trained with teachers that the "
            f"project file does not define: {', '.join(missing)}; define them, or train without them"
        )
    unroutable = [teacher for teacher in teacher_ids if teacher not in trained]
    if unroutable:
        logger.warning("teachers_not_routable", student=spec.id, teachers=unroutable)


def _score(router: Router, texts: Sequence[str]) -> list[ScoredPrompt]:
    output = router.score(texts)
    return [ScoredPrompt(output, row) for row in range(len(texts))]


def _estimated_tokens(text: str, *, max_tokens: int) -> int:
    """What a prompt takes of a batch: the backbone reads ``max_tokens`` at most."""
    return min(max_tokens, len(text) // _CHARS_PER_TOKEN + 1)
