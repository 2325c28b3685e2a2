"""From a student's spec to a router that has done a real forward pass."""

import asyncio
import functools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import structlog
import torch

from clients.errors import ConfigurationError
from clients.types import StudentSpec
from router_model.backbone import Backbone
from router_model.checkpoint import Manifest, read_checkpoint
from router_model.engine_gate import Engine, choose_precision
from router_model.inference import Router
from router_model.joint_inference import Job, ScoredPrompt
from router_model.network import Precision
from router_model.tokenization import PromptEncoding
from service.backbone_work import BackboneWork, TextJob, n_tokens
from service.batching import Batcher, BatchObserver
from service.lanes import Lanes
from service.tokenizing import TokenizerPool

logger = structlog.get_logger(__name__)

_WARM_UP_TEXTS = ("Warm up.", "Warm up with a prompt of some more words, as they come. " * 12)


@dataclass(frozen=True, slots=True)
class ServingOptions:
    """How backbones are run in this process."""

    engine: Engine
    device: str
    batch_tokens: int
    threads: int | None
    n_tokenizer_threads: int


@dataclass(frozen=True, slots=True)
class BackboneKey:
    """What makes two backbones the same one in memory."""

    fingerprint: str
    frame: str
    max_tokens: int
    weights_sha256: str | None
    precision: Precision


