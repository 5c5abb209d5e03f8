"""Draft-length lookup: vLLM's table of draft lengths by batch size, changed in a running engine.

For each step, vLLM's scheduler looks up the draft length by the number of running requests. It builds the table when it
starts (`num_speculative_tokens_per_batch_size`). Another table in its place takes effect from the next step on. The
scheduler lives in the engine's core process, which `collective_rpc` does not reach when the workers have processes of
their own. So this is a method of the core:
`await llm.engine_core.call_utility_async("set_draft_lengths", ranges)`.
"""

from types import SimpleNamespace
from typing import Any

from rollout_service.vllm_plugin.patch import Patch


def let_draft_lengths_change() -> None:
    """Give vLLM's engine core the method `set_draft_lengths`."""
    from vllm.v1.engine.core import EngineCore

    EngineCore.set_draft_lengths = set_draft_lengths  # type: ignore[attr-defined]


def set_draft_lengths(core: Any, ranges: list[Any]) -> None:
    """`ranges` are of drafters.schedule.Range, for an engine that was started with some schedule. Drafts that have been
    made already are verified as they are."""
    from vllm.v1.spec_decode.dynamic.utils import build_dynamic_sd_schedule_lookup

    scheduler = core.scheduler
    scheduler.dynamic_sd_lookup = build_dynamic_sd_schedule_lookup(
        [tuple(entry) for entry in ranges],
        vllm_max_batch_size=scheduler.scheduler_config.max_num_seqs,
        vllm_num_speculative_tokens=scheduler.num_spec_tokens,
    )


def draft_lengths_can_change() -> bool:
    """The core's method changes the table that its scheduler has."""
    from vllm.v1.engine.core import EngineCore

    scheduler = SimpleNamespace(
        dynamic_sd_lookup=[0, 3, 3], scheduler_config=SimpleNamespace(max_num_seqs=2), num_spec_tokens=3
    )
    core: Any = SimpleNamespace(scheduler=scheduler)
    EngineCore.set_draft_lengths(core, [[1, 1, 3], [2, 2, 0]])  # type: ignore[attr-defined]
    return scheduler.dynamic_sd_lookup == [0, 3, 0]


DRAFT_LENGTHS = Patch(
    "vllm.v1.engine.core.EngineCore.set_draft_lengths",
    "vLLM has no such method: its schedule of draft lengths by batch size is fixed once an engine has started",
    when="added when the plugin is loaded, on every device",
    unneeded="vLLM can change num_speculative_tokens_per_batch_size in a running engine",
    apply=let_draft_lengths_change,
    is_right=draft_lengths_can_change,
    shown_by="tests/integration/test_schedule.py"
    "::test_samples_follow_the_policy_while_the_schedule_changes_every_few_steps",
    relies_on={
        "vllm.v1.spec_decode.dynamic.utils.build_dynamic_sd_schedule_lookup": (
            "num_speculative_tokens_per_batch_size, vllm_max_batch_size, vllm_num_speculative_tokens"
        )
    },
    looked_up_in={"vllm.v1.core.sched.scheduler.Scheduler.schedule": "dynamic_sd_lookup"},
)
