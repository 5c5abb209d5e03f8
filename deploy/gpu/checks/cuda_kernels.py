"""Stage `kernels`: vLLM's CUDA kernels against this project's own arithmetic.

The module is not called `kernels`, because that would hide the package `kernels`, which transformers looks for.
"""

import torch
from common import DEVICE, reported

from drafters.scoring import kept_tokens

CUT_ROWS, CUT_VOCABULARY = 256, 151_936


def run() -> None:
    reported("rms_norm", rms_norm)
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
