"""Draft length of a draft model on a GPU: as long as the schedule says, not always the longest.

vLLM's V2 runner asks its drafters for the draft length of the step. Its speculator of a draft model drafts the longest
all the same, and the runner cuts what is too long. So a step without drafts would cost as much as one with the longest.
Here it drafts what was asked. For no drafts it runs its first forward pass, as the other drafters do there, so that its
KV cache has no holes when drafts begin again.
"""

import functools
from types import SimpleNamespace
from typing import Any

import torch

from rollout_service.vllm_plugin.patch import Patch

NAME = "vllm.v1.worker.gpu.spec_decode.standalone_ar.speculator.StandaloneARSpeculator.propose"


def speculator() -> Any:
    from vllm.v1.worker.gpu.spec_decode.standalone_ar.speculator import StandaloneARSpeculator

    return StandaloneARSpeculator


def draft_as_long_as_asked() -> None:
    stock = speculator().propose

    @functools.wraps(stock)
    def propose(self: Any, input_batch: Any, *args: Any, num_speculative_tokens: int | None = None, **more: Any) -> Any:
        longest = self.num_speculative_steps
        if num_speculative_tokens is not None:
            self.num_speculative_steps = max(1, num_speculative_tokens)
        try:
            stock(self, input_batch, *args, num_speculative_tokens=num_speculative_tokens, **more)
        finally:
            self.num_speculative_steps = longest
        return self.draft_tokens[: input_batch.num_reqs]

    speculator().propose = propose


def drafts_as_long_as_asked() -> bool:
    """Asked for 0, 1, 2 and 3 drafts of at most 3, it makes none, none, 1 and 2 steps after its first forward pass."""
    made: list[int] = []
    itself = SimpleNamespace(
        model=True,
        num_speculative_steps=3,
        draft_tokens=torch.zeros(1, 3),
        temperature=None,
        seeds=None,
        _copy_request_inputs=lambda *_: made.append(0),
        _prefill=lambda *_: None,
    )

    def decode(*_: Any) -> None:
        made[-1] = itself.num_speculative_steps - 1

    itself._multi_step_decode = decode
    batch = SimpleNamespace(num_reqs=1, idx_mapping=None)
    for drafts in range(4):
        speculator().propose(itself, batch, *[None] * 10, num_speculative_tokens=drafts)
    return made == [0, 0, 1, 2]


DRAFT_MODEL_LENGTH = Patch(
    NAME,
    "it drafts the longest draft in every step, also in a step that drafts nothing",
    when="on a GPU when the plugin is loaded, if it fails its self-test",
    unneeded="it passes its self-test",
    apply=draft_as_long_as_asked,
    is_right=drafts_as_long_as_asked,
    relies_on={
        NAME: "self, input_batch, attn_metadata, slot_mappings, last_hidden_states, aux_hidden_states, num_sampled, "
        "num_rejected, last_sampled, next_prefill_tokens, temperature, seeds, dp_sync_state, dummy_run, "
        "skip_attn_for_dummy_run, mm_inputs, is_profile, num_speculative_tokens"
    },
    looked_up_in={
        "vllm.v1.worker.gpu.spec_decode.standalone_ar.speculator.StandaloneARSpeculator._multi_step_decode": (
            "num_speculative_steps"
        )
    },
)
