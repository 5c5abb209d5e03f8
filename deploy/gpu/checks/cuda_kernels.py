"""Stage `kernels`: vLLM's CUDA kernels and the GPU runner's sampling, against this project's own arithmetic.

The module is not called `kernels`, because that would hide the package `kernels`, which transformers looks for.
"""

from collections.abc import Iterator
from math import sqrt

import torch
from common import DEVICE, reported
from torch import Tensor

from drafters.scoring import kept_tokens
from drafters.verification import Drafts, survival

ROWS = 400_000
DRAFT_TOKENS, VOCABULARY = 3, 7
TEMPERATURE = 0.8
CUT_ROWS, CUT_VOCABULARY = 256, 151_936


def run() -> None:
    reported("rms_norm", rms_norm)
    for block in (False, True):
        for sampled in (True, False):
            name = f"{'block' if block else 'standard'} verification of {'sampled' if sampled else 'greedy'} drafts"
            reported(name, lambda block=block, sampled=sampled: verification(block=block, sampled=sampled))
    for top_k, top_p, rounded in (
        (20, 1.0, False),
        (0, 0.9, False),
        (20, 0.9, False),
        (20, 1.0, True),
        (0, 0.9, True),
    ):
        name = f"top-k {top_k}, top-p {top_p} of {'bfloat16' if rounded else 'float32'} logits"
        reported(name, lambda k=top_k, p=top_p, rounded=rounded: cuts(k, p, rounded=rounded))


def rms_norm() -> str:
    """Launches one bfloat16 kernel of the stripped library."""
    from vllm import _custom_ops as ops

    width = 2048
    x = torch.randn(512, width, device=DEVICE, dtype=torch.bfloat16)
    weight = torch.rand(width, device=DEVICE, dtype=torch.bfloat16)
    result = torch.empty_like(x)
    ops.rms_norm(result, x, weight, 1e-6)
    expected = torch.nn.functional.rms_norm(x.float(), (width,), weight.float(), 1e-6)
    return f"largest difference {(result.float() - expected).abs().max().item():.4f}"


def verification(*, block: bool, sampled: bool) -> str:
    """Compares the tokens that vLLM's verification yields with their law, over ROWS rows of the same distributions.

    Here the policy's distribution at a position does not depend on the tokens before it. So the k + 1 tokens of a row
    are independent draws from the k + 1 distributions. If a row yields fewer tokens, the rest is drawn here.
    """
    from vllm.v1.worker.gpu.spec_decode.rejection_sampler_utils import rejection_sample

    random = torch.Generator(DEVICE).manual_seed(5)
    on = {"generator": random, "device": DEVICE}
    policy_logits_KV = torch.randn(DRAFT_TOKENS + 1, VOCABULARY, **on) * 1.5
    draft_logits_KV = policy_logits_KV[:DRAFT_TOKENS] + torch.randn(DRAFT_TOKENS, VOCABULARY, **on)
    temperature_R = torch.full((ROWS,), TEMPERATURE, device=DEVICE)
    seeds_R = torch.randint(-(2**62), 2**62, (ROWS,), **on)
    first_position_R = torch.randint(3, 2000, (ROWS,), **on)
    rows_R = torch.arange(ROWS, device=DEVICE)

    scaled_KV = policy_logits_KV / TEMPERATURE
    scaled_KV[:, 0] = -torch.inf  # as top-k or top-p leave them
    scaled_KV[1, 3] = -torch.inf
    policy_KV = scaled_KV.softmax(1)
    cache_RKV = torch.zeros(ROWS, DRAFT_TOKENS, VOCABULARY, device=DEVICE) if sampled else None
    drafts_RK = drawn_drafts(draft_logits_KV, temperature_R, seeds_R, first_position_R, cache_RKV)

    positions = DRAFT_TOKENS + 1
    offset_K = torch.arange(positions, device=DEVICE)
    tokens_RK, yielded_R = rejection_sample(
        scaled_KV.repeat(ROWS, 1).contiguous(),
        cache_RKV,
        torch.cat([drafts_RK[:, :1] * 0, drafts_RK], 1).flatten().int(),
        torch.arange(0, ROWS * positions + 1, positions, dtype=torch.int32, device=DEVICE),
        (first_position_R[:, None] + offset_K).flatten(),
        rows_R,
        rows_R.repeat_interleave(positions),
        offset_K.int().repeat(ROWS),
        temperature_R,
        seeds_R,
        DRAFT_TOKENS,
        use_block_verification=block,
    )

    drawn_KR = [torch.multinomial(policy_KV[j], ROWS, replacement=True, generator=random) for j in range(positions)]
    full_RK = torch.stack([torch.where(yielded_R > j, tokens_RK[:, j], drawn_KR[j]) for j in range(positions)], 1)
    worst = max(pair_scores(full_RK, policy_KV))
    drafter_NV = (cache_RKV / TEMPERATURE).softmax(-1).flatten(0, 1) if cache_RKV is not None else None
    drafts = Drafts(drafts_RK.flatten(), torch.full((ROWS,), DRAFT_TOKENS, device=DEVICE), drafter_NV)
    expected_RK = survival(policy_KV[:DRAFT_TOKENS].repeat(ROWS, 1), drafts, "block" if block else "standard")[0]
    expected = [round(x, 4) for x in expected_RK.mean(0).tolist()]
    accepted = [round((yielded_R > i + 1).float().mean().item(), 4) for i in range(DRAFT_TOKENS)]
    return f"chi2 z {worst:.2f}; P(n >= i) {accepted}, ours {expected} (standard error {0.5 / sqrt(ROWS):.4f})"


