"""GET /metrics: the front's own counters, and every engine's vLLM metrics under vLLM's own names.

vLLM labels its series with `engine`, which is always "0" inside an engine of the fleet. Here the label becomes the
engine's index, so `sum by (engine) (rate(vllm:spec_decode_num_accepted_tokens_total[1m]))` has a line for each engine.
"""

from collections.abc import Iterable
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from rollout_service.protocol import BatchesStatus, EngineState, FleetStatus, Group, WeightsOf, WeightStatus

KEPT = ("vllm:",)
"""prefixes of the engines' metrics that are shown; their process metrics (python_gc, ...) are left out"""


class Telemetry:
    """The front's counters. `exposition` adds the engines' metrics."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.groups = Counter("rollout_groups", "Finished groups", registry=self.registry)
        self.failed = Counter(
            "rollout_groups_failed", "Groups that failed and are not tried again", registry=self.registry
        )
        self.completions = Counter("rollout_completions", "Finished completions", registry=self.registry)
        self.tokens = Counter("rollout_tokens", "Tokens of finished completions", registry=self.registry)
        self.in_flight = Gauge(
            "rollout_groups_in_flight", "Groups of POST /v1/rollouts that are being generated", registry=self.registry
        )
        self.pushes = Counter("rollout_weight_pushes", "Published weight versions", ["of"], registry=self.registry)
        self.version = Gauge("rollout_weight_version", "Weight version in service", ["of"], registry=self.registry)
        self.pause = Histogram(
            "rollout_weight_pause_seconds", "Longest pause of an engine for a push", ["of"], registry=self.registry
        )
        self.paused = Gauge(
            "rollout_paused", "1 while a client has paused the service, so that nothing is generated",
            registry=self.registry,
        )  # fmt: skip
        self.queue = Gauge("rollout_queue_groups", "Groups in the batch queue", ["state"], registry=self.registry)
        self.oldest = Gauge("rollout_queue_oldest_seconds", "Age of the oldest finished group", registry=self.registry)
        self.wasted = Gauge(
            "rollout_tokens_wasted", "Tokens of groups that were dropped as stale or aborted", registry=self.registry
        )
        self.dropped = Gauge("rollout_groups_dropped", "Groups dropped as too stale", registry=self.registry)
        self.engines = Gauge("rollout_engines", "Engines", ["state"], registry=self.registry)
        self.idle = Gauge(
            "rollout_engine_idle_seconds", "Time in which an engine had no work", ["engine"], registry=self.registry
        )
        self.alarms = Counter("rollout_speculation_alarms", "Alarms raised", ["kind"], registry=self.registry)
        self.restarts = Gauge("rollout_engine_restarts", "Restarts of an engine", ["engine"], registry=self.registry)

    def finished(self, group: Group) -> None:
        self.groups.inc()
        self.completions.inc(len(group.completions))
        self.tokens.inc(sum(len(completion.token_ids) for completion in group.completions))

    def pushed(self, of: WeightsOf, status: WeightStatus) -> None:
        self.pushes.labels(of).inc()
        self.pause.labels(of).observe(status.pause)

    def fleet(self, status: FleetStatus) -> None:
        states = [engine.state for engine in status.engines]
        for state in get_args(EngineState):
            self.engines.labels(state).set(states.count(state))
        self.restarts.clear()  # of engines that were taken away
        for engine in status.engines:
            self.restarts.labels(str(engine.index)).set(engine.restarts)

    def batches(self, status: BatchesStatus) -> None:
        for state in ("waiting", "generating", "finished", "failed", "leased", "acknowledged"):
            self.queue.labels(state).set(getattr(status, state))
        self.oldest.set(status.oldest_seconds)
        self.wasted.set(status.tokens_wasted)
        self.dropped.set(status.dropped)

    def exposition(self, engines: dict[int, str]) -> bytes:
        """Prometheus text of the front's metrics and the engines'. `engines`: each engine's own text, by index."""
        return generate_latest(self.registry) + generate_latest(_Engines(engines))  # type: ignore[arg-type]


class _Engines:
    """A registry over the engines' texts. It joins families of the same name, because the format requires it."""

    def __init__(self, texts: dict[int, str]):
        self.texts = texts

    def collect(self) -> Iterable[Metric]:
        joined: dict[str, Metric] = {}
        for index, text in self.texts.items():
            for family in text_string_to_metric_families(text):
                if not family.name.startswith(KEPT):
                    continue
                metric = joined.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                for sample in family.samples:
                    labels = dict(sample.labels) | {"engine": str(index)}
                    metric.add_sample(sample.name, labels, sample.value, sample.timestamp, sample.exemplar)
        return joined.values()
