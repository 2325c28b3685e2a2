"""What most people would write: FastAPI and transformers, one prompt per forward pass.

    python -m tests.bench.route.naive --classifier FOLDER --calls lock --port 8000

``lock``: a plain function, which FastAPI runs in its thread pool, with a lock around the model. ``inline``:
an async function that runs the model in the event loop.
"""

import argparse
import threading
from pathlib import Path
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer


class Question(BaseModel):
    """What is asked."""

    prompt: str


class Answer(BaseModel):
    """The label of the highest probability, and all of them."""

    teacher: str
    distribution: dict[str, float]


class Classifier:
    """A model of transformers with its tokenizer."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self._model: Any = AutoModelForSequenceClassification.from_pretrained(folder).eval()

    def answer(self, prompt: str) -> Answer:
        """Classify one prompt."""
        inputs = self._tokenizer(prompt, truncation=True, return_tensors="pt")
        with torch.inference_mode():
            shares = self._model(**inputs).logits[0].softmax(dim=0).tolist()
        labels: dict[int, str] = self._model.config.id2label
        distribution = {labels[index]: share for index, share in enumerate(shares)}
        return Answer(teacher=max(distribution, key=distribution.__getitem__), distribution=distribution)


def create_app(classifier: Classifier, *, inline: bool) -> FastAPI:
    """The application, in one of its two forms."""
    app = FastAPI()
    one_at_a_time = threading.Lock()

    async def route_inline(question: Question) -> Answer:
        return classifier.answer(question.prompt)

    def route_locked(question: Question) -> Answer:
        with one_at_a_time:
            return classifier.answer(question.prompt)

    async def livez() -> dict[str, str]:
        return {"status": "alive"}

    app.post("/route")(route_inline if inline else route_locked)
    app.get("/livez")(livez)
    return app


def main() -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--classifier", type=Path, required=True)
    parser.add_argument("--calls", choices=("lock", "inline"), required=True)
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args()
    app = create_app(Classifier(options.classifier), inline=options.calls == "inline")
    uvicorn.run(app, host="127.0.0.1", port=options.port, log_level="warning", access_log=False)


if __name__ == "__main__":
    main()
