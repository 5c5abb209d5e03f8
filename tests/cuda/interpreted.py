"""The V2 runner's own sampler and verifier on CPU tensors: Triton's interpreter runs their kernels.

Shapes: R requests of different draft lengths, K the longest draft, N drafts of all requests in order, V vocabulary, L
rows of logits: one for each draft, and one after the last draft of each request.
"""

from dataclasses import dataclass
from types import SimpleNamespace

import torch
from resolved import DRAFT_TOKENS, resolved, service_config
from torch import Tensor
from vllm.config import VllmConfig
from vllm.triton_utils import tl, triton
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p_pytorch
from vllm.v1.worker.gpu import buffer_utils
from vllm.v1.worker.gpu.sample import sampler, states
from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample, tl_rand32
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.spec_decode import rejection_sampler_utils
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler
from vllm.v1.worker.gpu.states import RequestState

from drafters.scoring import kept_tokens
from drafters.verification import Drafts, Verification, residual, survival, target_distribution
from rollout_service.engine.arguments import sampling_params
from rollout_service.evaluation.cut import Cut
from rollout_service.protocol import GroupRequest, Sampling

CPU = torch.device("cpu")


class SharedMemory:
    """In the place of CPU memory that the GPU reads. Here both are the CPU."""

    def __init__(self, size, dtype):
        self.cpu = torch.zeros(size, dtype=dtype)
        self.np = self.cpu.numpy()

    def uva(self, n=None):
        return self.cpu if n is None else self.cpu[:n]


def cut_by_torch(logits_NV, k_N, p_N):
    """vLLM's function for torch, in the place of its kernel, which Triton's interpreter cannot run."""
    return logits_NV if k_N is None and p_N is None else apply_top_k_top_p_pytorch(logits_NV, k_N, p_N, True)


def on_the_cpu(monkeypatch):
    """Replace what vLLM's sampler asks the device for, and what Triton's interpreter lacks."""
    monkeypatch.setattr(buffer_utils, "UvaBuffer", SharedMemory)
    monkeypatch.setattr(states, "apply_top_k_top_p", cut_by_torch)
    monkeypatch.setattr(sampler, "apply_top_k_top_p", cut_by_torch)
    monkeypatch.setattr(rejection_sampler_utils, "tldevice", SimpleNamespace(log1p=lambda x: tl.log(1.0 + x)))


def samplers(config: VllmConfig, requests: int, vocabulary: int) -> tuple[Sampler, RejectionSampler | None]:
    """Sampler and verifier as the V2 runner makes them (GPUModelRunner.load_model)."""
    requests_states = RequestState(requests, 16, 64, DRAFT_TOKENS, vocabulary, CPU)
    made = Sampler(
        config, requests, vocabulary, CPU, requests_states, config.model_config.logprobs_mode, DRAFT_TOKENS + 1
    )
    speculation = config.speculative_config
    return made, RejectionSampler(made, speculation, CPU) if speculation is not None else None


