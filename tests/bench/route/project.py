"""What is served: a router trained on the spot, its project file, and a classifier of the same weights.

python -m tests.bench.route.project --out FOLDER
"""

import argparse
import json
import random
from pathlib import Path

import torch
import yaml
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from router_model.pipeline.train import TrainSettings, train_router
from tests.bench.route.prompts import LONGEST, minilm_folder
from tests.bench.route.tasks import TEACHERS, task_prompts

STUDENT = "tiny"
_N_TRAINING = 480
_GOOD, _OTHER, _SPREAD = 0.65, 0.4, 0.15
"""Quality of a teacher at its own kind and at others, and how much a single answer differs from it: with less
difference between teachers than within one, as in real tables, decisions are often close."""


class _Silent:
    """A Progress that shows nothing."""

    def start(self, stage: str, *, total: int, done: int = 0) -> None:
        """Nothing is shown."""

    def advance(self, n_items: int = 1, *, n_errors: int = 0, cost_usd: float = 0.0) -> None:
        """Nothing is shown."""

    def finish(self) -> None:
        """Nothing is shown."""

    def note(self, message: str) -> None:
        """Nothing is shown."""


def write_project(folder: Path) -> Path:
    """Train a router and write the ``persyn.yaml`` that serves it; returns that file.

    No teacher is asked by /route, so none has to run.
    """
    scores = folder / "scores.jsonl"
    scores.write_text("".join(json.dumps(row) + "\n" for row in _score_rows()))
    backbone = str(minilm_folder())
    settings = TrainSettings(
        student=STUDENT, student_family=None, backbone=backbone, head="ridge", max_tokens=LONGEST
    )
    train_router(scores, folder / "checkpoint", settings, progress=_Silent())
    project = {
        "version": 1,
        "students": [{"id": STUDENT, "model": backbone, "checkpoint": "checkpoint"}],
        "teachers": [
            {"id": teacher, "base_url": "http://127.0.0.1:9/v1", "model": teacher} for teacher in TEACHERS
        ],
        "calibration": {"prompts": "scores.jsonl"},
        "quality": {"kind": "verifiable"},
        "router": {"backbone": backbone, "head": "ridge", "max_tokens": LONGEST},
    }
    path = folder / "persyn.yaml"
    path.write_text(yaml.safe_dump(project, sort_keys=False))
    return path


def write_classifier(folder: Path) -> Path:
    """The same weights with a head of one label per teacher, as transformers saves it; returns its folder."""
    torch.manual_seed(0)
    labels = dict(enumerate(TEACHERS))
    source = minilm_folder()
    config = AutoConfig.from_pretrained(
        source, id2label=labels, label2id={name: index for index, name in labels.items()}
    )
    path = folder / "classifier"
    AutoModelForSequenceClassification.from_pretrained(source, config=config).save_pretrained(path)
    AutoTokenizer.from_pretrained(source).save_pretrained(path)
    return path


def _score_rows() -> list[dict[str, object]]:
    draw = random.Random(0)
    rows: list[dict[str, object]] = []
    for number, (kind, text) in enumerate(task_prompts(_N_TRAINING, seed=0)):
        for column, teacher in enumerate(TEACHERS):
            quality = draw.gauss(_GOOD if column == kind else _OTHER, _SPREAD)
            learnability = draw.gauss(-0.9 - 0.05 * column, 0.2)
            rows.append(
                {
                    "prompt_id": str(number),
                    "prompt": text,
                    "teacher": teacher,
                    "quality": quality,
                    "learnability": learnability,
                }
            )
    return rows


def main() -> None:
    """Write all of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    folder: Path = parser.parse_args().out
    write_project(folder)
    write_classifier(folder)


if __name__ == "__main__":
    main()
