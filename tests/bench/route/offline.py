"""The engine alone: the router that the service runs, called directly, in a process of its own.

    python -m tests.bench.route.offline --checkpoint FOLDER --engine fp32

One JSON object per line on standard input asks for something, one on standard output answers; the process
keeps warm between them and ends with its input.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from threadpoolctl import threadpool_limits

from tests.bench.route.figures import Agreement
from tests.bench.route.processes import BenchError, running

_N_WARM_UP = 64


class OfflineEngine:
    """The asking side: a warm engine in a child process."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self._process = process
        self._log = log

    def load(self, texts: Sequence[str]) -> None:
        """The prompts of all that is measured; the engine is warm when this returns."""
        self._ask(do="load", texts=list(texts))

    def prompts_per_s(self) -> float:
        """All prompts in one call: batches within the token budget, heads included."""
        return float(self._ask(do="pass")["prompts_per_s"])

    def median_ms(self, n_prompts: int) -> float:
        """Median latency over the first prompts, one at a time."""
        return float(self._ask(do="latency", n_prompts=n_prompts)["median_ms"])

    def agreement(self, texts: Sequence[str]) -> Agreement:
        """How it decides on other prompts, beside float32."""
        return Agreement(**self._ask(do="compare", texts=list(texts)))

    def _ask(self, **question: Any) -> dict[str, Any]:
        if self._process.stdin is None or self._process.stdout is None:
            raise BenchError("the engine's process has no pipes")
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            lines = self._log.read_text(errors="replace").splitlines()
            raise BenchError("the engine ended: " + (lines[-1] if lines else f"nothing in {self._log}"))
        return cast("dict[str, Any]", json.loads(answer))


@contextmanager
def offline_engine(engine: str, checkpoint: Path, log: Path, texts: Sequence[str]) -> Iterator[OfflineEngine]:
    """Run an engine while the block runs.

    Raises:
        BenchError: This version has no such engine.
    """
    command = [sys.executable, "-m", __name__, "--checkpoint", str(checkpoint), "--engine", engine]
    with running(command, log, piped=True) as process:
        running_engine = OfflineEngine(process, log)
        running_engine.load(texts)
        yield running_engine


class _Answers:
    """The answering side. Torch and the router are imported here, so that the asking side stays light."""

    def __init__(self, checkpoint: Path, engine: str) -> None:
        from router_model.inference import Router

        self._router = Router.load(checkpoint, precision=cast("Any", engine))
        self._checkpoint = checkpoint
        self._texts: list[str] = []

    def load(self, texts: list[str]) -> dict[str, Any]:
        """Keep the prompts, and do some of them alone and together."""
        self._texts = texts
        for text in texts[:_N_WARM_UP]:
            self._router.score([text])
        self._router.score(texts)
        return {}

    def throughput(self) -> dict[str, Any]:
        """Prompts per second, all in one call."""
        start_s = time.perf_counter()
        self._router.score(self._texts)
        return {"prompts_per_s": len(self._texts) / (time.perf_counter() - start_s)}

    def latency(self, n_prompts: int) -> dict[str, Any]:
        """Median time of a call with one prompt."""
        times_ms = []
        for text in self._texts[:n_prompts]:
            start_s = time.perf_counter()
            self._router.score([text])
            times_ms.append(1e3 * (time.perf_counter() - start_s))
        return {"median_ms": statistics.median(times_ms)}

    def compare(self, texts: list[str]) -> dict[str, Any]:
        """The product's own measure of an engine, and its verdict, over these prompts."""
        from router_model.engine_gate import compare
        from router_model.inference import Router

        reference = Router.load(self._checkpoint)
        measured = compare(reference.score(texts), self._router.score(texts))
        return {**asdict(measured), "passes": measured.passes}


def main() -> None:
    """Answer until the input ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--engine", required=True)
    options = parser.parse_args()
    answers = _Answers(options.checkpoint, options.engine)
    acts = {
        "load": answers.load,
        "pass": answers.throughput,
        "latency": answers.latency,
        "compare": answers.compare,
    }
    # As the service does: heads are small products, which are slower on several cores.
    with threadpool_limits(limits=1, user_api="blas"):
        for line in sys.stdin:
            question = json.loads(line)
            act = cast("Any", acts[question.pop("do")])
            print(json.dumps(act(**question)), flush=True)


if __name__ == "__main__":
    main()
