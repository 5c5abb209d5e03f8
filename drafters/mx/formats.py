"""Block formats of the framework Block Data Representations (BDR), and the named ones: MX9, MX6, MX4, MSFP16, MSFP12.

"With Shared Microexponents, A Little Shifting Goes a Long Way" (arXiv 2302.08007, Rouhani et al., ISCA 2023). What is
here follows notes on the paper, which name its theorem 1 but not the numbers of its equations.

These are not the MX formats of the Open Compute Project (OCP): those have blocks of 32 elements, and each element has
an exponent of its own.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class BlockFormat:
    """Blocks of k1 elements share an exponent, and sub-blocks of k2 elements share a shift to finer steps.

    Example: `BlockFormat("MX9", k1=16, d1=8, k2=2, d2=1, m=7)` takes (1 + 7) + 8 / 16 + 1 / 2 = 9 bits an element.
    A format without a sub-scale has d2 = 0 and k2 = k1. Raises ValueError, with the field, for sizes that do not fit.
    """

    name: str
    k1: int
    """elements of a block"""
    d1: int
    """bits of the block's exponent"""
    k2: int
    """elements of a sub-block; divides k1"""
    d2: int
    """bits of the sub-block's shift, which is called microexponent if it is one bit"""
    m: int
    """bits of an element's magnitude; its sign takes one more"""

    def __post_init__(self) -> None:
        if not 1 <= self.k2 <= self.k1 or self.k1 % self.k2:
            raise ValueError(f"k2: sub-blocks of {self.k2} elements do not divide blocks of k1 = {self.k1}")
        if self.d2 == 0 and self.k2 != self.k1:
            raise ValueError(f"k2: a format without a sub-scale (d2 = 0) has k2 = k1 = {self.k1}, not {self.k2}")
        for field, least, most in (("d1", 2, 8), ("d2", 0, 4), ("m", 1, 15)):
            if not least <= getattr(self, field) <= most:
                raise ValueError(f"{field}: must be from {least} to {most}, not {getattr(self, field)}")

    @property
    def bits(self) -> float:
        """Bits of an element, its share of the scales included."""
        return (self.m + 1) + self.d1 / self.k1 + self.d2 / self.k2

    @property
    def largest_shift(self) -> int:
        """The paper's beta."""
        return 2**self.d2 - 1

    @property
    def largest_integer(self) -> int:
        return 2**self.m - 1

    @property
    def largest_exponent(self) -> int:
        """Of a block; the smallest is its negative, so that one code is not used. 127 for 8 bits."""
        return 2 ** (self.d1 - 1) - 1

    def bound_db(self, length: int) -> float:
        """Lower bound of the QSNR in dB, for vectors of `length` elements of any distribution (theorem 1).

            6.02 m + 10 log10(4^beta / (min(length, k1) + (4^beta - 1) k2)), where beta = 2^d2 - 1

        Here 6.02 is 20 log10(2). The bound holds where no block's exponent is beyond the range of d1 bits.
        """
        finest = 4**self.largest_shift
        spread = min(length, self.k1) + (finest - 1) * self.k2
        return 20 * self.m * math.log10(2) + 10 * math.log10(finest / spread)


FORMATS = {
    format.name: format
    for format in (
        BlockFormat("MX9", k1=16, d1=8, k2=2, d2=1, m=7),
        BlockFormat("MX6", k1=16, d1=8, k2=2, d2=1, m=4),
        BlockFormat("MX4", k1=16, d1=8, k2=2, d2=1, m=2),
        BlockFormat("MSFP16", k1=16, d1=8, k2=16, d2=0, m=7),
        BlockFormat("MSFP12", k1=16, d1=8, k2=16, d2=0, m=3),
    )
}
"""by name"""
