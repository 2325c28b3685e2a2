"""The scripted teacher that other tests rely on."""

import asyncio
import threading

import httpx
import pytest

from clients.testing import FakeTeacher, Reply, echo

BODY = {"model": "m", "messages": [{"role": "user", "content": "hi there"}]}


def _post(teacher, body=BODY, **options):
    return httpx.post(f"{teacher.base_url}/chat/completions", json=body, timeout=10.0, **options)


def test_speaks_the_openai_api():
    """By default it answers with the last user turn, as a whole chat completion."""
    with FakeTeacher() as teacher:
        body = _post(teacher).json()
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "You said: hi there"},
            "finish_reason": "stop",
        }
    ]
    assert (body["model"], body["object"]) == ("m-served", "chat.completion")
    assert body["usage"] == {"prompt_tokens": 2, "completion_tokens": 4, "total_tokens": 6}


def test_gives_n_choices():
    """``n`` choices are numbered and all counted."""
    with FakeTeacher() as teacher:
        body = _post(teacher, {**BODY, "n": 3}).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert body["usage"]["completion_tokens"] == 12


def test_records_what_it_is_sent():
    """Bodies and headers are kept in the order of the calls, and the script sees both."""
    seen = []

    def script(body, n_call):
        seen.append((body["messages"][0]["content"], n_call))
        return Reply()

    with FakeTeacher(script) as teacher:
        for text in ("a", "b"):
            _post(
                teacher, {**BODY, "messages": [{"role": "user", "content": text}]}, headers={"x-call": text}
            )
    assert seen == [("a", 1), ("b", 2)]
    assert [body["messages"][0]["content"] for body in teacher.requests] == ["a", "b"]
    assert [headers["x-call"] for headers in teacher.headers] == ["a", "b"]


def test_sends_any_reply():
    """Status, headers, type and bytes of a reply are sent as scripted."""
    reply = Reply(status=503, raw=b"<html>", content_type="text/html", headers={"Retry-After": "3"})
    with FakeTeacher(lambda _body, _n_call: reply) as teacher:
        response = _post(teacher)
    assert (response.status_code, response.content) == (503, b"<html>")
    assert response.headers["retry-after"] == "3"
    assert response.headers["content-type"].startswith("text/html")


def test_finish_reason_is_scripted():
    """A truncated answer says so."""
    with FakeTeacher(lambda _body, _n_call: Reply(finish_reason="length")) as teacher:
        assert _post(teacher).json()["choices"][0]["finish_reason"] == "length"


async def test_counts_callers_that_leave(until):
    """A caller that hangs up while it waits is counted, one that gets its answer is not."""
    with FakeTeacher(lambda _body, n_call: Reply(delay_s=30.0 if n_call == 1 else 0.0)) as teacher:
        async with httpx.AsyncClient(timeout=10.0) as http:
            task = asyncio.create_task(http.post(f"{teacher.base_url}/chat/completions", json=BODY))
            await until(lambda: len(teacher.requests) == 1)
            assert teacher.n_aborted == 0
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await until(lambda: teacher.n_aborted == 1)
            await http.post(f"{teacher.base_url}/chat/completions", json=BODY)
    assert teacher.n_aborted == 1


def test_script_can_change_while_it_runs():
    """A running teacher can be made to fail, as a teacher that goes down does."""
    with FakeTeacher(echo) as teacher:
        assert _post(teacher).status_code == 200
        teacher.script = lambda _body, _n_call: Reply(status=500)
        assert _post(teacher).status_code == 500


def test_stops_listening_and_ends_its_thread():
    """After the block nobody listens on its port and no thread is left; the port can be used again."""
    before = threading.active_count()
    with FakeTeacher() as teacher:
        port = int(teacher.base_url.split(":")[2].split("/")[0])
    with pytest.raises(httpx.ConnectError):
        _post(teacher)
    assert threading.active_count() == before
    with FakeTeacher(port=port) as again:
        assert again.base_url == teacher.base_url
        assert _post(again).status_code == 200


def test_lists_a_model():
    """The list of models answers, as a readiness check expects."""
    with FakeTeacher() as teacher:
        assert httpx.get(f"{teacher.base_url}/models").json()["data"][0]["id"] == "fake"
