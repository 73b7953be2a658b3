"""Prometheus metrics: what the HTTP process times itself, and the engine's counters as they are asked for."""

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from ..config import MAX_DRAFTS

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
# The names of Engine.stats, and the server's own, with their help.
_GAUGES = {
    "requests_in_flight": "requests that are prepared, wait or run",
    "server_tasks": "asyncio tasks of the HTTP process",
    "waiting_requests": "requests in the engine's queue",
    "running_sequences": "sequences on the device",
    "kv_pages": "KV pages in all",
    "pages_free": "KV pages that hold nothing",
    "pages_held": "KV pages of running sequences",
    "pages_evictable": "KV pages kept for later prompts",
    "state_slots": "state slots in all",
    "host_pages": "KV pages of the host tier",
    "host_pages_free": "KV pages of the host tier that hold nothing",
    "host_slots": "state slots of the host tier",
    "host_slots_free": "state slots of the host tier that hold nothing",
    "moves_under_way": "copies between the device and host memory that are not done",
    "slots_free": "state slots that hold nothing",
    "slots_promised": "state slots promised to snapshots that are not written yet",
    "slots_draining": "state slots still read by sequences whose snapshot is gone",
    "slots_working": "state slots of running sequences",
    "slots_snapshot": "state slots kept for later prompts",
    "transfer_rooms": "prompts that are lent to decoders, or prefilled for them",
    "transfer_pulls": "prompts that are on their way from prefillers",
}
_COUNTERS = {
    "prompt_tokens": "tokens of admitted prompts",
    "cached_tokens": "of them, resumed from a snapshot",
    "recomputed_matched_tokens": "computed although their keys and values were there, for want of a state",
    "preemptions": "sequences that gave way to older ones",
    "corrupted_requests": "requests that ended because their logits were not finite",
    "snapshots_evicted": "states that were let go",
    "snapshots_left_to_host": "of them, states that host memory still had",
    "pages_evicted": "KV pages that were let go",
    "moved_out": "states copied to host memory, with their pages",
    "moves_void": "copies to host memory whose state was let go meanwhile",
    "moved_in": "states brought back from host memory",
    "moved_in_tokens": "tokens that were not computed again because of that",
    "host_evicted": "states that host memory let go",
    "page_copies": "KV pages copied on write",
    "transfers_offered": "prompts that decoders have taken from here",
    "transfers_pulled": "prompts that were brought from prefillers",
    "transfers_failed": "prompts that were prefilled here because they could not be brought",
    "draft_steps": "times that a sequence's drafts were verified",
    "draft_step_tokens": "tokens that came of them: accepted drafts, and one more each time",
    "steps_without_drafts": "steps that made no drafts because these would have cost more than they bring",
}
_REASON = "reason_"
_DRAFTS = {"drafted": "drafts verified", "accepted": "drafts accepted"}  # by position: the first behind a token is 1


class Metrics:
    """One server's metrics. `observe` is told times in seconds."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def histogram(name: str, help: str) -> Histogram:
            return Histogram(f"tokenspeed_{name}", help, buckets=_SECONDS, registry=self.registry)

        def counter(name: str, help: str, *labels: str) -> Counter:
            return Counter(f"tokenspeed_{name}", help, labels, registry=self.registry)

        self.first_token = histogram("time_to_first_token_seconds", "from the request to its first token")
        self.inter_token = histogram("inter_token_latency_seconds", "between two tokens of a request")
        self.request = histogram("request_seconds", "from the request to its last token")
        self.requests = counter("requests", "requests by how they ended", "outcome")
        self.generated = counter("generation_tokens", "tokens generated")
        self.restored = counter("restored_turns", "turns of a history put back")
        self._stats: Mapping[str, float] = {}
        self.registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """What `render` was given, for the registry."""
        stats = self._stats
        for name, help in _GAUGES.items():
            yield GaugeMetricFamily(f"tokenspeed_{name}", help, value=stats.get(name, 0))
        for name, help in _COUNTERS.items():
            yield CounterMetricFamily(f"tokenspeed_{name}", help, value=stats.get(name, 0))
        rate = stats.get("cached_tokens", 0) / max(stats.get("prompt_tokens", 0), 1)
        yield GaugeMetricFamily("tokenspeed_prefix_hit_rate", "cached tokens / prompt tokens", value=rate)
        reuse = CounterMetricFamily(
            "tokenspeed_prefix_reuse", "admissions by why no more was reused", labels=["reason"]
        )
        for name, value in stats.items():
            if name.startswith(_REASON):
                reuse.add_metric([name.removeprefix(_REASON)], value)
        yield reuse
        for name, help in _DRAFTS.items():
            family = CounterMetricFamily(f"tokenspeed_{name}_tokens", f"{help}, by position", labels=["position"])
            for place in range(1, MAX_DRAFTS + 1):
                if f"{name}_{place}" in stats:
                    family.add_metric([str(place)], stats[f"{name}_{place}"])
            yield family

    def render(self, stats: Mapping[str, float]) -> bytes:
        """The exposition text. stats: the engine's and the server's numbers as of now."""
        self._stats = stats
        return generate_latest(self.registry)
