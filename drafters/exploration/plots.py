"""The plots that `drafters formats` writes."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from drafters.exploration.candidates import NAMED
from drafters.exploration.layers import MatrixRow, Measured, least_by_layer
from drafters.exploration.rows import FormatRow, sweep
from drafters.exploration.tables import BASES, FIELDS

MOST_BITS = 10.2
MEANING = {
    "d2": "d2, bits of the sub-block's shift\n(second line: bits more an element)",
    "k2": "k2, elements of a sub-block\n(second line: bits more an element)",
    "k1": "k1, elements of a block\n(second line: bits more an element)",
}


def plot_formats(file: Path, rows: Sequence[FormatRow]) -> None:
    """QSNR by bits: the grid, the frontier with the theorem's bound, and the named formats."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    shown = [row for row in rows if row.bits <= MOST_BITS]
    grid = [row for row in shown if row.name not in NAMED]
    axes.plot(*_points(grid), ".", color="0.75", markersize=4, label="block formats of the grid")
    frontier = sorted((row for row in shown if row.frontier), key=lambda row: row.bits)
    axes.plot(*_points(frontier), "-", color="C0", linewidth=1, label="frontier")
    bounds = [(row.bits, row.bound) for row in frontier if row.bound is not None]
    axes.plot(
        *zip(*bounds, strict=True), "_", color="C0", markersize=5, label="the theorem's lower bound on the frontier"
    )
    kinds = (
        ("MX", "MX", "o", "C3"),
        ("MSFP", "MSFP, no sub-scale", "s", "C2"),
        ("INT", "integers, a float32 scale a block", "^", "C1"),
        ("E", "float8, one scale", "D", "C4"),
    )
    for prefix, label, marker, colour in kinds:
        of_kind = [row for row in shown if row.name in NAMED and row.name.startswith(prefix)]
        axes.plot(*_points(of_kind), marker, color=colour, label=label, zorder=3)
        for row in of_kind:
            if row.frontier:
                place, side = (-7, 4), "right"
            else:
                place, side = ((0, -15), "center") if prefix == "MSFP" else ((7, -4), "left")
            axes.annotate(
                row.name, (row.bits, row.qsnr), textcoords="offset points", xytext=place, ha=side, fontsize=9,
                color=colour, bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5},
            )  # fmt: skip
    axes.set_xlabel("bits of an element, its share of the scales included")
    axes.set_ylabel("QSNR in dB")
    axes.set_title("Formats on normal vectors of variable variance")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left")
    figure.savefig(file, dpi=120)


def plot_sweeps(file: Path, rows: Sequence[FormatRow]) -> None:
    """What one other size changes in MX9, MX6 and MX4: dB, with the bits under each size."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    for axes, field in zip(figure.subplots(1, len(FIELDS), sharey=True), FIELDS, strict=True):
        for name, marker in zip(BASES, "os^", strict=True):
            base = next(row for row in rows if row.name == name)
            swept = sweep(rows, base, field)
            axes.plot(range(len(swept)), [row.qsnr - base.qsnr for row in swept], f"{marker}-", label=name)
        labels = [f"{getattr(row, field)}\n{row.bits - base.bits:+.3g}" for row in swept]
        axes.set_xticks(range(len(swept)), labels, fontsize=9)
        axes.set_xlabel(MEANING[field])
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("QSNR relative to the named format, dB")
    figure.axes[0].legend()
    figure.savefig(file, dpi=120)


def plot_layers(file: Path, rows: Sequence[MatrixRow]) -> None:
    """Least QSNR in each layer by format: weights as solid lines, activations as dashed ones."""
    layers = list(dict.fromkeys(row.layer for row in rows))
    figure = Figure(figsize=(max(8, min(16, 4 + 0.3 * len(layers))), 4.5), layout="constrained")
    axes = figure.subplots()
    lines: dict[Measured, str] = {"weights": "o-", "activations": "s--"}
    for what, line in lines.items():
        found = least_by_layer(rows, what)
        at = [i for i, layer in enumerate(layers) if layer in found]
        for number, name in enumerate(rows[0].weights if found else ()):
            values = [found[layers[i]][name] for i in at]
            axes.plot(at, values, line, color=f"C{number}", markersize=4, label=f"{name}, {what}")
    every = -(-len(layers) // 24)
    axes.set_xticks(range(0, len(layers), every), layers[::every])
    axes.set_xlabel("layer")
    axes.set_ylabel("least QSNR of the layer's matrices, dB")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper")
    figure.savefig(file, dpi=120)


def _points(rows: Sequence[FormatRow]) -> tuple[list[float], list[float]]:
    return [row.bits for row in rows], [row.qsnr for row in rows]
