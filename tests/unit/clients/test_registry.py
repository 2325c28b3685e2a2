"""The closed set of teachers."""

import gc
import warnings

import pytest

from clients.errors import UnknownTeacherError
from clients.registry import Registry
from clients.teacher import request_body
from clients.testing import FakeTeacher
from clients.types import Limits, TeacherSpec


def _spec(teacher_id, **fields):
    return TeacherSpec(**{"id": teacher_id, "base_url": "http://127.0.0.1:9/v1", "model": "m", **fields})


async def test_endpoints_keep_the_order_and_limits_of_the_project():
    """Ids come in project order and each endpoint has its own limits, breaker and client."""
    async with Registry([_spec("b"), _spec("a", limits=Limits(concurrency=3))]) as registry:
        assert registry.ids == ("b", "a")
        assert [endpoint.spec.id for endpoint in registry] == ["b", "a"]
        assert registry.get("a").limiter.limits.concurrency == 3
        assert registry.get("a").breaker is not registry.get("b").breaker
        assert registry.get("a").client.spec.id == "a"


async def test_unknown_teacher_is_named_with_what_is_known():
    """The error names the id, the known ids and the nearest one."""
    async with Registry([_spec("llama-70b"), _spec("gemma")]) as registry:
        with pytest.raises(
            UnknownTeacherError, match=r"'lama-70b'.*llama-70b, gemma.*did you mean 'llama-70b'"
        ):
            registry.get("lama-70b")
        with pytest.raises(UnknownTeacherError) as raised:
            registry.get("zzz")
        assert "did you mean" not in raised.value.message


async def test_closing_leaves_no_open_connection():
    """After the block no session or socket is left to the garbage collector."""
    with warnings.catch_warnings(record=True) as caught, FakeTeacher() as teacher:
        warnings.simplefilter("always")
        async with Registry([_spec(name, base_url=teacher.base_url) for name in "ab"]) as registry:
            for endpoint in registry:
                await endpoint.client.complete(
                    request_body(endpoint.spec, [{"role": "user", "content": "x"}], {})
                )
        del registry, endpoint
        gc.collect()
    assert [str(warning.message) for warning in caught] == []
