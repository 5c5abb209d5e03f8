"""Lossless sampling: the one list of parameters that are refused because drafted tokens would not follow them.

Every route reads it, and so do `rollout-service launch --help`, GET /docs and a test of the README. Each entry says
why, and what to use instead. A parameter's range is its type's (protocol.py), with and without a drafter.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Route = Literal["rollouts", "openai"]
"""rollouts: POST /v1/rollouts and /v1/prompts; openai: POST /v1/completions and /v1/chat/completions"""


@dataclass(frozen=True)
class Refusal:
    """Parameters that are refused for one reason. Those that rollouts name are no fields of a rollout: they are refused
    there with and without a drafter. OpenAI's routes refuse them while a drafter is on."""

    fields: tuple[str, ...]
    reason: str
    instead: str
    on_rollouts: bool = False
    on_gpu: bool = True
    """whether OpenAI's routes refuse it on a GPU too"""
    asks_nothing: tuple[Any, ...] = (None, {}, [], 0)
    """values that are as good as none"""

    def where(self) -> str:
        with_drafter = "with a drafter on" if self.on_gpu else "with a drafter on, on a CPU"
        return f"always on /v1/rollouts and /v1/prompts, elsewhere {with_drafter}" if self.on_rollouts else with_drafter


GRAMMAR = "a grammar strikes out drafts, which the CPU engine's sampler does not handle"

NOT_LOSSLESS = (
    Refusal(
        ("min_p", "logit_bias", "logits_processors"),
        "it is not applied to drafted tokens",
        "top_p and top_k, which are applied to them exactly",
        on_rollouts=True,
    ),
    Refusal(
        ("logprob_token_ids",),
        "steps that verify drafts do not report the log-probabilities of chosen tokens",
        "logprobs: N, which reports the N likeliest tokens",
    ),
    Refusal(
        ("structured_outputs", "response_format"),
        GRAMMAR,
        "constrain the format by the prompt and the reward",
        on_gpu=False,
        asks_nothing=(None, {}, {"type": "text"}),
    ),
    Refusal(("tool_choice",), GRAMMAR, "tool_choice auto or none", on_gpu=False, asks_nothing=(None, "none", "auto")),
)


def not_lossless(
    fields: Mapping[str, Any], route: Route, *, drafting: bool = True, on_cpu: bool = True
) -> Iterator[tuple[str, str]]:
    """(field, what is wrong and what to use instead) of a request's sampling parameters that are refused."""
    for entry in NOT_LOSSLESS:
        for name in entry.fields:
            if route == "rollouts":
                if entry.on_rollouts and name in fields:
                    yield name, f"is not offered, since {entry.reason}. Instead: {entry.instead}"
            elif drafting and (on_cpu or entry.on_gpu) and fields.get(name) not in entry.asks_nothing:
                instead = f"{entry.instead}; or serve without a drafter"
                yield name, f"cannot be used with a drafter on, since {entry.reason}. Instead: {instead}"


def described(route: Route = "openai") -> str:
    """The list as Markdown: what is refused on one kind of routes. OpenAI's refuse all of it."""
    lines = [
        f"- {', '.join(f'`{name}`' for name in entry.fields)} ({entry.where()}): {entry.reason}. "
        f"Instead: {entry.instead}."
        for entry in NOT_LOSSLESS
        if route != "rollouts" or entry.on_rollouts
    ]
    return "\n".join(["Refused in requests, since drafts cannot keep it lossless:", "", *lines])