def drawn_drafts(
    logits_KV: Tensor, temperature_R: Tensor, seeds_R: Tensor, first_position_R: Tensor, cache_RKV: Tensor | None
) -> Tensor:
    """Drafts (ROWS, k), drawn as vLLM's drafter draws them, which fills the cache of its logits.

    Without a cache, the drafts are the most likely tokens.
    """
    from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample

    drafts_RK = torch.empty(ROWS, DRAFT_TOKENS, dtype=torch.int64, device=DEVICE)
    for i, logits_V in enumerate(logits_KV):
        logits_RV = logits_V.expand(ROWS, VOCABULARY).contiguous()
        if cache_RKV is None:
            drafts_RK[:, i] = logits_RV.argmax(1)
        else:
            drafts_RK[:, i] = gumbel_sample(
                logits_RV,
                torch.arange(ROWS, device=DEVICE),
                temperature_R,
                seeds_R,
                first_position_R + i,
                apply_temperature=True,
                is_drafting=True,
                logits_cache=cache_RKV,
                logits_cache_col=torch.tensor(i, device=DEVICE),
            )
    return drafts_RK


def pair_scores(tokens_RK: Tensor, policy_KV: Tensor) -> Iterator[float]:
    """For each two adjacent positions: chi-square of their joint counts, standardised by its mean and deviation."""
    for j in range(DRAFT_TOKENS):
        pairs_R = tokens_RK[:, j] * VOCABULARY + tokens_RK[:, j + 1]
        counts = torch.bincount(pairs_R, minlength=VOCABULARY**2).double()
        expected = (policy_KV[j][:, None] * policy_KV[j + 1]).flatten().double() * ROWS
        possible = expected > 0
        assert counts[~possible].sum() == 0, "a token of probability zero was sampled"
        freedom = int(possible.sum()) - 1
        chi2 = ((counts - expected) ** 2 / expected)[possible].sum().item()
        yield (chi2 - freedom) / sqrt(2 * freedom)


def cuts(top_k: int, top_p: float, *, rounded: bool) -> str:
    """Compares the tokens that top-k (0: all) and then top-p keep. Logits that are `rounded` to bfloat16 often tie."""
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

    torch.manual_seed(1)
    logits_NV = torch.randn(CUT_ROWS, CUT_VOCABULARY, device=DEVICE) * 3
    if rounded:
        logits_NV = logits_NV.bfloat16().float()
    k_N = torch.full((CUT_ROWS,), top_k, dtype=torch.int32, device=DEVICE) if top_k else None
    p_N = torch.full((CUT_ROWS,), top_p, device=DEVICE) if top_p < 1 else None
    kept_NV = apply_top_k_top_p(logits_NV.clone(), k_N, p_N) > -torch.inf
    expected_NV = kept_tokens(logits_NV, top_p=top_p, top_k=top_k)
    differs_NV = kept_NV != expected_NV
    mass = (logits_NV.softmax(1) * differs_NV).sum(1).max().item()
    return (
        f"{int(differs_NV.any(1).sum())} of {CUT_ROWS} rows differ, {int(differs_NV.sum())} of "
        f"{int(expected_NV.sum())} tokens, largest mass {mass:.1e}"
    )
