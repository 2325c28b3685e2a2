"""``POST /synthesize``: JSON when all is done, or NDJSON as each item completes."""

import asyncio
from contextlib import ExitStack
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Body, Response
from starlette.types import Receive, Scope, Send
from typing_extensions import override

from clients.dispatcher import Outcome
from clients.schemas import (
    AnsweredItem,
    FailedItem,
    ProvenanceBody,
    SynthesisSummary,
    SynthesizeRequest,
    SynthesizeResponse,
)
from clients.types import Answered
from service import ndjson
from service.api.dependencies import CallPermit, OpenServices
from service.api.examples import SYNTHESIZE_REQUESTS
from service.api.problems import documented, error_body
from service.synthesis import SynthesisPlan, SynthesisService

handlers = APIRouter(tags=["synthesis"])

_KEPT_OF_MESSAGE = ("reasoning_content", "tool_calls")


@handlers.post(
    "/synthesize",
    response_model=SynthesizeResponse,
    responses={
        200: {
            "description": "The items and their summary. With `stream`, one item per line, the summary last.",
            "content": {ndjson.MEDIA_TYPE: {"schema": {"type": "string"}}},
        },
        **documented(400, 401, 404, 413, 422, 429, 500, 503, 504),
    },
    summary="Route prompts and let their teachers answer",
)
async def synthesize(
    request: Annotated[SynthesizeRequest, Body(openapi_examples=SYNTHESIZE_REQUESTS)],
    services: OpenServices,
    permit: CallPermit,
) -> Response:
    """Every prompt gets an answer with its provenance, or an error of its own; one never fails another."""
    plan = await services.synthesis.plan(request)
    if request.stream:
        return ItemStream(services.synthesis, plan, permit)
    outcomes: dict[int, Outcome] = {}
    await services.synthesis.run(plan, outcomes.__setitem__)
    totals = Totals()
    items = []
    for index in range(plan.n_prompts):
        items.append(item_of(outcomes[index]))
        totals.add(outcomes[index])
    body = SynthesizeResponse(checkpoint_id=plan.checkpoint_id, items=items, summary=totals.summary)
    # Before the answer: who has it may call again at once.
    permit.close()
    return Response(body.model_dump_json(), media_type="application/json")


class ItemStream(Response):
    """Writes each item the moment it completes. A client that leaves ends the calls to teachers."""

    media_type = ndjson.MEDIA_TYPE

    def __init__(self, synthesis: SynthesisService, plan: SynthesisPlan, permit: ExitStack) -> None:
        super().__init__()
        # The length is not known, so the header that the empty body has set would be wrong.
        del self.headers["content-length"]
        self._synthesis = synthesis
        self._plan = plan
        self._permit = permit

    @override
    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the whole stream."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        outcomes: asyncio.Queue[Outcome] = asyncio.Queue()
        totals = Totals()
        async with asyncio.TaskGroup() as group:
            group.create_task(
                self._synthesis.run(self._plan, lambda _, outcome: outcomes.put_nowait(outcome))
            )
            for _ in range(self._plan.n_prompts):
                outcome = await outcomes.get()
                totals.add(outcome)
                await send(_line(item_of(outcome)))
        self._permit.close()
        await send(_line(totals.summary))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class Totals:
    """The summary of a call, kept up as its items complete."""

    def __init__(self) -> None:
        self.summary = SynthesisSummary()

    def add(self, outcome: Outcome) -> None:
        """Count one item."""
        summary = self.summary
        if not isinstance(outcome, Answered):
            summary.failed += 1
            return
        summary.ok += 1
        provenance = outcome.provenance
        if provenance.cache == "hit":
            summary.cached += 1
            return
        summary.usage.prompt_tokens += provenance.usage.prompt_tokens
        summary.usage.completion_tokens += provenance.usage.completion_tokens
        summary.usage.total_tokens += provenance.usage.total_tokens
        summary.cost_usd += provenance.cost_usd


def item_of(outcome: Outcome) -> AnsweredItem | FailedItem:
    """An outcome as the contract shows it."""
    if not isinstance(outcome, Answered):
        return FailedItem(
            id=outcome.prompt.id, teacher=outcome.teacher or None, error=error_body(outcome.error)
        )
    choices = [dict(choice) for choice in outcome.completion.choices]
    return AnsweredItem(
        id=outcome.prompt.id,
        teacher=outcome.provenance.teacher,
        messages=[*map(dict, outcome.prompt.messages), _assistant_message(choices[0]["message"])],
        choices=choices,
        provenance=ProvenanceBody.model_validate(asdict(outcome.provenance)),
    )


def _assistant_message(message: dict[str, Any]) -> dict[str, Any]:
    """The turn that goes on with the prompt: what a chat template reads, nothing vendor-specific."""
    kept = {name: message[name] for name in _KEPT_OF_MESSAGE if message.get(name)}
    return {"role": "assistant", "content": message["content"], **kept}


def _line(body: AnsweredItem | FailedItem | SynthesisSummary) -> dict[str, Any]:
    return {
        "type": "http.response.body",
        "body": body.model_dump_json().encode() + b"\n",
        "more_body": True,
    }