@dataclass
class Step:
    """A decoding step. Every request has up to K = DRAFT_TOKENS drafts, and its own cut."""

    lengths_R: Tensor
    cuts: list[Cut]
    """one for each request"""
    logits_LV: Tensor
    drafts_N: Tensor
    draft_logits_RKV: Tensor | None
    """before temperature, as the speculator keeps them; None for deterministic drafts"""
    invalid_N: Tensor | None = None
    """drafts that a grammar does not allow: the runner has them refused"""
    first_position: int = 5

    def __post_init__(self):
        requests = len(self.lengths_R)
        self.starts_R1 = torch.nn.functional.pad((self.lengths_R + 1).cumsum(0), (1, 0))
        self.request_L = torch.arange(requests).repeat_interleave(self.lengths_R + 1)
        self.place_L = torch.arange(len(self.request_L)) - self.starts_R1[self.request_L]
        self.precedes_draft_L = self.place_L < self.lengths_R[self.request_L]
        # Every request has its own seed and its own positions.
        self.position_L = self.first_position + self.place_L + self.request_L % 97
        self.temperature_R = torch.tensor([cut.temperature for cut in self.cuts])

    @property
    def greedy_L(self) -> Tensor:
        return (self.temperature_R == 0.0)[self.request_L]

    def samplers(self, verification: Verification) -> tuple[Sampler, RejectionSampler]:
        """vLLM's, with the requests of this step."""
        config = resolved(service_config("mtp", drafter={"verification": verification}))
        own, verifier = samplers(config, len(self.lengths_R), self.logits_LV.shape[1])
        for i, cut in enumerate(self.cuts):
            sampling = Sampling(temperature=cut.temperature, top_p=cut.top_p, top_k=cut.top_k, seed=1000 + i)
            own.add_request(i, sampling_params(GroupRequest(prompt_token_ids=[1], sampling=sampling)))
        own.apply_staged_writes()
        return own, verifier

    def sampled(self, rejection_sampler: RejectionSampler) -> tuple[Tensor, Tensor, Tensor]:
        """New tokens (R, K + 1), how many of them count (R,), and their log-probabilities (L,)."""
        requests, starts_R1 = torch.arange(len(self.lengths_R)), self.starts_R1.int()
        input_ids_L = torch.zeros(len(self.request_L), dtype=torch.int32)
        input_ids_L[self.place_L > 0] = self.drafts_N.int()
        invalid_L = None
        if self.invalid_N is not None:
            invalid_L = torch.zeros(len(self.request_L), dtype=torch.bool)
            invalid_L[self.place_L > 0] = self.invalid_N
        batch = SimpleNamespace(
            num_reqs=len(requests),
            input_ids=input_ids_L,
            positions=self.position_L,
            logits_indices=torch.arange(len(self.request_L)),
            idx_mapping=requests.int(),
            idx_mapping_np=requests.numpy(),
            expanded_idx_mapping=self.request_L.int(),
            expanded_local_pos=self.place_L.int(),
            cu_num_logits=starts_R1,
            cu_num_logits_np=starts_R1.numpy(),
            seq_lens=torch.full((len(requests),), 200, dtype=torch.int32),
            seq_lens_cpu_upper_bound=torch.full((len(requests),), 200, dtype=torch.int32),
        )
        output = rejection_sampler(self.logits_LV.clone(), batch, self.draft_logits_RKV, invalid_L)
        return output.sampled_token_ids, output.num_sampled, output.logprobs_tensors.logprobs[:, 0]

    def cut_logits_LV(self) -> Tensor:
        """This project's arithmetic: logits of the distributions that are sampled from."""
        scaled_LV = self.logits_LV / self.temperature_R.where(self.temperature_R > 0.0, 1.0)[self.request_L, None]
        for cut in set(self.cuts):
            rows = torch.tensor([c == cut for c in self.cuts])[self.request_L] & ~self.greedy_L
            kept = kept_tokens(scaled_LV[rows], top_p=cut.top_p, top_k=cut.top_k, device="cpu")
            scaled_LV[rows] = scaled_LV[rows].masked_fill(~kept, -torch.inf)
        return scaled_LV

    def expected(self, verification: Verification, seeds_R: Tensor) -> tuple[Tensor, Tensor]:
        """What the law of `drafters.verification` yields with the random numbers that vLLM draws: tokens (R, K + 1),
        -1 past the end, and their numbers (R,)."""
        target_LV = target_distribution(self.cut_logits_LV(), self.greedy_L)
        probs_NV = None
        if self.draft_logits_RKV is not None:
            scale_R = self.temperature_R.where(self.temperature_R > 0.0, 1.0)
            probs_RKV = (self.draft_logits_RKV / scale_R[:, None, None]).softmax(-1)
            probs_NV = probs_RKV[self.request_L, self.place_L.clamp(max=DRAFT_TOKENS - 1)][self.precedes_draft_L]
        valid_N = self.drafts_N if self.invalid_N is None else self.drafts_N.masked_fill(self.invalid_N, -1)
        drafts = Drafts(valid_N, self.lengths_R, probs_NV)
        survival_RK, weights_RK = survival(target_LV[self.precedes_draft_L], drafts, verification)
        uniform_L = torch.empty(len(self.request_L))
        _uniform[(len(self.request_L),)](uniform_L, seeds_R[self.request_L], self.position_L)
        uniform_RK = drafts.padded(uniform_L[self.precedes_draft_L], 1.0)
        accepted_R = accepted(survival_RK, uniform_RK, verification)

        next_RV = target_LV[self.starts_R1[:-1] + accepted_R]
        refused = (accepted_R < self.lengths_R).nonzero().squeeze(1)
        rows = drafts.starts_R[refused] + accepted_R[refused]
        weights_X = weights_RK[refused, accepted_R[refused]]
        next_RV[refused] = residual(target_LV[self.precedes_draft_L], drafts, rows, weights_X)
        next_R = gumbel_sample(
            next_RV.log(),
            torch.arange(len(next_RV)),
            self.temperature_R,
            seeds_R,
            self.position_L[self.starts_R1[:-1] + accepted_R],
            apply_temperature=False,
            is_drafting=False,
        )
        tokens_RK1 = torch.nn.functional.pad(drafts.padded(valid_N, -1), (0, 1), value=-1)
        tokens_RK1[torch.arange(tokens_RK1.shape[1]) >= accepted_R[:, None]] = -1
        return tokens_RK1.scatter(1, accepted_R[:, None], next_R[:, None]), accepted_R + 1


def accepted(survival_RK: Tensor, uniform_RK: Tensor, verification: Verification) -> Tensor:
    """Accepted lengths (R,) when one uniform number for each draft decides, as in vLLM's kernels.

    standard: draft i is accepted, after those before it, with probability P(n >= i) / P(n >= i - 1).
    block:    n is the last i that is accepted with probability h_i, where 1 - h_i = P(n < i) / P(n < i + 1).
    """
    if verification == "standard":
        before_RK = torch.nn.functional.pad(survival_RK[:, :-1], (1, 0), value=1.0)
        return (uniform_RK < survival_RK / before_RK).long().cumprod(1).sum(1)
    after_RK = torch.nn.functional.pad(survival_RK[:, 1:], (0, 1))
    stops_RK = uniform_RK <= 1.0 - (1.0 - survival_RK) / (1.0 - after_RK)
    return (stops_RK * torch.arange(1, stops_RK.shape[1] + 1)).max(1).values


@triton.jit
def _uniform(uniform_ptr, seed_ptr, position_ptr):
    """The uniform numbers that vLLM's verification draws."""
    i = tl.program_id(0)
    number = tl_rand32(tl.load(seed_ptr + i), tl.load(position_ptr + i), includes_zero=False)
    tl.store(uniform_ptr + i, number)
