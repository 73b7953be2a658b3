"""Prometheus metrics: what the HTTP process times itself, and the engine's counters as they are asked for."""

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
# The engine's own names (Engine.stats) with their help.
_GAUGES = {
    "waiting_requests": "requests in the engine's queue",
    "running_sequences": "sequences on the device",
    "kv_pages": "KV pages in all",
    "pages_free": "KV pages that hold nothing",
    "pages_held": "KV pages of running sequences",
    "pages_evictable": "KV pages kept for later prompts",
    "state_slots": "state slots in all",
    "slots_free": "state slots that hold nothing",
    "slots_working": "state slots of running sequences",
    "slots_snapshot": "state slots kept for later prompts",
}
_COUNTERS = {
    "prompt_tokens": "tokens of admitted prompts",
    "cached_tokens": "of them, resumed from a snapshot",
    "recomputed_matched_tokens": "computed although their keys and values were there, for want of a state",
    "preemptions": "sequences that gave way to older ones",
    "snapshots_evicted": "states that were let go",
    "pages_evicted": "KV pages that were let go",
    "page_copies": "KV pages copied on write",
}
_REASON = "reason_"


class Metrics:
    """One server's metrics. `observe` is told times in seconds."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def histogram(name: str, help: str) -> Histogram:
            return Histogram(f"tokenspeed_{name}", help, buckets=_SECONDS, registry=self.registry)

        def labelled(name: str, help: str, label: str) -> Counter:
            return Counter(f"tokenspeed_{name}", help, [label], registry=self.registry)

        self.first_token = histogram("time_to_first_token_seconds", "from the request to its first token")
        self.inter_token = histogram("inter_token_latency_seconds", "between two tokens of a request")
        self.request = histogram("request_seconds", "from the request to its last token")
        self.requests = labelled("requests", "requests by how they ended", "outcome")
        self.generated = Counter("tokenspeed_generation_tokens", "tokens generated", registry=self.registry)
        self.restored = Counter("tokenspeed_restored_turns", "turns of a history put back", registry=self.registry)
        self._reasons = Gauge(
            "tokenspeed_prefix_reuse", "admissions by why no more was reused", ["reason"], registry=self.registry
        )
        self._gauges = {
            name: Gauge(f"tokenspeed_{name}", help, registry=self.registry) for name, help in _GAUGES.items()
        }
        self._totals = {
            name: Gauge(f"tokenspeed_{name}_total", help, registry=self.registry) for name, help in _COUNTERS.items()
        }
        self._hit_rate = Gauge("tokenspeed_prefix_hit_rate", "cached tokens / prompt tokens", registry=self.registry)

    def render(self, stats: Mapping[str, float]) -> bytes:
        """The exposition text, with the engine's counters as of now."""
        for name, gauge in (self._gauges | self._totals).items():
            gauge.set(stats.get(name, 0))
        for name, value in stats.items():
            if name.startswith(_REASON):
                self._reasons.labels(name.removeprefix(_REASON)).set(value)
        self._hit_rate.set(stats.get("cached_tokens", 0) / max(stats.get("prompt_tokens", 0), 1))
        return generate_latest(self.registry)
