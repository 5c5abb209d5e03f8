"""Patches for sampling and verification: functions that sample from a wrong distribution, or end the engine."""

from dataclasses import replace
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch

from rollout_service.vllm_plugin.patch import defect
from rollout_service.vllm_plugin.verification import (
    NAME,
    rejection_sample_is_right,
    rejection_sampler,
    replace_rejection_sample,
)

# --- v1.sample.rejection_sampler.expand_batch_to_tokens ---


def expand_is_right() -> bool:
    """A request's temperature, top-k and top-p reach each of its draft positions, in float and in integer."""
    from vllm.platforms import current_platform

    current_platform.register_triton_kernel_overrides()
    cumulative = torch.tensor([2, 2, 5], dtype=torch.int32)
    temperature = rejection_sampler().expand_batch_to_tokens(
        torch.tensor([0.7, 0.3, 0.0]), cumulative, 5, replace_from=0, replace_to=1
    )
    top_k = rejection_sampler().expand_batch_to_tokens(torch.tensor([5, 6, 7], dtype=torch.int32), cumulative, 5)
    return bool(torch.equal(temperature, torch.tensor([0.7, 0.7, 1.0, 1.0, 1.0])) and top_k.tolist() == [5, 5, 7, 7, 7])


def expand_batch_to_tokens(
    x: torch.Tensor, cu_num_tokens: torch.Tensor, num_tokens: int, replace_from: int = 0, replace_to: int = 0
) -> torch.Tensor:
    """[batch] -> [num_tokens]: each request's value, repeated for each of its tokens; `replace_from` is replaced."""
    ends = cu_num_tokens.to(torch.int64)
    counts = torch.diff(ends, prepend=ends.new_zeros(1))
    values = torch.where(x == replace_from, torch.full_like(x, replace_to), x)
    return torch.repeat_interleave(values, counts, output_size=num_tokens)


def replace_expand() -> None:
    rejection_sampler().expand_batch_to_tokens = expand_batch_to_tokens


# --- v1.sample.rejection_sampler.apply_sampling_constraints ---


def no_drafts_is_right() -> bool:
    """A step in which no request has a draft (n-grams that match nothing) works with top-k set."""
    sampling = SimpleNamespace(
        all_greedy=False, temperature=torch.ones(1), top_k=torch.tensor([2], dtype=torch.int32), top_p=None
    )
    nothing = torch.zeros(0, 4)
    drafts = torch.zeros(1, dtype=torch.int32)
    return rejection_sampler().apply_sampling_constraints(nothing, drafts, sampling).shape == (0, 4)


def replace_sampling_constraints() -> None:
    stock = rejection_sampler().apply_sampling_constraints

    def apply_sampling_constraints(logits: torch.Tensor, cu_num_draft_tokens: torch.Tensor, sampling: Any) -> Any:
        return stock(logits, cu_num_draft_tokens, sampling) if logits.shape[0] else logits

    rejection_sampler().apply_sampling_constraints = apply_sampling_constraints


# --- v1.worker.gpu_model_runner.GPUModelRunner._bookkeeping_sync ---


class _GotPast(Exception):
    """Raised by what the function reads after the faulty part."""


def seeded_prefill_is_right() -> bool:
    """A seeded request works if its step ends within its prompt, so that what was sampled is discarded."""
    runner: Any = import_module("vllm.v1.worker.gpu_model_runner")

    class Ids:
        def copy(self) -> None:
            raise _GotPast

    batch = SimpleNamespace(num_reqs=1, generators={0: torch.Generator()}, req_ids=Ids())
    mask = SimpleNamespace(np=torch.ones(1, dtype=torch.bool).numpy())
    itself = SimpleNamespace(
        use_async_scheduling=False, input_batch=batch, discard_request_mask=mask, _get_nans_in_logits=lambda logits: {}
    )
    try:
        runner.GPUModelRunner._bookkeeping_sync(itself, None, None, None, None, 0)
    except _GotPast:
        return True
    return False


def replace_bookkeeping() -> None:
    runner: Any = import_module("vllm.v1.worker.gpu_model_runner")

    stock = runner.GPUModelRunner._bookkeeping_sync

    def _bookkeeping_sync(self: Any, *args: Any, **kwargs: Any) -> Any:
        # It uses the generators only to wind back those of discarded samples. On a CPU they continue instead.
        batch, generators = self.input_batch, self.input_batch.generators
        batch.generators = {}
        try:
            return stock(self, *args, **kwargs)
        finally:
            batch.generators = generators

    runner.GPUModelRunner._bookkeeping_sync = _bookkeeping_sync


SAMPLING = [
    defect(
        "vllm.v1.sample.rejection_sampler.expand_batch_to_tokens",
        "its CPU kernel writes to a copy unless the values are int64. Draft positions are then divided by "
        "uninitialised memory, and tokens follow a wrong distribution at every temperature except 0",
        expand_is_right,
        replace_expand,
    ),
    defect(
        "vllm.v1.sample.rejection_sampler.apply_sampling_constraints",
        "top-k takes the maximum of an empty tensor when no request of a step has a draft, which ends the engine",
        no_drafts_is_right,
        replace_sampling_constraints,
    ),
    replace(
        defect(
            NAME,
            "its CPU kernel passes on drafts that are not tokens (-1), which it should refuse",
            rejection_sample_is_right,
            replace_rejection_sample,
        ),
        when="on a CPU: when the plugin is loaded, if it fails its self-test, and always with "
        "`drafter.verification` standard or block",
        unneeded="it passes its self-test, and vLLM has block verification on a CPU",
    ),
    defect(
        "vllm.v1.worker.gpu_model_runner.GPUModelRunner._bookkeeping_sync",
        "it winds back the generator of a seeded request whose prefill takes several steps (as after a weight update); "
        "a CPU's generators cannot be wound back, so the engine ends",
        seeded_prefill_is_right,
        replace_bookkeeping,
    ),
]
