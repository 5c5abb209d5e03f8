"""FaceV2: the face of a worker with vLLM's V2 model runner, which engines on a GPU have.

USED and CALLED list what it touches of vLLM's. A test compares them with the installed vLLM.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from drafters.verification import Verification
from rollout_service.vllm_plugin.face import Cut

GPU = "vllm.v1.worker.gpu"
USED = {
    f"{GPU}.model_runner.GPUModelRunner.__init__": ("speculator", "sampler", "rejection_sampler", "device"),
    f"{GPU}.spec_decode.speculator.DraftModelSpeculator.__init__": ("draft_logits",),
    f"{GPU}.spec_decode.rejection_sampler.RejectionSampler.__init__": ("use_block_verification",),
}
"""attributes that vLLM's constructors set, by the constructor's full name"""
CALLED = {
    f"{GPU}.sample.sampler.Sampler.add_request": "self, req_idx, sampling_params",
    f"{GPU}.sample.sampler.Sampler.apply_staged_writes": "self",
    f"{GPU}.sample.sampler.Sampler.sample": (
        "self, logits, expanded_idx_mapping, idx_mapping, idx_mapping_np, pos, input_ids, expanded_local_pos, "
        "seq_lens_upper_bound_np, return_logprobs"
    ),
    f"{GPU}.spec_decode.rejection_sampler.RejectionSampler._verify": (
        "self, logits, draft_logits, draft_sampled, pos, cu_num_logits, idx_mapping, idx_mapping_np, "
        "expanded_idx_mapping, expanded_local_pos, seq_lens_upper_bound_np, verify_draft_sampled"
    ),
}
"""functions of vLLM's with the names of their parameters"""
SEED = 5


class FaceV2:
    device_type = "cuda"
    verifications: tuple[Verification, ...] = ("standard", "block")

    def __init__(self, worker: Any):
        self.runner = worker.model_runner
        self.is_float32 = worker.model_config.dtype == torch.float32
        speculation = worker.vllm_config.speculative_config
        self.draft_tokens: int = speculation.num_speculative_tokens if speculation is not None else 0

    def set_verification(self, verification: str) -> None:
        if self.draft_tokens:  # outside of the CUDA graphs
            self.runner.rejection_sampler.use_block_verification = verification == "block"

    def running(self) -> dict[str, str]:
        if not self.draft_tokens:
            return {}
        verification = "block" if self.runner.rejection_sampler.use_block_verification else "standard"
        drafts = "greedy" if self.runner.speculator.draft_logits is None else "probabilistic"
        return {"draft_sampling": drafts, "verification": f"{verification} (vLLM)"}

    def sample(self, logits_NV: Tensor, cut: Cut) -> Tensor:
        self._ask(cut)
        rows = len(logits_NV)
        sampled_N, _ = self.runner.sampler.sample(
            logits_NV.to(self.runner.device),
            **self._rows(rows, rows),
            pos=self._numbers(rows),
            input_ids=self._zeros(rows),
            expanded_local_pos=self._zeros(rows).int(),
            return_logprobs=True,
        )
        return sampled_N.long().cpu()

    def verify(
        self,
        target_RKV: Tensor,
        draft_KV: Tensor | None,
        drafts_RK: Tensor,
        temperature: float,
        verification: Verification,
    ) -> Tensor:
        self._ask(Cut(temperature))
        rejection_sampler, device = self.runner.rejection_sampler, self.runner.device
        requests, positions, _ = target_RKV.shape
        rows = requests * positions
        # The first token of each request is the last one sampled, which is not a draft.
        tokens_N = torch.nn.functional.pad(drafts_RK, (1, 0)).flatten().int().to(device)
        draft_1KV = None
        if draft_KV is not None:  # as many positions as vLLM's own, because it reads the bonus token's too
            missing = self.draft_tokens - len(draft_KV)
            draft_1KV = torch.nn.functional.pad(draft_KV, (0, 0, 0, missing))[None].to(device)
        before = rejection_sampler.use_block_verification
        rejection_sampler.use_block_verification = verification == "block"
        try:
            _, tokens_RK, yielded_R = rejection_sampler._verify(
                target_RKV.flatten(0, 1).to(device),
                draft_1KV,
                tokens_N,
                self._numbers(rows),
                torch.arange(0, rows + 1, positions, dtype=torch.int32, device=device),
                **self._rows(rows, requests),
                expanded_local_pos=self._numbers(positions).int().repeat(requests),
                verify_draft_sampled=tokens_N,
            )
        finally:
            rejection_sampler.use_block_verification = before
        tokens_RK = tokens_RK[:, :positions]
        past_RK = self._numbers(positions) >= yielded_R[:, None]
        return tokens_RK.masked_fill(past_RK, -1).long().cpu()

    def _ask(self, cut: Cut) -> None:
        """Give the sampler's first place for a request these parameters. The next request there gives it its own."""
        from vllm import SamplingParams

        sampler = self.runner.sampler
        sampler.add_request(0, SamplingParams(**cut._asdict(), seed=SEED))
        sampler.apply_staged_writes()

    def _rows(self, rows: int, requests: int) -> dict[str, Any]:
        """So many rows of logits of so many requests, all in the first place; their positions make them differ."""
        return {
            "expanded_idx_mapping": self._zeros(rows),
            "idx_mapping": self._zeros(requests),
            "idx_mapping_np": np.zeros(requests, dtype=np.int64),
            "seq_lens_upper_bound_np": np.full(requests, rows, dtype=np.int32),
        }

    def _zeros(self, count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.int64, device=self.runner.device)

    def _numbers(self, count: int) -> Tensor:
        return torch.arange(count, device=self.runner.device)

    def check_products(self) -> None:
        if not self.is_float32:
            return
        from rollout_service.vllm_plugin.float32_products import largest_error

        if (error := largest_error(self.runner.device)) > 1e-4:
            raise RuntimeError(
                f"Triton's products of float32 matrices are wrong by {error:.0e}, which is TF32: the engine's process "
                "needs TRITON_F32_DEFAULT=ieee"
            )
