"""How good a response is: constraints that a machine checks, an exact answer, or a reward model."""

import importlib.util
import json
import logging
import math
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Self

from clients.types import Prompt
from router_model.constraints import Constraint, parse_constraints
from router_model.errors import QualityError

if TYPE_CHECKING:
    from router_model.reward_model import RewardModel

_logger = logging.getLogger(__name__)

_MAX_ANSWER_CHARS = 4000
_START_LIMIT_S = 120.0
"""SymPy loads in seconds; a busy machine may take far longer."""


class QualityScorer(Protocol):
    """Gives each (prompt, response) a quality, higher is better. The scale is the scorer's own."""

    def check(self, prompt: Prompt) -> None:
        """Refuse a prompt row that lacks what the scorer needs.

        Raises:
            QualityError: Names the prompt and what is wrong with it.
        """
        ...

    def score(self, items: Sequence[tuple[Prompt, str]]) -> list[float]:
        """Quality of each response, in input order.

        Raises:
            QualityError: As ``check``.
        """
        ...


class VerifiableScorer:
    """Share of the constraints in ``prompt.extra["constraints"]`` that a response meets, in [0, 1]."""

    def check(self, prompt: Prompt) -> None:
        """See ``QualityScorer``."""
        _constraints(prompt)

    def score(self, items: Sequence[tuple[Prompt, str]]) -> list[float]:
        """See ``QualityScorer``. An empty response scores 0, whatever the constraints."""
        return [_share_met(_constraints(prompt), response) for prompt, response in items]


def _constraints(prompt: Prompt) -> tuple[Constraint, ...]:
    if prompt.extra.get("constraints") is None:
        raise QualityError(
            f"prompt {prompt.id!r} has no `constraints`: the verifiable scorer needs a list of them"
        )
    return parse_constraints(prompt.extra["constraints"], prompt_id=prompt.id)


def _share_met(constraints: Sequence[Constraint], response: str) -> float:
    if not response.strip():
        return 0.0
    return sum(constraint.is_met(response) for constraint in constraints) / len(constraints)


class ExactAnswerScorer:
    """1 if a response states the answer in ``prompt.extra["answer"]``, numerically or symbolically; else 0.

    What counts as the stated answer, and as equal, is written at ``exact_answer.is_equivalent``. Comparison
    runs in a child process that starts with the first use and is ended when it takes too long, so ``score``
    works in any thread and always returns. ``close`` ends the child; so does garbage collection.

    Args:
        time_limit_s: Longest time for one response. One that takes longer scores 0, and a warning is logged.

    Raises:
        QualityError: math-verify is not installed.
    """

    def __init__(self, *, time_limit_s: float = 10.0) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise QualityError("the exact_answer scorer needs math-verify: pip install 'persyn[train]'")
        self._time_limit_s = time_limit_s
        self._lock = threading.Lock()
        self._judge: _Judge | None = None

    def check(self, prompt: Prompt) -> None:
        """See ``QualityScorer``."""
        _answer(prompt)

    def score(self, items: Sequence[tuple[Prompt, str]]) -> list[float]:
        """See ``QualityScorer``. An empty response scores 0."""
        with self._lock:
            return [self._score_one(prompt, response) for prompt, response in items]

    def close(self) -> None:
        """End the child process. A later ``score`` starts another."""
        with self._lock:
            self._drop_judge()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _score_one(self, prompt: Prompt, response: str) -> float:
        answer = _answer(prompt)
        if not response.strip():
            return 0.0
        if self._judge is None or not self._judge.is_alive:
            self._drop_judge()
            self._judge = _Judge()
        verdict = self._judge.ask({"response": response, "answer": answer}, limit_s=self._time_limit_s)
        if verdict is None:
            _logger.warning(
                "answer_not_compared", extra={"prompt_id": prompt.id, "time_limit_s": self._time_limit_s}
            )
        return float(verdict == "1")

    def _drop_judge(self) -> None:
        if self._judge is not None:
            self._judge.stop()
        self._judge = None