class ServedBackbone:
    """A backbone with its tokenisers and its batches, shared by the students whose routers read it.

    It closes when no student has it any more and the last call that uses it is answered.
    """

    def __init__(
        self,
        backbone: Backbone,
        tokenizer: TokenizerPool[PromptEncoding],
        batcher: Batcher[Job | TextJob, ScoredPrompt],
        lanes: Lanes,
    ) -> None:
        self._lanes = lanes
        self.backbone = backbone
        self.tokenizer = tokenizer
        self.batcher = batcher
        self._n_users = 0
        self._retired = False

    @property
    def idle(self) -> bool:
        """Whether nothing is done and nothing waits."""
        return self.tokenizer.is_quiet and self.batcher.is_empty and self._lanes.n_free == self._lanes.n_lanes

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Keep it open while the block runs."""
        self._n_users += 1
        try:
            yield
        finally:
            self._n_users -= 1
            self._close_if_unused()

    def retire(self) -> None:
        """No new call will come."""
        self._retired = True
        self._close_if_unused()

    def close(self) -> None:
        """Take no new call; those admitted are answered."""
        self.batcher.close()
        self.tokenizer.close()

    def _close_if_unused(self) -> None:
        if self._retired and not self._n_users:
            self.close()


class RouterLoader:
    """Loads routers beside the ones that serve, on a thread of its own; the lanes go on.

    That thread computes on one core. GNU OpenMP counts the threads of all its pools: as soon as they are more
    than the cores, threads of every pool sleep after each operation and must be woken for the next, which
    makes short prompts several times slower.

    Args:
        teacher_ids: The teachers of the project.
        lanes: Where models run.
        group: Runs the batches of each backbone.
    """

    def __init__(
        self,
        teacher_ids: Sequence[str],
        options: ServingOptions,
        *,
        lanes: Lanes,
        group: asyncio.TaskGroup,
        observer: BatchObserver,
    ) -> None:
        self._teacher_ids = teacher_ids
        self._options = options
        self._lanes = lanes
        self._group = group
        self._observer = observer
        self._loading = ThreadPoolExecutor(
            1, thread_name_prefix="persyn-loader", initializer=use_cores, initargs=(1,)
        )

    def close(self) -> None:
        """Load nothing more."""
        self._loading.shutdown(wait=False, cancel_futures=True)

    async def load(
        self, spec: StudentSpec, loaded: dict[BackboneKey, ServedBackbone]
    ) -> tuple[Router, BackboneKey, ServedBackbone]:
        """Load a student's router and let it answer; a backbone that is there already is shared.

        Args:
            loaded: The backbones in memory. A new one is not put there.

        Raises:
            ConfigurationError: The router was trained with teachers that the project lacks.
            CheckpointError: The checkpoint cannot be used.
            BackboneError: The backbone cannot be loaded.
            RouterError: The router's answer is no number.
        """
        folder = Path(spec.checkpoint)
        loop = asyncio.get_running_loop()
        _, manifest = await loop.run_in_executor(self._loading, read_checkpoint, folder)
        self._require_known_teachers(spec, manifest)
        key = self._key(manifest)
        served = loaded.get(key)
        router = await loop.run_in_executor(
            self._loading,
            functools.partial(
                Router.load,
                folder,
                None if served is None else served.backbone,
                moved_to=spec.backbone,
                precision=key.precision,
                device=self._options.device,
            ),
        )
        if served is not None:
            await _warm_up(router, served)
            return router, key, served
        served = self._serve(router.backbone)
        try:
            await _warm_up(router, served)
        except BaseException:
            served.close()
            raise
        logger.info(
            "backbone_loaded",
            backbone=router.backbone.name,
            engine=key.precision,
            way=router.backbone.network.kind,
            device=self._options.device,
        )
        return router, key, served

    def _key(self, manifest: Manifest) -> BackboneKey:
        facts = manifest.backbone
        precision = choose_precision(self._options.engine, manifest.facts, self._options.device)
        return BackboneKey(facts.fingerprint, facts.frame, facts.max_tokens, facts.weights_sha256, precision)

    def _serve(self, backbone: Backbone) -> ServedBackbone:
        tokenizer = TokenizerPool(backbone.tokenizer, n_threads=self._options.n_tokenizer_threads)
        batcher: Batcher[Job | TextJob, ScoredPrompt] = Batcher(
            BackboneWork(backbone),
            cost=n_tokens,
            budget=self._options.batch_tokens,
            lanes=self._lanes,
            alone=not backbone.network.concurrent,
            observer=self._observer,
            coming=tokenizer.quiet,
        )
        self._group.create_task(batcher.run())
        return ServedBackbone(backbone, tokenizer, batcher, self._lanes)

    def _require_known_teachers(self, spec: StudentSpec, manifest: Manifest) -> None:
        missing = manifest.teachers_beyond(self._teacher_ids)
        if missing:
            raise ConfigurationError(
                f"the router of student {spec.id!r} ({spec.checkpoint}) was trained with teachers that the "
                f"project file does not define: {', '.join(missing)}; define them, or train without them"
            )
        trained = {teacher.id for teacher in manifest.teachers}
        unroutable = [teacher for teacher in self._teacher_ids if teacher not in trained]
        if unroutable:
            logger.warning("teachers_not_routable", student=spec.id, teachers=unroutable)


def open_lanes(options: ServingOptions) -> Lanes:
    """The threads on which models run: one for each core, or one alone beside a GPU."""
    n_cores = options.threads or torch.get_num_threads()
    n_lanes = n_cores if torch.device(options.device).type == "cpu" else 1
    return Lanes(n_cores, n_lanes, use_cores=use_cores)


def use_cores(n_cores: int) -> None:
    """Let torch use so many cores on this thread, whatever another thread sets later."""
    # A thread takes over the number set last, by whichever thread, the first time that it asks for it.
    torch.get_num_threads()
    torch.set_num_threads(n_cores)


async def _warm_up(router: Router, served: ServedBackbone) -> None:
    """A real forward pass, the way that requests go."""
    # One turn of the loop, so that a new batcher runs.
    await asyncio.sleep(0)
    with served.in_use():
        prompts = await served.tokenizer.encode(_WARM_UP_TEXTS)
        jobs = [Job(router, prompt) for prompt in prompts]
        # On all cores, then on the first lanes side by side.
        for some in (jobs[:1], jobs):
            for output in (await served.batcher.submit(some)).outputs:
                if isinstance(output, Exception):
                    raise output
