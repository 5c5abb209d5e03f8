"""What is refused because speculation cannot keep it lossless: which option, why, and what to use instead."""

from typing import Any

from drafters.drafter import LOSSY_OPTIONS
from rollout_service.protocol import Problem

CUTS = "top_p and top_k are applied to drafts exactly; or serve without a drafter"
GRAMMAR = "serve without a drafter, or constrain the format by the prompt and the reward"
NOT_REPORTED = "steps that verify drafts do not report the log-probabilities of chosen tokens"
LIKELIEST = "logprobs: N reports the N likeliest tokens; or serve without a drafter"
NOT_APPLIED = "it is not applied to drafted tokens"
INVALIDATES = "a grammar strikes out drafts, which the CPU engine's sampler does not handle"

REQUEST_FIELDS: dict[str, tuple[str, str]] = {
    "min_p": (NOT_APPLIED, CUTS),
    "logit_bias": (NOT_APPLIED, CUTS),
    "logits_processors": (NOT_APPLIED, CUTS),
    "logprob_token_ids": (NOT_REPORTED, LIKELIEST),
}
"""fields of a request: why they cannot be used with a drafter, and what can"""
GRAMMAR_FIELDS = (
    "structured_outputs", "response_format", "guided_json", "guided_regex", "guided_choice", "guided_grammar",
    "structural_tag",
)  # fmt: skip
FREE_TOOL_CHOICES = (None, "none", "auto")
"""other values make the tool call follow a grammar"""
PLAIN_VALUES: tuple[Any, ...] = (None, {}, [], 0, 0.0, {"type": "text"})
"""values that ask for nothing"""

ENGINE_ARGUMENTS = {
    "speculative_config": "speculation is configured under [drafter]",
    "logits_processors": "custom logits processors are not applied to drafted tokens; top_p and top_k are",
    "generation_config": "sampling defaults are the service's own, not a checkpoint's; give them in each request",
    "override_generation_config": "sampling defaults are the service's own; give them in each request",
    "logprobs_mode": "log-probabilities are always of the distribution that was sampled from",
    "per_request_spec_decode_metrics": "the service records every draft step",
    "worker_extension_cls": "the service's own extension loads weights and verifies drafts",
}
"""vLLM's engine arguments that are the service's to choose: what to use instead"""


def request_problems(body: dict[str, Any], *, on_cpu: bool) -> list[Problem]:
    """What of an OpenAI-style request cannot be used while a drafter is on."""
    refused = dict(REQUEST_FIELDS)
    if on_cpu:
        refused |= dict.fromkeys(GRAMMAR_FIELDS, (INVALIDATES, GRAMMAR))
    problems = [
        Problem(field=field, message=f"cannot be used with a drafter on, since {reason}. Instead: {instead}")
        for field, (reason, instead) in refused.items()
        if body.get(field) not in PLAIN_VALUES
    ]
    if on_cpu and body.get("tool_choice") not in FREE_TOOL_CHOICES:
        message = f"cannot be used with a drafter on, since {INVALIDATES}. Instead: tool_choice auto or none"
        problems.append(Problem(field="tool_choice", message=message))
    return problems


def check_engine_arguments(arguments: dict[str, Any]) -> None:
    """Raises ValueError for a vLLM argument that is the service's to choose."""
    for name, instead in ENGINE_ARGUMENTS.items():
        if name in arguments:
            given = arguments[name]
            lossy = sorted(LOSSY_OPTIONS & set(given)) if isinstance(given, dict) else []
            more = f"; {lossy[0]} changes what is sampled: drafter.verification is lossless" if lossy else ""
            raise ValueError(f"engine.vllm.{name}: {instead}{more}")
