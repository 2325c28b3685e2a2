"""Metrics: names, labels, and one registry per application."""

from typing import Literal

import pytest
from prometheus_client.parser import text_string_to_metric_families

from clients.types import Answered, Completion, Prompt, Provenance, RoutingDecision, Usage
from service.metrics import Metrics


def _samples(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    text = metrics.exposition().decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def _value(metrics: Metrics, name: str, **labels: str) -> float:
    return _samples(metrics)[name, tuple(sorted(labels.items()))]


def _answered(cache: Literal["hit", "miss", "refresh"]) -> Answered:
    usage = Usage(10, 5, 15)
    prompt = Prompt("p", ({"role": "user", "content": "hi"},))
    completion = Completion(({"message": {"content": "x"}, "finish_reason": "stop"},), "m", usage, "now")
    provenance = Provenance(
        teacher="a",
        served_model="m",
        checkpoint_id="c",
        strategy="persyn",
        student="s",
        distribution={},
        propensity=1.0,
        sampling={},
        prompt_hash="h",
        attempts=1,
        fallback_from=None,
        cache=cache,
        usage=usage,
        cost_usd=0.25,
        latency_s=1.0,
        finish_reason="stop",
        created="now",
        persyn_version="0",
    )
    return Answered(prompt, completion, provenance)


def test_two_applications_do_not_share_numbers() -> None:
    """Each application counts for itself: there is no module state."""
    first, second = Metrics("1"), Metrics("2")
    first.cache_failed()
    assert _value(first, "persyn_cache_failures_total") == 1
    assert _value(second, "persyn_cache_failures_total") == 0
    assert _value(second, "persyn_build_info", version="2") == 1


def test_every_name_has_the_prefix() -> None:
    """All metrics start with persyn_, so that one rule in Prometheus finds them."""
    metrics = Metrics("1")
    metrics.request_started()
    metrics.request_finished("GET", "/route", 200, 0.1)
    assert all(name.startswith("persyn_") for name, _ in _samples(metrics))


def test_unknown_methods_and_paths_do_not_become_labels() -> None:
    """A caller cannot make new time series: odd methods are one label, unmatched paths another."""
    metrics = Metrics("1")
    for method in ("BREW", "SMASH"):
        metrics.request_started()
        metrics.request_finished(method, None, 404, 0.1)
    name = "persyn_http_requests_total"
    assert _value(metrics, name, method="other", route="unmatched", status="404") == 2
    assert _value(metrics, "persyn_http_requests_in_flight") == 0


def test_cached_answers_cost_nothing() -> None:
    """Tokens and dollars count what a teacher generated; a cache hit adds none."""
    metrics = Metrics("1")
    for answered in (_answered("miss"), _answered("hit"), _answered("refresh")):
        metrics.prompt_answered(answered)
    assert _value(metrics, "persyn_teacher_tokens_total", teacher="a", kind="prompt") == 20
    assert _value(metrics, "persyn_teacher_tokens_total", teacher="a", kind="completion") == 10
    assert _value(metrics, "persyn_cost_usd_total", teacher="a") == pytest.approx(0.5)


def test_dispatch_batches_and_routing_are_counted() -> None:
    """What the dispatcher, the batcher and the router report is found under the documented names."""
    metrics = Metrics("1")
    metrics.upstream_called("a", "TeacherTimeoutError", 2.0)
    metrics.cache_used("miss")
    metrics.batch_done(7, 900, 0.02)
    metrics.items_dropped(3)
    metrics.batch_failed()
    decision = RoutingDecision("p", "a", {}, {}, {}, {}, {}, 1.0, 0.0, False, 9, True)
    metrics.prompt_routed("s", "persyn", decision)
    assert _value(metrics, "persyn_teacher_calls_total", teacher="a", outcome="TeacherTimeoutError") == 1
    assert _value(metrics, "persyn_teacher_latency_seconds_sum", teacher="a") == 2.0
    assert _value(metrics, "persyn_response_cache_total", outcome="miss") == 1
    assert _value(metrics, "persyn_batch_prompts_sum") == 7
    assert _value(metrics, "persyn_batch_tokens_sum") == 900
    assert _value(metrics, "persyn_batch_failures_total") == 1
    assert _value(metrics, "persyn_route_dropped_prompts_total") == 3
    assert _value(metrics, "persyn_route_prompts_total", student="s", strategy="persyn", teacher="a") == 1
    assert _value(metrics, "persyn_route_truncated_prompts_total", student="s") == 1
