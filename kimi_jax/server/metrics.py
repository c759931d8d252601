"""Counts and times for Prometheus. Gauges ask the engine when they are read."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from kimi_jax.server.backend import Stats, Times
from kimi_jax.server.counts import Usage

TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
_TOKEN_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3)


class Metrics:
    """The metrics of one server, in a registry of their own.

    stats: returns the engine's counts, None while there is no engine.
    """

    def __init__(self, stats: Callable[[], Stats | None]):
        self.registry = registry = CollectorRegistry()
        self._stats = stats
        self.finished = Counter("kimi_jax_requests", "Answers by why they ended", ["finish"], registry=registry)
        self.responses = Counter("kimi_jax_responses", "HTTP responses", ["path", "status"], registry=registry)
        self.prompt = Counter("kimi_jax_prompt_tokens", "Tokens of prompts", registry=registry)
        self.cached = Counter("kimi_jax_cached_tokens", "Tokens of prompts found computed", registry=registry)
        self.generated = Counter("kimi_jax_generated_tokens", "Tokens of answers", registry=registry)
        self.first_token = Histogram(
            "kimi_jax_time_to_first_token_seconds",
            "From a request in the engine to its first token",
            buckets=_SECONDS,
            registry=registry,
        )
        self.per_token = Histogram(
            "kimi_jax_inter_token_latency_seconds",
            "Mean time between an answer's tokens",
            buckets=_TOKEN_SECONDS,
            registry=registry,
        )
        self.whole = Histogram(
            "kimi_jax_request_seconds",
            "From a request in the engine to its last token",
            buckets=_SECONDS,
            registry=registry,
        )
        for name, text, field in (
            ("requests_waiting", "Requests that wait for a slot", "waiting"),
            ("requests_running", "Requests that are computed", "running"),
            ("pages", "Pages of the cache", "pages"),
            ("pages_free", "Pages that no request uses", "free_pages"),
            ("drafts", "Drafts of one answer's next tokens that were verified since the start", "drafts"),
            ("drafted_tokens", "Tokens of drafts that were verified since the start", "drafted_tokens"),
            ("accepted_tokens", "Tokens of drafts that were right since the start", "accepted_tokens"),
            ("draft_acceptance_rate", "Share of drafted tokens that were right since the start", "acceptance_rate"),
            ("draft_accepted_length", "Mean number of right tokens in a draft since the start", "accepted_length"),
            ("compiled_programs", "Programs compiled since the start", "compiled_programs"),
        ):
            gauge = Gauge(f"kimi_jax_{name}", text, registry=registry)
            gauge.set_function(self._reads(field))

    def ended(self, finish: str, usage: Usage, times: Times) -> None:
        """Counts an answer that has ended."""
        self.finished.labels(finish).inc()
        self.prompt.inc(usage.prompt)
        self.cached.inc(usage.cached)
        self.generated.inc(usage.completion)
        self.whole.observe(times.finished - times.submitted)
        if times.first_token is not None:
            self.first_token.observe(times.first_token - times.submitted)
            if usage.completion > 1:
                self.per_token.observe((times.finished - times.first_token) / (usage.completion - 1))

    def text(self) -> bytes:
        """Returns all metrics in Prometheus's format."""
        return generate_latest(self.registry)

    def _reads(self, field: str) -> Callable[[], float]:
        return lambda: float(getattr(self._stats(), field, 0))
