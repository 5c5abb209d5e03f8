"""FormatRow: a format with its bits and its QSNR on random vectors, as `formats.json` has it; and the frontier."""

from collections.abc import Iterable, Sequence

from pydantic import BaseModel
from torch import Tensor

from drafters.exploration.candidates import Candidate
from drafters.mx.qsnr import qsnr


class FormatRow(BaseModel):
    """Sizes are those of BlockFormat; None where a format has none, as an integer format or one without a sub-scale."""

    name: str
    k1: int | None = None
    d1: int | None = None
    k2: int | None = None
    d2: int | None = None
    m: int | None = None
    bits: float
    """of an element, its share of the scales included"""
    qsnr: float
    """in dB"""
    bound: float | None = None
    """the theorem's lower bound of the QSNR in dB"""
    frontier: bool = False
    """whether no other format has a higher QSNR with as many bits or fewer"""


def measured_rows(vectors: Tensor, candidates: Iterable[Candidate]) -> list[FormatRow]:
    """A row for each candidate, measured on vectors (count, length)."""
    rows = []
    for candidate in candidates:
        row = FormatRow(name=candidate.name, bits=candidate.bits, qsnr=qsnr(vectors, candidate.quantise(vectors)))
        if (block := candidate.block) is not None:
            row.k1, row.d1, row.d2, row.m = block.k1, block.d1, block.d2, block.m
            row.k2 = block.k2 if block.d2 else None
            row.bound = block.bound_db(vectors.shape[1])
        rows.append(row)
    return rows


def mark_frontier(rows: Sequence[FormatRow]) -> None:
    best = -float("inf")
    for row in sorted(rows, key=lambda row: (row.bits, -row.qsnr)):
        row.frontier = row.qsnr > best
        best = max(best, row.qsnr)


def sweep(rows: Sequence[FormatRow], base: FormatRow, field: str) -> list[FormatRow]:
    """The block formats that differ from `base` in one size, `base` among them, by that size.

    For d2 the first is the one without a sub-scale, which has no k2.
    """
    sizes = {"k1", "d1", "k2", "d2", "m"} - {field}
    alike = [row for row in rows if row.d2 and all(getattr(row, size) == getattr(base, size) for size in sizes)]
    if field == "d2":
        alike += [row for row in rows if row.d2 == 0 and (row.k1, row.d1, row.m) == (base.k1, base.d1, base.m)]
    return sorted(alike, key=lambda row: getattr(row, field))
