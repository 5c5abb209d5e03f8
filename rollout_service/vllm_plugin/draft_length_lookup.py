"""The schedule of draft lengths by batch size, changed in a running engine.

vLLM's scheduler looks the draft length of each step up by the number of running requests in a table that it builds
when it starts (`num_speculative_tokens_per_batch_size`). Another table in its place counts from the next step on. The
scheduler lives in the engine's core process, which `collective_rpc` to the workers does not reach when they have
processes of their own, so this is a method of the core:
`await llm.engine_core.call_utility_async("set_draft_lengths", ranges)`.
"""

from typing import Any


def let_draft_lengths_change() -> None:
    """Give vLLM's engine core the method `set_draft_lengths`."""
    from vllm.v1.engine.core import EngineCore

    EngineCore.set_draft_lengths = set_draft_lengths  # type: ignore[attr-defined]


def set_draft_lengths(core: Any, ranges: list[Any]) -> None:
    """`ranges` as drafters.schedule.Range, for an engine that was started with some schedule. Drafts that are already
    made are verified as they are."""
    from vllm.v1.spec_decode.dynamic.utils import build_dynamic_sd_schedule_lookup

    scheduler = core.scheduler
    scheduler.dynamic_sd_lookup = build_dynamic_sd_schedule_lookup(
        [tuple(entry) for entry in ranges],
        vllm_max_batch_size=scheduler.scheduler_config.max_num_seqs,
        vllm_num_speculative_tokens=scheduler.num_spec_tokens,
    )
