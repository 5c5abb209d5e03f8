"""Formats to compare block formats with: integers with a scale for each block, and float8 with one scale for all.

Both round to the nearest number of the format, with scales in float32. Neither is used to draft.
"""

import torch
from torch import Tensor

FLOAT8 = {"E4M3": torch.float8_e4m3fn, "E5M2": torch.float8_e5m2}
"""by name"""


def scaled_integers(x: Tensor, bits: int, block: int, axis: int = -1) -> Tensor:
    """`x` in symmetric integers of `bits` bits; `block` elements along the axis share a scale. Same shape and dtype.

    The largest magnitude of a block becomes 2^(bits - 1) - 1.
    """
    values = x.movedim(axis, -1).float()
    length = values.shape[-1]
    blocks = torch.nn.functional.pad(values, (0, -length % block)).unflatten(-1, (-1, block))
    scales = blocks.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    scales = scales.masked_fill(scales == 0, 1.0)
    return ((blocks / scales).round() * scales).flatten(-2)[..., :length].to(x.dtype).movedim(-1, axis)


def float8(x: Tensor, name: str) -> Tensor:
    """`x` in the float8 format of this name. Its largest magnitude becomes the format's. Same shape and dtype."""
    dtype = FLOAT8[name]
    scale = x.abs().amax().float() / torch.finfo(dtype).max
    return ((x.float() / scale).to(dtype).float() * scale).to(x.dtype) if scale > 0 else x
