"""Lossless sampling: the one list of parameters that are refused because drafted tokens would not follow them.

Every route checks requests against it. `rollout-service launch --help` and GET /docs print it, and a test compares
docs/losslessness.md with it. Each entry says why, and what to use instead. The range of a parameter is part of its type
(protocol/), and is the same with and without a drafter.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Route = Literal["rollouts", "openai"]
"""rollouts: POST /v1/rollouts and /v1/prompts; openai: vLLM's own routes, whose sampling parameters are fields of the
body, or of `sampling_params` in it"""


@dataclass(frozen=True)
class Refusal:
    """Parameters that are refused for one reason. OpenAI's routes refuse them while a drafter is on. With
    `on_rollouts`, /v1/rollouts and /v1/prompts refuse them too, with and without a drafter."""

    fields: tuple[str, ...]
    """names of the body's fields; `tools.*.function.strict` is that field of every tool"""
    reason: str
    instead: str
    on_rollouts: bool = False
    on_gpu: bool = True
    """whether OpenAI's routes refuse them on a GPU too"""
    asks_nothing: tuple[Any, ...] = (None, {}, [], 0)
    """values that are allowed, because they ask for nothing"""

    def where(self) -> str:
        with_drafter = "with a drafter on" if self.on_gpu else "on a CPU with a drafter on"
        return f"always on /v1/rollouts and /v1/prompts, elsewhere {with_drafter}" if self.on_rollouts else with_drafter


GRAMMAR = "a grammar rejects some drafted tokens, which the CPU engine's sampler cannot handle"
BY_GRAMMAR = f"vLLM enforces it by a grammar, and {GRAMMAR}"

NOT_LOSSLESS = (
    Refusal(
        ("min_p", "logit_bias", "logits_processors"),
        "vLLM does not apply such a parameter to drafted tokens",
        "use top_p and top_k, which are applied to drafted tokens exactly",
        on_rollouts=True,
    ),
    Refusal(
        ("logprob_token_ids",),
        "steps that verify drafts do not report the log-probabilities of chosen tokens",
        "use logprobs: N, which reports the N most likely tokens",
    ),
    Refusal(
        ("structured_outputs", "response_format"),
        GRAMMAR,
        "ask for the format in the prompt, and check it in the reward",
        on_gpu=False,
        asks_nothing=(None, {}, {"type": "text"}),
    ),
    Refusal(
        ("tool_choice",), GRAMMAR, "use tool_choice auto or none", on_gpu=False, asks_nothing=(None, "none", "auto")
    ),
    Refusal(("parallel_tool_calls",), BY_GRAMMAR, "use the first call alone", on_gpu=False, asks_nothing=(None, True)),
    Refusal(
        ("tools.*.function.strict",),
        BY_GRAMMAR,
        "check the arguments yourself",
        on_gpu=False,
        asks_nothing=(None, False),
    ),
)


def not_lossless(
    fields: Mapping[str, Any], route: Route, *, drafting: bool = True, on_cpu: bool = True
) -> Iterator[tuple[str, str]]:
    """Yields (field, what is wrong and what to use instead) for each parameter of a request that is refused."""
    for entry in NOT_LOSSLESS:
        for name in entry.fields:
            if route == "rollouts":
                if entry.on_rollouts and name in fields:
                    yield name, f"is not offered, because {entry.reason}; {entry.instead}"
            elif drafting and (on_cpu or entry.on_gpu):
                instead = f"{entry.instead}, or serve without a drafter"
                for found, value in _given(fields, name):
                    if value not in entry.asks_nothing:
                        yield found, f"cannot be used with a drafter on, because {entry.reason}; {instead}"


def _given(fields: Any, name: str, where: str = "") -> Iterator[tuple[str, Any]]:
    """Every field of this name, with its place in the body: `tools.3.function.strict` for `tools.*.function.strict`."""
    first, _, rest = name.partition(".")
    parts: list[tuple[Any, Any]] = []
    if first == "*" and isinstance(fields, list):
        parts = list(enumerate(fields))
    elif isinstance(fields, Mapping) and first in fields:
        parts = [(first, fields[first])]
    for part, value in parts:
        if rest:
            yield from _given(value, rest, f"{where}{part}.")
        else:
            yield f"{where}{part}", value


def described(route: Route = "openai") -> str:
    """The list as Markdown: what one kind of routes refuses. OpenAI's routes refuse all of it."""
    lines = [
        f"- {', '.join(f'`{name}`' for name in entry.fields)} ({entry.where()}): {entry.reason}; {entry.instead}."
        for entry in NOT_LOSSLESS
        if route != "rollouts" or entry.on_rollouts
    ]
    return "\n".join(["These fields are refused, because drafted tokens would not follow them:", "", *lines])
