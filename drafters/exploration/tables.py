"""The tables that `drafters formats` prints."""

from collections.abc import Iterable, Sequence
from itertools import groupby

from rich.box import SIMPLE
from rich.table import Table

from drafters.exploration.acceptance import AcceptanceRow
from drafters.exploration.candidates import NAMED
from drafters.exploration.layers import MatrixRow, Measured, least_by_layer
from drafters.exploration.rows import FormatRow, sweep

SIZES = ("k1", "d1", "k2", "d2", "m")
BASES = ("MX9", "MX6", "MX4")
"""the formats from which the sweeps start"""
FIELDS = ("d2", "k2", "k1")
"""the sizes that the sweeps change"""


def formats_table(rows: Sequence[FormatRow]) -> Table:
    """The named formats by their bits."""
    shown = [row for row in rows if row.name in NAMED]
    cells = [
        (
            row.name,
            *("" if (size := getattr(row, name)) is None else str(size) for name in SIZES),
            f"{row.bits:.2f}",
            f"{row.qsnr:.2f}",
            "" if row.bound is None else f"{row.bound:.2f}",
            "yes" if row.frontier else "",
        )
        for row in sorted(shown, key=lambda row: (row.bits, row.qsnr))
    ]
    title = f"Named formats; {sum(row.frontier for row in rows)} of {len(rows)} formats are on the frontier"
    return _table(title, ("format", *SIZES, "bits", "QSNR dB", "bound dB", "frontier"), cells)


def sweeps_table(rows: Sequence[FormatRow]) -> Table:
    """For MX9, MX6 and MX4: what one other size changes."""
    bases = [next(row for row in rows if row.name == name) for name in BASES]
    cells = []
    for field in FIELDS:
        for same_size in zip(*(sweep(rows, base, field) for base in bases), strict=True):
            changes = [f"{row.qsnr - base.qsnr:+.2f}" for row, base in zip(same_size, bases, strict=True)]
            more = same_size[0].bits - bases[0].bits
            cells.append((f"{field} = {getattr(same_size[0], field)}", f"{more:+.3f}", *changes))
    return _table("One size changed: dB and bits more", ("size", "bits", *BASES), cells)


def layers_table(rows: Sequence[MatrixRow], what: Measured) -> Table:
    """The least QSNR of a matrix in each layer, by format."""
    formats = list(rows[0].weights)
    cells = [
        (layer, *(f"{least[name]:.2f}" for name in formats)) for layer, least in least_by_layer(rows, what).items()
    ]
    return _table(f"Least QSNR in dB, {what}", ("layer", *formats), cells)


def acceptance_table(rows: Sequence[AcceptanceRow]) -> Table:
    """A row for each drafter and format."""
    samplings = list(dict.fromkeys(row.draft_sampling for row in rows))
    cells = []
    for (drafter, _, format), alike in groupby(rows, key=lambda row: (row.drafter, row.model, row.format)):
        lengths = [f"{row.acceptance_length:.3f}" for row in alike]
        cells.append((drafter, format or "as it is", *lengths))
    activations = ", activations too" if rows[-1].activations else ""
    return _table(
        f"Predicted acceptance length, k = {rows[0].draft_tokens}{activations}",
        ("drafter", "weights in", *(f"{sampling} drafts" for sampling in samplings)),
        cells,
    )


def _table(title: str, columns: Sequence[str], cells: Iterable[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0))
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=True)
    for row in cells:
        table.add_row(*row)
    return table
