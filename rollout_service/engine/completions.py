"""Completions: vLLM's output, converted to the types of the interface."""

from typing import TYPE_CHECKING, cast

from rollout_service.protocol import Completion, RoutedExperts, Speculation, WeightSpan

if TYPE_CHECKING:
    import numpy as np
    from vllm.logprobs import FlatLogprobs
    from vllm.outputs import CompletionOutput


def draft_steps(output: "CompletionOutput") -> list[tuple[int, int]]:
    """(drafted, accepted) of each step; none without a drafter."""
    metrics = output.spec_decode_metrics
    return list(zip(metrics.per_step_drafted, metrics.per_step_accepted, strict=True)) if metrics else []


def speculation_of(
    output: "CompletionOutput", drafter: str, drafter_version: int, *, with_steps: bool
) -> Speculation | None:
    """The speculation record; None without a drafter. `with_steps`: whether to include each draft step."""
    if (metrics := output.spec_decode_metrics) is None:
        return None
    return Speculation(
        drafter=drafter,
        drafter_version=drafter_version,
        draft_steps=sum(metrics.histogram),
        drafted=metrics.num_draft_tokens,
        accepted=sum(j * steps for j, steps in enumerate(metrics.histogram)),
        accepted_histogram=metrics.histogram,
        steps=draft_steps(output) if with_steps else None,
    )


def weight_spans(output: "CompletionOutput") -> list[WeightSpan]:
    return [
        WeightSpan(version=int(span.version), start=span.start, end=span.end) for span in output.weight_versions or []
    ]


def completion_of(
    output: "CompletionOutput", drafter: str, drafter_version: int, *, with_steps: bool, with_experts: bool = False
) -> Completion:
    """`with_experts`: whether to include the routed experts, which an engine with `engine.routed_experts` returns."""
    return Completion(
        index=output.index,
        text=output.text,
        token_ids=list(output.token_ids),
        logprobs=cast("FlatLogprobs", output.logprobs).logprobs,  # one for each token: only the sampled one's
        weight_versions=weight_spans(output),
        finish_reason="length" if output.finish_reason == "length" else "stop",
        stop_reason=output.stop_reason,
        speculation=speculation_of(output, drafter, drafter_version, with_steps=with_steps),
        routed_experts=RoutedExperts.of(cast("np.ndarray", output.routed_experts)) if with_experts else None,
    )
