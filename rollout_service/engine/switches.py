"""Switches of a running engine: how drafts are sampled and verified, as far as vLLM's model runner can switch them."""

from collections.abc import Mapping

from drafters.registry import DrafterConfig, make_drafter
from drafters.runners import Runner

SWITCHED: Mapping[Runner, Mapping[str, str]] = {
    "v1": {"draft_sampling": "probabilistic", "verification": "auto"},
    "v2": {"verification": "auto"},  # its CUDA graphs hold how drafts are sampled
}
"""by runner, what a running engine can switch, and what it starts with before it is switched"""


def started_as(drafter: DrafterConfig, runner: Runner) -> DrafterConfig:
    """The drafter that an engine starts with so that it can be switched to `drafter`. Drafters with the same result
    share an engine."""
    irrelevant = {} if make_drafter(drafter).samples else {"draft_sampling": "probabilistic"}
    return drafter.model_copy(update={**SWITCHED[runner], **irrelevant})


def check_switches(started: DrafterConfig, asked: DrafterConfig, runner: Runner) -> None:
    """Raises ValueError, with the field and both values, when an engine that was started as `started` cannot switch to
    `asked`."""
    if not asked.drafts or not make_drafter(asked).samples:  # deterministic drafts are sampled in one way only
        return
    before, after = started.draft_sampling, asked.draft_sampling
    if "draft_sampling" not in SWITCHED[runner] and before != after:
        raise ValueError(
            f'draft_sampling: an engine with vLLM\'s {runner.upper()} model runner that was started with "{before}" '
            f'cannot be switched to "{after}"; start one with "{after}"'
        )
