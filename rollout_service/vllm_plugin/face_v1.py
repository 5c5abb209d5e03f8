"""FaceV1: the face of a worker with vLLM's V1 model runner, which engines on a CPU have."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from drafters.verification import Verification
from rollout_service.vllm_plugin import verification as own
from rollout_service.vllm_plugin.face import Cut
from rollout_service.vllm_plugin.idle_drafter import IdleDrafter
from rollout_service.vllm_plugin.patch import APPLIED


class FaceV1:
    device_type = "cpu"

    def __init__(self, worker: Any):
        self.runner = worker.model_runner
        speculation = worker.vllm_config.speculative_config
        self.draft_tokens: int = speculation.num_speculative_tokens if speculation is not None else 0

    @property
    def verifications(self) -> tuple[Verification, ...]:
        return (own.own_kind() or "standard",)

    def set_draft_sampling(self, draft_sampling: str) -> None:
        if self.draft_tokens:  # each step is verified as it was drafted
            self.runner.drafter._enable_probabilistic_draft_probs = draft_sampling == "probabilistic"

    def set_verification(self, verification: str) -> None:
        """`standard` and `block` are the project's own. `auto` leaves vLLM's own in place if it is right here."""
        from rollout_service.vllm_plugin.table import STOCK

        if verification == "auto" and own.NAME not in APPLIED:
            function = STOCK[own.NAME]
        else:
            function = own.make_rejection_sample("block" if verification == "block" else "standard")
        own.rejection_sampler().rejection_sample = function

    def let_drafter_idle(self) -> None:
        IdleDrafter(self.runner)

    def running(self) -> dict[str, str]:
        if not self.draft_tokens:
            return {}
        samples = getattr(self.runner.drafter, "_enable_probabilistic_draft_probs", False)
        return {
            "draft_sampling": "probabilistic" if samples else "greedy",
            "verification": f"{kind} (own)" if (kind := own.own_kind()) else "standard (vLLM)",
        }

    def sample(self, logits_NV: Tensor, cut: Cut) -> Tensor:
        rows = len(logits_NV)
        sampling = SimpleNamespace(
            all_greedy=cut.temperature == 0.0,
            all_random=cut.temperature > 0.0,
            temperature=torch.full((rows,), cut.temperature),
            top_k=torch.full((rows,), cut.top_k, dtype=torch.int32) if cut.top_k else None,
            top_p=torch.full((rows,), cut.top_p) if cut.top_p < 1.0 else None,
            generators={},
            max_num_logprobs=None,
            logprob_token_ids=None,
            logitsprocs=SimpleNamespace(argmax_invariant=[]),
        )
        return self.runner.sampler.sample(logits_NV.clone(), sampling)[0].long()

    def verify(
        self,
        target_RKV: Tensor,
        draft_KV: Tensor | None,
        drafts_RK: Tensor,
        temperature: float,
        verification: Verification,
    ) -> Tensor:
        requests, drafts = drafts_RK.shape
        ends_R = torch.arange(drafts, requests * drafts + 1, drafts, dtype=torch.int32)
        sampling = SimpleNamespace(
            all_greedy=False,
            all_random=True,
            temperature=torch.full((requests,), temperature),
            top_k=None,
            top_p=None,
            generators={},
        )
        logits_NV = target_RKV[:, :-1].flatten(0, 1).contiguous()
        bonus_R1 = torch.multinomial((target_RKV[:, -1] / temperature).softmax(1), 1).int()
        probs_NV = None if draft_KV is None else (draft_KV / temperature).softmax(1).repeat(requests, 1)
        vllm = own.rejection_sampler()
        logits_NV = vllm.apply_sampling_constraints(logits_NV, ends_R, sampling)
        return vllm.rejection_sample(
            drafts_RK.flatten().int(), [drafts] * requests, drafts, ends_R, probs_NV, logits_NV, bonus_R1, sampling
        ).long()

    def check_products(self) -> None:
        """They are exact on a CPU."""
