"""Prometheus metrics: every name, label set and bucket. One registry per application, no module state."""

from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from clients.types import Answered, RoutingDecision

CONTENT_TYPE = CONTENT_TYPE_LATEST

_METHODS = frozenset({"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"})
_HTTP_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_TEACHER_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0)
_BATCH_BUCKETS_S = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_BATCH_TOKENS = (16, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


class Metrics:
    """What the service counts. It is the ``DispatchObserver`` of the dispatcher and the ``BatchObserver``.

    Labels come from closed sets: route templates, methods, and the teachers, students and strategies that
    the project file and the contract define. Nothing of a request's content becomes a label.
    """

    def __init__(self, version: str) -> None:
        self._registry = registry = CollectorRegistry()
        self._http_requests = Counter(
            "persyn_http_requests_total",
            "HTTP requests answered.",
            ("method", "route", "status"),
            registry=registry,
        )
        self._http_duration = Histogram(
            "persyn_http_request_duration_seconds",
            "From the first byte of a request to the last of its answer.",
            ("method", "route"),
            buckets=_HTTP_BUCKETS_S,
            registry=registry,
        )
        self._http_in_flight = Gauge(
            "persyn_http_requests_in_flight", "HTTP requests being answered now.", registry=registry
        )
        self._route_prompts = Counter(
            "persyn_route_prompts_total",
            "Prompts routed, by chosen teacher.",
            ("student", "strategy", "teacher"),
            registry=registry,
        )
        self._truncated_prompts = Counter(
            "persyn_route_truncated_prompts_total",
            "Prompts of which the router read a part only.",
            ("student",),
            registry=registry,
        )
        self._streams = Gauge(
            "persyn_route_streams_open", "NDJSON streams being served now.", registry=registry
        )
        self._stream_lines = Counter(
            "persyn_route_stream_lines_total",
            "Lines of NDJSON streams answered: ok or error.",
            ("status",),
            registry=registry,
        )
        self._stream_bytes = Counter(
            "persyn_route_stream_read_bytes_total", "Bytes read of NDJSON streams.", registry=registry
        )
        self._teacher_calls = Counter(
            "persyn_teacher_calls_total",
            "Calls to teachers: ok, cancelled, or the kind of error.",
            ("teacher", "outcome"),
            registry=registry,
        )
        self._teacher_latency = Histogram(
            "persyn_teacher_latency_seconds",
            "Time of one call to a teacher.",
            ("teacher",),
            buckets=_TEACHER_BUCKETS_S,
            registry=registry,
        )
        self._teacher_tokens = Counter(
            "persyn_teacher_tokens_total",
            "Tokens that teachers read and wrote; cached answers add none.",
            ("teacher", "kind"),
            registry=registry,
        )
        self._cost = Counter(
            "persyn_cost_usd_total",
            "US dollars spent on teachers, by the prices of the project file.",
            ("teacher",),
            registry=registry,
        )
        self._cache = Counter(
            "persyn_response_cache_total", "Response cache look-ups.", ("outcome",), registry=registry
        )
        self._cache_failures = Counter(
            "persyn_cache_failures_total", "Times the cache could not be used.", registry=registry
        )
        self._batch_prompts = Histogram(
            "persyn_batch_prompts", "Prompts per forward pass.", buckets=_BATCH_SIZES, registry=registry
        )
        self._batch_tokens = Histogram(
            "persyn_batch_tokens", "Tokens per forward pass.", buckets=_BATCH_TOKENS, registry=registry
        )
        self._dropped_prompts = Counter(
            "persyn_route_dropped_prompts_total",
            "Prompts dropped before the forward pass: their caller left, or their deadline passed.",
            registry=registry,
        )
        self._batch_duration = Histogram(
            "persyn_batch_duration_seconds",
            "Time of one forward pass, waiting for its lane not included.",
            buckets=_BATCH_BUCKETS_S,
            registry=registry,
        )
        self._batch_failures = Counter(
            "persyn_batch_failures_total", "Forward passes that raised.", registry=registry
        )
        self._decision_cache = Counter(
            "persyn_decision_cache_total",
            "Prompts of /route looked up: hit, or miss, which the router had to read.",
            ("outcome",),
            registry=registry,
        )
        self._decision_cache_failures = Counter(
            "persyn_decision_cache_failures_total",
            "Times the shared decision cache could not be used, or held a damaged row.",
            registry=registry,
        )
        build = Gauge(
            "persyn_build_info", "Always 1; the version is the label.", ("version",), registry=registry
        )
        build.labels(version).set(1)

    def exposition(self) -> bytes:
        """All metrics in the Prometheus text format."""
        return generate_latest(self._registry)

    def request_started(self) -> None:
        """One HTTP request came in."""
        self._http_in_flight.inc()

    def request_finished(self, method: str, route: str | None, status: int, duration_s: float) -> None:
        """One HTTP request was answered; ``route`` is the template, ``None`` if no route took it."""
        method, template = method if method in _METHODS else "other", route or "unmatched"
        self._http_in_flight.dec()
        self._http_requests.labels(method, template, str(status)).inc()
        self._http_duration.labels(method, template).observe(duration_s)

    def prompt_routed(self, student: str, strategy: str, decision: RoutingDecision) -> None:
        """One prompt got its teacher."""
        self._route_prompts.labels(student, strategy, decision.teacher).inc()
        if decision.truncated:
            self._truncated_prompts.labels(student).inc()

    @contextmanager
    def stream_open(self) -> Iterator[None]:
        """One NDJSON stream is served while the block runs."""
        with self._streams.track_inprogress():
            yield

    def stream_read(self, n_bytes: int) -> None:
        """A piece of an NDJSON stream came in."""
        self._stream_bytes.inc(n_bytes)

    def lines_answered(self, n_routed: int, n_failed: int) -> None:
        """See ``service.bulk_routing.BulkObserver``."""
        self._stream_lines.labels("ok").inc(n_routed)
        self._stream_lines.labels("error").inc(n_failed)

    def prompt_answered(self, answered: Answered) -> None:
        """One prompt got its response; a cached one cost nothing."""
        provenance = answered.provenance
        if provenance.cache == "hit":
            return
        teacher, usage = provenance.teacher, provenance.usage
        self._teacher_tokens.labels(teacher, "prompt").inc(usage.prompt_tokens)
        self._teacher_tokens.labels(teacher, "completion").inc(usage.completion_tokens)
        self._cost.labels(teacher).inc(provenance.cost_usd)

    def upstream_called(self, teacher_id: str, outcome: str, latency_s: float) -> None:
        """See ``clients.dispatcher.DispatchObserver``."""
        self._teacher_calls.labels(teacher_id, outcome).inc()
        self._teacher_latency.labels(teacher_id).observe(latency_s)

    def cache_used(self, outcome: str) -> None:
        """See ``clients.dispatcher.DispatchObserver``."""
        self._cache.labels(outcome).inc()

    def cache_failed(self) -> None:
        """See ``clients.dispatcher.DispatchObserver``."""
        self._cache_failures.inc()

    def batch_done(self, n_items: int, n_tokens: int, duration_s: float) -> None:
        """See ``service.batching.BatchObserver``."""
        self._batch_prompts.observe(n_items)
        self._batch_tokens.observe(n_tokens)
        self._batch_duration.observe(duration_s)

    def batch_failed(self) -> None:
        """See ``service.batching.BatchObserver``."""
        self._batch_failures.inc()

    def items_dropped(self, n_items: int) -> None:
        """See ``service.batching.BatchObserver``."""
        self._dropped_prompts.inc(n_items)

    def decisions_looked_up(self, n_hits: int, n_misses: int) -> None:
        """See ``service.decision_cache.CacheObserver``."""
        self._decision_cache.labels("hit").inc(n_hits)
        self._decision_cache.labels("miss").inc(n_misses)

    def decision_cache_failed(self) -> None:
        """See ``service.decision_cache.CacheObserver``."""
        self._decision_cache_failures.inc()
