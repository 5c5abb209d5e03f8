"""Page of metrics, docs/reference/metrics.md: what GET /metrics answers, by the names that Prometheus stores."""

from prometheus_client.metrics import MetricWrapperBase

from generate.markdown import compose, fill, table
from rollout_service.telemetry import KEPT, Telemetry

OF_VLLM = {
    "vllm:spec_decode_num_drafts_total": "draft steps",
    "vllm:spec_decode_num_draft_tokens_total": "draft tokens that were proposed",
    "vllm:spec_decode_num_accepted_tokens_total": "draft tokens that were accepted",
    "vllm:spec_decode_num_accepted_tokens_per_pos_total": "the same by `position`, counted from 0",
    "vllm:num_requests_running": "completions that run",
    "vllm:num_requests_waiting": "completions that wait for a place in a batch",
    "vllm:kv_cache_usage_perc": "share of the KV cache that is in use, from 0 to 1",
    "vllm:generation_tokens_total": "tokens that were generated",
}
"""those that one looks at first"""
ACCEPTANCE_LENGTH = """
1 + sum by (engine) (rate(vllm:spec_decode_num_accepted_tokens_total[5m]))
  / sum by (engine) (rate(vllm:spec_decode_num_drafts_total[5m]))
"""


def page() -> str:
    rows = []
    for metric in _metrics():
        (family,) = metric.describe()
        rows += [(f"`{name}`", family.type, _labels(metric), family.documentation) for name in _scraped(metric)]
    return compose(
        "Metrics of the service",
        "Every metric of `GET /metrics`, by the name that Prometheus stores, with its type and labels.",
        "[telemetry.py](../../rollout_service/telemetry.py)",
        "## The service's own",
        table(("metric", "type", "labels", "what it says"), rows),
        fill(
            "Each counter and histogram has one more series, whose name ends in `_created`. It holds the Unix time at "
            "which the series began. Counters start at 0 when the service starts. A series with labels appears once "
            "it has a value."
        ),
        "## vLLM's own",
        fill(
            f"Every metric of vLLM whose name starts with `{KEPT[0]}` comes through under its own name, for each "
            "engine in service. Its label `engine` is the engine's index in the fleet; vLLM's other labels stay. "
            "[vLLM's documentation](https://docs.vllm.ai/en/latest/usage/metrics.html) lists them. These are the "
            "ones to look at first:"
        ),
        table(("metric", "what it says"), [(f"`{name}`", said) for name, said in OF_VLLM.items()]),
        "The acceptance length of each engine, as a ratio of sums:",
        f"```promql\n{ACCEPTANCE_LENGTH.strip()}\n```",
    )


def scraped_names() -> set[str]:
    return {name for metric in _metrics() for name in _scraped(metric)}


def _metrics() -> list[MetricWrapperBase]:
    return [metric for metric in vars(Telemetry()).values() if isinstance(metric, MetricWrapperBase)]


def _labels(metric: MetricWrapperBase) -> str:
    return ", ".join(f"`{label}`" for label in metric._labelnames)


def _scraped(metric: MetricWrapperBase) -> list[str]:
    """The names of its samples, without those of their creation."""
    if metric._labelnames:
        metric.labels(*metric._labelnames)  # only a series with labels has samples
    names = [sample.name for family in metric.collect() for sample in family.samples]
    return [name for name in dict.fromkeys(names) if not name.endswith("_created")]