def _answer(prompt: Prompt) -> str:
    """The known answer as text; numbers without an exponent."""
    answer = prompt.extra.get("answer")
    if answer is None:
        raise QualityError(
            f"prompt {prompt.id!r} has no `answer`: the exact_answer scorer needs one in each row"
        )
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise QualityError(
            f"prompt {prompt.id!r}: `answer` must be a string or a number, got {type(answer).__name__}"
        )
    if isinstance(answer, float) and not math.isfinite(answer):
        raise QualityError(f"prompt {prompt.id!r}: `answer` must be finite, got {answer}")
    if isinstance(answer, int) and answer.bit_length() > 3 * _MAX_ANSWER_CHARS:
        raise QualityError(f"prompt {prompt.id!r}: `answer` has more than {_MAX_ANSWER_CHARS} characters")
    text = str(answer).strip()
    if not any(character.isalnum() or character in "∞π∅" for character in text):
        raise QualityError(f"prompt {prompt.id!r}: `answer` holds no number, formula or word")
    # A worked solution states its answer at the end.
    return text[-_MAX_ANSWER_CHARS:]


class _Judge:
    """The child process that runs ``exact_answer.py``."""

    def __init__(self) -> None:
        script = Path(__file__).with_name("exact_answer.py")
        # -P keeps this package's folder, with its table.py and model.py, off the child's import path.
        self._process = subprocess.Popen(  # noqa: S603  fixed arguments, no shell
            [sys.executable, "-P", str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="ascii",
        )
        self.stop = weakref.finalize(self, _end, self._process)
        if self._read_line(_START_LIMIT_S) != "ready":
            self.stop()
            raise QualityError("the process that compares answers did not start: is math-verify intact?")

    @property
    def is_alive(self) -> bool:
        """False once the child has ended: then make a new judge."""
        return self._process.poll() is None

    def ask(self, request: Mapping[str, str], *, limit_s: float) -> str | None:
        """The child's verdict, ``1`` or ``0``, or ``None`` if it died or had to be ended."""
        if self._process.stdin is None:
            return None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return None
        return self._read_line(limit_s)

    def _read_line(self, limit_s: float) -> str | None:
        if self._process.stdout is None:
            return None
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            self._process.kill()

        # Ending the child is what unblocks the read; this works on every platform and in every thread.
        alarm = threading.Timer(limit_s, expire)
        alarm.daemon = True
        alarm.start()
        line = self._process.stdout.readline().strip()
        alarm.cancel()
        alarm.join()
        if expired.is_set() or not line:
            # Also if the alarm went off just as the line came: the dying child must not be asked again.
            self._process.kill()
            self._process.wait()
        return line or None


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


class RewardModelScorer:
    """The logit of a sequence-classification reward model. A response is scored as it is, also an empty one.

    Args:
        model: Hub id or local folder of a model with one label, for example
            ``Skywork/Skywork-Reward-V2-Qwen3-0.6B``.
        token_budget: Most tokens, padding included, in one forward pass; a longer pair goes alone.
        max_tokens: Longer pairs are cut; see ``reward_model.RewardModel``.

    The model is loaded with the first ``score``: checking prompts, and a run whose scores are all there, do
    not wait for it.
    """

    def __init__(self, model: str, *, token_budget: int = 8192, max_tokens: int = 4096) -> None:
        self._name = model
        self._token_budget = token_budget
        self._max_tokens = max_tokens
        self._model: RewardModel | None = None

    def check(self, prompt: Prompt) -> None:
        """See ``QualityScorer``."""
        if not prompt.messages or any("role" not in message for message in prompt.messages):
            raise QualityError(f"prompt {prompt.id!r}: a reward model needs messages, each with a `role`")

    def score(self, items: Sequence[tuple[Prompt, str]]) -> list[float]:
        """See ``QualityScorer``.

        Raises:
            BackboneError: The model cannot be loaded, or is no reward model.
        """
        for prompt, _ in items:
            self.check(prompt)
        pairs = [(prompt.messages, response) for prompt, response in items]
        return self._loaded().rewards(pairs, token_budget=self._token_budget)

    def _loaded(self) -> "RewardModel":
        if self._model is None:
            # torch and transformers load here: the other scorers need neither.
            from router_model.reward_model import load_reward_model  # noqa: PLC0415

            self._model = load_reward_model(self._name, max_tokens=self._max_tokens)
        return self._model
