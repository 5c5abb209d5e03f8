"""Candidates: the formats that are compared, block formats and others, each with its bits and its quantiser."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product

from torch import Tensor

from drafters.mx.encoding import quantise
from drafters.mx.formats import FORMATS, BlockFormat
from drafters.mx.other_formats import FLOAT8, float8, scaled_integers

SCALE_BITS = 32
"""of an integer format's scale"""


@dataclass(frozen=True)
class Candidate:
    name: str
    bits: float
    """of an element, its share of the scales included"""
    quantise: Callable[[Tensor], Tensor]
    """along the last axis; same shape and dtype"""
    block: BlockFormat | None = None
    """None for a format that is no block format"""


def of_blocks(format: BlockFormat) -> Candidate:
    return Candidate(format.name, format.bits, partial(quantise, format=format), format)


def integers(bits: int, block: int) -> Candidate:
    quantiser = partial(scaled_integers, bits=bits, block=block)
    return Candidate(f"INT{bits}/{block}", bits + SCALE_BITS / block, quantiser)


NAMED = {
    candidate.name: candidate
    for candidate in (
        *map(of_blocks, FORMATS.values()),
        *(integers(bits, block) for bits, block in ((8, 256), (8, 32), (4, 32), (4, 16))),
        *(Candidate(name, 8.0, partial(float8, name=name)) for name in FLOAT8),
    )
}
"""by name"""


def grid() -> Iterator[Candidate]:
    """Block formats of every combination of sizes, without those that have a name."""
    named = {(f.k1, f.d1, f.k2, f.d2, f.m) for f in FORMATS.values()}
    for k1, m, (d2, k2) in product((8, 16, 32, 64, 128), range(1, 9), ((0, None), *product((1, 2), (1, 2, 4, 8)))):
        sizes = k1, 8, k2 or k1, d2, m
        if sizes not in named and (d2 == 0 or sizes[2] < k1):
            name = f"k1={k1} m={m}" + (f" k2={k2} d2={d2}" if d2 else "")
            yield of_blocks(BlockFormat(name, *sizes))
