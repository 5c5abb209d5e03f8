"""Products of float32 matrices in Triton, whose default precision vLLM's attention and experts take. For GPUs."""

import torch
import triton
import triton.language as tl

SIDE = 64


@triton.jit
def _product(a, b, c, SIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    rows = tl.arange(0, SIDE)
    square = rows[:, None] * SIDE + rows[None, :]
    tl.store(c + square, tl.dot(tl.load(a + square), tl.load(b + square)))


def largest_error(device: torch.device | str) -> float:
    """The largest difference of a product from that in float64, where entries are about 1. In float32 some 1e-7, in
    TF32 some 1e-3."""
    a, b = torch.randn(2, SIDE, SIDE, generator=torch.Generator().manual_seed(0)).to(device)
    b = b / SIDE**0.5
    c = torch.empty_like(a)
    _product[(1,)](a, b, c, SIDE=SIDE)
    return (c.double() - a.double() @ b.double()).abs().max().item()
