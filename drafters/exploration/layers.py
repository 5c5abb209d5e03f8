"""The QSNR of formats on a model: of each matrix's weights, and of what it is multiplied with."""

import math
import re
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Literal

import torch
from pydantic import BaseModel
from torch import Tensor
from transformers import PreTrainedModel

from drafters.exploration.candidates import Candidate
from drafters.exploration.quantised_model import LinearInputs, eager_experts, matrices
from drafters.mx.qsnr import Qsnr

BATCH_SIZE = 64

Measured = Literal["weights", "activations"]


class MatrixRow(BaseModel):
    """A matrix, as `layers.json` has it."""

    name: str
    layer: str
    """the number of its layer; its own name if it is in none, as the output head"""
    length: int
    """elements along the axis that products sum over, and that blocks lie along"""
    weights: dict[str, float]
    """QSNR in dB by format"""
    activations: dict[str, float] = {}
    """the same of what the matrix is multiplied with; empty without prompts, and for experts that no token chose"""


@torch.no_grad()
def matrix_rows(
    model: PreTrainedModel, candidates: Sequence[Candidate], keep: Sequence[str], texts: Sequence[Sequence[int]]
) -> list[MatrixRow]:
    """A row for each matrix, in the model's order. `texts`: token ids, which the model reads."""
    weights = matrices(model, keep)
    rows = {
        name: MatrixRow(
            name=name,
            layer=layer_of(name),
            length=weight.shape[-1],
            weights={c.name: Qsnr().add(weight, c.quantise(weight)).db for c in candidates},
        )
        for name, weight in weights.items()
    }
    sums = {name: {c.name: Qsnr() for c in candidates} for name in rows}

    def seen(name: str, x: Tensor) -> Tensor:
        for candidate in candidates:
            sums[name][candidate.name].add(x, candidate.quantise(x))
        return x

    eager_experts(model)
    for _, alike in groupby(sorted(texts, key=len), key=len):  # padding would be measured too
        for batch_BT in torch.tensor(list(alike), device=model.device).split(BATCH_SIZE):
            with LinearInputs(weights, seen):
                model(input_ids=batch_BT, use_cache=False)
    for name, by_format in sums.items():
        rows[name].activations = {format: total.db for format, total in by_format.items() if total.signal}
    return list(rows.values())


def least_by_layer(rows: Iterable[MatrixRow], what: Measured) -> dict[str, dict[str, float]]:
    """The least QSNR among the matrices of each layer, by layer and format."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        for format, db in getattr(row, what).items():
            of_layer = found.setdefault(row.layer, {})
            of_layer[format] = min(db, of_layer.get(format, math.inf))
    return found


def layer_of(name: str) -> str:
    numbered = re.search(r"(?:^|\.)(?:layers|h)\.(\d+)\.", name)
    return numbered[1] if numbered else name
