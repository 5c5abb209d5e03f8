"""Verification in vLLM: the project's own (drafters/verification.py) instead of vLLM's `rejection_sample`.

It is used on a CPU: if vLLM's own fails its self-test, and on request (`verification = "standard" | "block"`).
"""

from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch

from drafters.verification import Drafts, Verification, target_distribution, uniforms, verify

NAME = "vllm.v1.sample.rejection_sampler.rejection_sample"


def rejection_sampler() -> Any:
    return import_module("vllm.v1.sample.rejection_sampler")


def make_rejection_sample(verification: Verification) -> Any:
    """A function with the arguments and the result of vLLM's `rejection_sample`: int32 (R, K + 1), -1 past the end. It
    ignores the arguments of synthetic acceptance, which is not lossless and never served."""

    def rejection_sample(
        draft_token_ids: torch.Tensor,
        num_draft_tokens: list[int],
        max_spec_len: int,
        cu_num_draft_tokens: torch.Tensor,
        draft_probs: torch.Tensor | None,
        target_logits: torch.Tensor,
        bonus_token_ids: torch.Tensor,
        sampling_metadata: Any,
        **_: Any,
    ) -> torch.Tensor:
        device = target_logits.device
        lengths_R = torch.tensor(num_draft_tokens, device=device)
        greedy_N = None
        if not sampling_metadata.all_random:
            greedy_R = torch.ones_like(lengths_R, dtype=torch.bool)
            if not sampling_metadata.all_greedy:
                greedy_R = sampling_metadata.temperature == 0
            greedy_N = greedy_R.repeat_interleave(lengths_R)
        # A request without drafts takes its bonus token: nothing is drawn from its generator.
        generators = {row: g for row, g in sampling_metadata.generators.items() if num_draft_tokens[row]}
        tokens_RK1 = verify(
            target_distribution(target_logits, greedy_N),
            Drafts(draft_token_ids.long(), lengths_R, draft_probs),
            bonus_token_ids.flatten().long(),
            uniforms(len(num_draft_tokens), generators, device),
            verification,
        )
        missing = max_spec_len + 1 - tokens_RK1.shape[1]
        return torch.nn.functional.pad(tokens_RK1, (0, missing), value=-1).int()

    rejection_sample.verification = verification  # type: ignore[attr-defined]
    return rejection_sample


def own_kind() -> Verification | None:
    """The kind of the project's own verification that is in place; None if vLLM's own is."""
    return getattr(rejection_sampler().rejection_sample, "verification", None)


def rejection_sample_is_right() -> bool:
    """Drafts that are certain under the target are accepted, impossible ones are replaced, and a draft that is not a
    token (-1) is never passed on."""
    certain = torch.full((4, 3), -torch.inf)
    certain[torch.arange(4), torch.tensor([1, 2, 1, 0])] = 0.0
    drafted = torch.tensor([1, 2, -1, 2], dtype=torch.int32)
    probs = torch.zeros(4, 3)
    probs[torch.arange(4), torch.tensor([1, 2, 0, 2])] = 1.0
    sampling = SimpleNamespace(all_greedy=False, all_random=True, temperature=torch.ones(3), generators={})
    for draft_probs in (probs, None):
        tokens = rejection_sampler().rejection_sample(
            drafted, [2, 1, 1], 2, torch.tensor([2, 3, 4], dtype=torch.int32), draft_probs, certain.clone(),
            torch.tensor([[0], [0], [0]], dtype=torch.int32), sampling,
        )  # fmt: skip
        if tokens.tolist() != [[1, 2, 0], [1, -1, -1], [0, -1, -1]]:
            return False
    return True


def replace_rejection_sample() -> None:
    rejection_sampler().rejection_sample = make_rejection_sample("standard")
