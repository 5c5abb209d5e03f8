"""Encode a tensor in a block format, and decode it.

The rule, for a block of k1 elements along one axis. The exponent of x is the e with 2^e <= |x| < 2^(e+1); that of zero
is below all others.

    E        = the largest exponent in the block                              the block's exponent
    tau      = min(E - the largest exponent in the sub-block, 2^d2 - 1)       the sub-block's shift, at least 0
    step     = 2^(E - tau - (m - 1))
    integer  = x / step, rounded to nearest, at most 2^m - 1 in magnitude
    x        = integer * step, decoded

With d2 = 1, the shift is the microexponent: it is 1 only if both elements of a pair are below 2^E. The rule is that of
arXiv 2302.08007, section on MX, as notes on the paper give it; they do not give equation numbers. Four details are
this project's choice:

- A tie is rounded to the even integer.
- E is held within d1 bits, -127 to 127 for 8. Below that, small numbers keep the step of E = -127, and vanish at half
  of it. Above, large ones saturate at (2^m - 1) steps. A float32 is never above.
- A sub-block of zeros has the largest shift, and a block of zeros the smallest exponent. Zero has no sign.
- A last block that is shorter is encoded as if zeros followed it.

A product with quantised operands needs them in blocks along the axis that it sums over. So the order matters:
quantising and then transposing gives other numbers than transposing and then quantising.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from drafters.mx.formats import BlockFormat


@dataclass(frozen=True)
class Codes:
    """A tensor in a block format. With n elements along `axis`, the other axes are those of the tensor in all three."""

    format: BlockFormat
    axis: int
    integers: Tensor
    """signed; n along the axis; int8, and int16 if m is above 7"""
    exponents: Tensor
    """of the blocks; ceil(n / k1) along the axis; int8"""
    shifts: Tensor
    """of the sub-blocks; ceil(n / k2) along the axis; uint8"""


def encode(x: Tensor, format: BlockFormat, axis: int = -1) -> Codes:
    """Codes of a floating-point tensor of any shape but (). Raises ValueError for infinity and NaN.

    All arithmetic is exact but for the one rounding: every float32, bfloat16 and float16, subnormal ones included, is a
    normal float64, and a power of two times it is one too.
    """
    if unfit := int((~x.isfinite()).sum()):
        raise ValueError(f"{format.name} has no infinity and no NaN, and {unfit} of {x.numel()} numbers are such")
    n = x.shape[axis]
    values = _in_blocks(x.movedim(axis, -1).double(), format).unflatten(-1, (-1, format.k2))
    below_all = -(2**15)
    largest = torch.frexp(values.abs().amax(-1))  # frexp's mantissa is in [1/2, 1): its exponent is e + 1
    exponents_of_sub_blocks = largest.exponent.sub(1).masked_fill(largest.mantissa == 0, below_all)
    exponents = exponents_of_sub_blocks.amax(-1, keepdim=True).clamp(-format.largest_exponent, format.largest_exponent)
    shifts = (exponents - exponents_of_sub_blocks).clamp(0, format.largest_shift)
    integers = values * _power_of_two(format.m - 1 - exponents + shifts).unsqueeze(-1)
    integers = integers.round_().clamp_(-format.largest_integer, format.largest_integer)
    return Codes(
        format,
        axis,
        integers.flatten(-3)[..., :n].to(torch.int8 if format.m <= 7 else torch.int16).movedim(-1, axis),
        exponents.squeeze(-1).to(torch.int8).movedim(-1, axis),
        shifts.flatten(-2)[..., : -(-n // format.k2)].to(torch.uint8).movedim(-1, axis),
    )


def decode(codes: Codes, dtype: torch.dtype = torch.float32) -> Tensor:
    """The numbers, in the tensor's shape. They are exact in float32 for the named formats."""
    format, axis = codes.format, codes.axis
    integers, exponents, shifts = (part.movedim(axis, -1) for part in (codes.integers, codes.exponents, codes.shifts))
    n, sub_blocks = integers.shape[-1], format.k1 // format.k2
    integers = _in_blocks(integers, format).unflatten(-1, (sub_blocks, format.k2))
    shifts = pad(shifts, (0, -shifts.shape[-1] % sub_blocks)).unflatten(-1, (-1, sub_blocks))
    steps = _power_of_two(exponents.int().unsqueeze(-1) - shifts.int() - (format.m - 1))
    return (integers * steps.unsqueeze(-1)).flatten(-3)[..., :n].to(dtype).movedim(-1, axis)


def quantise(x: Tensor, format: BlockFormat, axis: int = -1) -> Tensor:
    """What is left of a tensor after `encode` and `decode`: same shape, same dtype.

    The dtype must hold m significant bits: bfloat16 holds 8, which suffices for MX9. Raises ValueError as `encode`.
    """
    return decode(encode(x, format, axis), x.dtype)


def _in_blocks(x: Tensor, format: BlockFormat) -> Tensor:
    """The last axis as whole blocks (..., blocks, k1), with zeros at its end."""
    return pad(x, (0, -x.shape[-1] % format.k1)).unflatten(-1, (-1, format.k1))


def _power_of_two(exponents: Tensor) -> Tensor:
    """2^exponents, float64, exact: the exponent's bits of a float64 are set, since `pow` may round."""
    return exponents.long().add(1023).bitwise_left_shift(52).view(torch.float64)
