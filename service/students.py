"""Student id → its loaded router. Reloads are atomic: the old one serves until the new one has answered."""

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from datetime import UTC, datetime
from difflib import get_close_matches
from time import perf_counter

import structlog
from threadpoolctl import threadpool_limits

from clients.errors import ConfigurationError, PersynError
from clients.types import StudentSpec
from router_model.checkpoint import Manifest
from router_model.inference import Router
from router_model.joint_inference import Job, ScoredPrompt
from service.backbone_work import LONGEST_TEXT, TextJob
from service.batch_queue import Priority
from service.batching import BatchObserver
from service.errors import ReloadFailedError, UnknownStudentError
from service.lanes import Lanes
from service.loading import BackboneKey, RouterLoader, ServedBackbone, ServingOptions, open_lanes

logger = structlog.get_logger(__name__)

_FAILURES_BEFORE_DOUBT = 3
_HUNG_S = 120.0


@dataclass(frozen=True, slots=True)
class Scored:
    """What a router says of each prompt of a call, and where the time went."""

    prompts: list[ScoredPrompt | Exception]
    """An error stands in place of its own prompt."""
    tokenise_s: float
    queue_s: float
    inference_s: float


@dataclass(frozen=True, slots=True, eq=False)
class Student:
    """One student with its router, ready to score prompts. A reload makes a new one."""

    spec: StudentSpec
    router: Router
    served: ServedBackbone
    loaded: datetime

    @property
    def manifest(self) -> Manifest:
        """Of its checkpoint."""
        return self.router.manifest

    @property
    def teachers(self) -> tuple[str, ...]:
        """Ids of the teachers that its router can choose, in column order."""
        return tuple(teacher.id for teacher in self.manifest.teachers)

    async def is_ready(self) -> bool:
        """Whether prompts can be scored now. After failed batches only a new forward pass can tell."""
        batcher = self.served.batcher
        if not batcher.running or batcher.busy_s > _HUNG_S:
            return False
        if batcher.n_failures_in_row < _FAILURES_BEFORE_DOUBT:
            return True
        scored = await self.score(["Is the router well?"])
        return not isinstance(scored.prompts[0], Exception)

    async def score(
        self, texts: Sequence[str], *, priority: Priority = "interactive", deadline_s: float | None = None
    ) -> Scored:
        """Score prompts together with those of other callers.

        Args:
            deadline_s: Absolute event-loop time after which no prompt is begun.
        """
        with self.served.in_use():
            if len(texts) == 1 and len(texts[0]) <= LONGEST_TEXT and self.served.idle:
                return await self._score_alone(texts[0], priority, deadline_s)
            started_s = perf_counter()
            prompts = await self.served.tokenizer.encode(texts, priority=priority)
            tokenised_s = perf_counter()
            jobs = [Job(self.router, prompt) for prompt in prompts]
            batched = await self.served.batcher.submit(jobs, priority=priority, deadline_s=deadline_s)
        return Scored(batched.outputs, tokenised_s - started_s, batched.queue_s, batched.work_s)

    async def _score_alone(self, text: str, priority: Priority, deadline_s: float | None) -> Scored:
        job = TextJob(self.router, text)
        batched = await self.served.batcher.submit([job], priority=priority, deadline_s=deadline_s)
        return Scored(batched.outputs, job.tokenise_s, batched.queue_s, batched.work_s - job.tokenise_s)


@dataclass(frozen=True, slots=True)
class Reloaded:
    """One student after a reload."""

    student: str
    checkpoint_id: str
    previous_checkpoint_id: str


