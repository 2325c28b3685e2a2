"""What the tests of the teacher client share: one call, and servers that speak no proper HTTP."""

import asyncio
import json
from contextlib import asynccontextmanager

from clients.teacher import TeacherClient, request_body
from clients.testing import FakeTeacher, Reply
from clients.types import TeacherSpec

USER = {"role": "user", "content": "hi"}
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"


def spec_of(base_url="http://127.0.0.1:9/v1", **fields):
    return TeacherSpec(**{"id": "a", "base_url": base_url, "model": "m", "timeout_s": 5.0, **fields})


async def ask(base_url, messages=(USER,), sampling=None, **fields):
    client = TeacherClient(spec_of(base_url, **fields))
    try:
        return await client.complete(request_body(client.spec, messages, sampling or {}))
    finally:
        await client.aclose()


async def ask_once(reply, **fields):
    """Ask a teacher that gives ``reply``."""
    with FakeTeacher(lambda _body, _n_call: reply) as teacher:
        return await ask(teacher.base_url, **fields)


def completion_reply(**changes):
    """A chat completion with some members of its body, or of its first choice, replaced."""
    choice = {"index": 0, "message": {"role": "assistant", "content": "fine"}, "finish_reason": "stop"}
    body = {"model": "m", "choices": [choice], "usage": {"prompt_tokens": 1, "completion_tokens": 2}}
    for name, value in changes.items():
        (choice if name in {"message", "finish_reason", "logprobs"} else body)[name] = value
    return Reply(raw=json.dumps(body).encode())


@asynccontextmanager
async def socket_server(answer):
    """A server that reads one request and lets ``answer(writer)`` do what no HTTP server would."""

    async def serve(reader, writer):
        try:
            await reader.readuntil(b"\r\n\r\n")
            await answer(writer)
        except ConnectionError:
            pass  # the client hung up first, as it should
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
