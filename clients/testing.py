"""Doubles for tests of code that calls teachers. They speak real HTTP on a loopback socket."""

import asyncio
import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from aiohttp import web


@dataclass(frozen=True, slots=True)
class Reply:
    """How a ``FakeTeacher`` answers one call.

    Args:
        content: Text of the answer; of each choice where ``n`` was asked for.
        status: HTTP status.
        raw: Sent in place of a chat completion.
        delay_s: Seconds before the answer.
    """

    content: str = "fine"
    status: int = 200
    finish_reason: str | None = "stop"
    raw: bytes | None = None
    content_type: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)
    delay_s: float = 0.0


Script = Callable[[Mapping[str, Any], int], Reply]
"""From the parsed request body and the number of the call (from 1) to the reply."""


def echo(body: Mapping[str, Any], _n_call: int) -> Reply:
    """Answer with the last user turn."""
    return Reply(content=f"You said: {body['messages'][-1]['content']}")


class FakeTeacher:
    """An OpenAI-compatible chat endpoint on 127.0.0.1 whose every reply is scripted.

    Runs in a thread of its own, so that blocking tests and other processes can call it::

        with FakeTeacher(lambda body, n_call: Reply(status=500)) as teacher:
            ...  # call teacher.base_url
    """

    def __init__(self, script: Script = echo, *, port: int = 0) -> None:
        self.script = script
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.n_aborted = 0
        self._port = port
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fake-teacher", daemon=True)
        self._runner: web.AppRunner | None = None

    @property
    def base_url(self) -> str:
        """For ``base_url`` of a teacher in ``persyn.yaml``."""
        return f"http://127.0.0.1:{self._port}/v1"

    def __enter__(self) -> Self:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result()
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _start(self) -> None:
        app = web.Application(client_max_size=64 * 1024 * 1024)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_get("/v1/models", self._models)
        # handler_cancellation: a caller that leaves cancels its handler, which counts the abort.
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self._port)
        await site.start()
        self._port = self._runner.addresses[0][1]

    async def _stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    async def _models(self, _request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "fake", "object": "model"}]})

    async def _chat(self, request: web.Request) -> web.Response:
        body = json.loads(await request.read())
        self.requests.append(body)
        self.headers.append(dict(request.headers))
        reply = self.script(body, len(self.requests))
        try:
            await asyncio.sleep(reply.delay_s)
        except asyncio.CancelledError:
            self.n_aborted += 1
            raise
        payload = reply.raw if reply.raw is not None else json.dumps(_chat_completion(body, reply)).encode()
        return web.Response(
            body=payload, status=reply.status, content_type=reply.content_type, headers=dict(reply.headers)
        )


def _chat_completion(body: Mapping[str, Any], reply: Reply) -> dict[str, Any]:
    n_choices = int(body.get("n") or 1)
    n_prompt = sum(len(str(message["content"]).split()) for message in body["messages"])
    n_completion = n_choices * len(reply.content.split())
    return {
        "id": "chatcmpl-fake",
        "object": "chat.completion",
        "created": 1_700_000_000,
        "model": f"{body['model']}-served",
        "system_fingerprint": "fake-1",
        "choices": [
            {
                "index": index,
                "message": {"role": "assistant", "content": reply.content},
                "finish_reason": reply.finish_reason,
            }
            for index in range(n_choices)
        ],
        "usage": {
            "prompt_tokens": n_prompt,
            "completion_tokens": n_completion,
            "total_tokens": n_prompt + n_completion,
        },
    }