class Students:
    """The closed set of students of a process. The first is the default."""

    def __init__(self, loader: RouterLoader) -> None:
        self._loader = loader
        self._students: dict[str, Student] = {}
        self._keys: dict[str, BackboneKey] = {}
        self._reloading = asyncio.Lock()
        self.failures: dict[str, str] = {}
        """Why the last reload of a student failed, by its id; the router from before serves it."""

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
        return [student.spec.id for student in self if teacher_id in student.teachers]

    async def add(self, spec: StudentSpec) -> None:
        """Load a student and let it serve, in place of the one that has its id, if there is one.

        Raises:
            PersynError: As ``RouterLoader.load``. Whoever served before goes on serving.
        """
        router, key, served = await self._loader.load(spec, self._backbones())
        before = self._students.get(spec.id)
        # From here to the end nothing awaits: every call finds either the old router or the new one.
        self._students[spec.id] = Student(spec, router, served, datetime.now(UTC))
        self._keys[spec.id] = key
        self.failures.pop(spec.id, None)
        if before is not None and all(student.served is not before.served for student in self):
            before.served.retire()
        logger.info("student_loaded", student=spec.id, checkpoint_id=router.manifest.checkpoint_id)

    async def reload(self, student_id: str | None) -> list[Reloaded]:
        """Read the checkpoints anew, of one student or of all.

        Raises:
            UnknownStudentError: The id is not in the project file.
            ReloadFailedError: A checkpoint cannot be used. Its student keeps the router that it had; the
                others are reloaded.
        """
        wanted = list(self) if student_id is None else [self.get(student_id)]
        async with self._reloading:
            reloaded, failed = [], {}
            for student in wanted:
                previous = self.get(student.spec.id).manifest.checkpoint_id
                try:
                    await self.add(student.spec)
                except PersynError as error:
                    failed[student.spec.id] = self.failures[student.spec.id] = error.message
                    logger.warning("student_not_reloaded", student=student.spec.id, reason=error.message)
                    continue
                now = self.get(student.spec.id).manifest.checkpoint_id
                reloaded.append(Reloaded(student.spec.id, now, previous))
        if failed:
            raise ReloadFailedError(failed)
        return reloaded

    def close(self) -> None:
        """Take no new call; those admitted are answered."""
        for served in {id(student.served): student.served for student in self}.values():
            served.close()
        self._loader.close()

    def _backbones(self) -> dict[BackboneKey, ServedBackbone]:
        return {self._keys[student.spec.id]: student.served for student in self}


@asynccontextmanager
async def open_students(
    specs: Sequence[StudentSpec],
    teacher_ids: Sequence[str],
    options: ServingOptions,
    *,
    observer: BatchObserver,
) -> AsyncIterator[Students]:
    """Load every student, do a forward pass of each, and serve while the block runs.

    Args:
        teacher_ids: The teachers of the project.

    Raises:
        ConfigurationError: No student, or a router that was trained with teachers the project lacks.
        CheckpointError: A checkpoint cannot be used.
        BackboneError: A backbone cannot be loaded.
    """
    if not specs:
        raise ConfigurationError("the project file defines no student; serve needs at least one")
    # Heads are small products. Spread over cores, numpy's threads and torch's wait for each other: with two
    # cores that takes more time than the backbone.
    with threadpool_limits(limits=1, user_api="blas"), closing(open_lanes(options)) as lanes:
        async with _serving(specs, teacher_ids, options, lanes=lanes, observer=observer) as students:
            yield students


@asynccontextmanager
async def _serving(
    specs: Sequence[StudentSpec],
    teacher_ids: Sequence[str],
    options: ServingOptions,
    *,
    lanes: Lanes,
    observer: BatchObserver,
) -> AsyncIterator[Students]:
    """Students that are loaded, and the task group that runs their batches."""
    failure: PersynError | None = None
    async with asyncio.TaskGroup() as group:
        loader = RouterLoader(teacher_ids, options, lanes=lanes, group=group, observer=observer)
        students = Students(loader)
        try:
            for spec in specs:
                await students.add(spec)
        except PersynError as error:
            # Raised inside, the group would wrap it.
            failure = error
        try:
            if failure is None:
                yield students
        finally:
            students.close()
    if failure is not None:
        raise failure
