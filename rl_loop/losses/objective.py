"""The objective's configuration: which loss, which correction, and what each takes unless told. Imports no torch."""

from typing import Any, Literal

from pydantic import Field, model_validator

from drafters.settings import Section

LossName = Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo"]
Average = Literal["token", "sequence", "constant"]
CorrectionKind = Literal["none", "decoupled", "truncated", "icepop", "sequence_mask"]

LOSS_DEFAULTS: dict[LossName, dict[str, Any]] = {
    "grpo": {"clip_low": 0.2, "clip_high": 0.2, "loss_average": "token"},
    "dr_grpo": {"clip_low": 0.2, "clip_high": 0.2, "loss_average": "constant", "normalise_advantages": False},
    "dapo": {"clip_low": 0.2, "clip_high": 0.28, "loss_average": "token", "dynamic_sampling": True},
    "gspo": {"clip_low": 3e-4, "clip_high": 4e-4, "loss_average": "sequence"},
    "cispo": {"clip_low": 1.0, "clip_high": 0.28, "loss_average": "token"},
}
"""the papers' own, for what a configuration leaves out"""

BOUNDS: dict[CorrectionKind, tuple[float, float]] = {
    "none": (0.0, float("inf")),
    "decoupled": (0.0, float("inf")),
    "truncated": (0.0, 2.0),
    "icepop": (0.5, 5.0),
    "sequence_mask": (0.9, 1.1),
}


class CorrectionConfig(Section):
    """For the difference between the policy that sampled a token and the one that is trained on it."""

    kind: CorrectionKind = "none"
    """decoupled: weigh by trained over sampling policy; truncated: the same up to `high`; icepop: the same, 0 outside
    of `low` to `high`; sequence_mask: 0 for responses whose geometric mean ratio lies outside"""
    tokens: Literal["off_policy", "all"] = "off_policy"
    """off_policy: only tokens of older weight versions; all: also for the engine's and the trainer's numerics"""
    proximal: Literal["recomputed", "sampling"] = "recomputed"
    """what the clipped ratio is taken to: the policy before the step (the decoupled objective), or the sampling one"""
    low: float = Field(default=0.0, ge=0.0)
    """bound of the ratio; the kind's own when not given"""
    high: float = Field(default=float("inf"), gt=0.0)
    """bound of the ratio; the kind's own when not given"""

    @model_validator(mode="after")
    def _bounds(self) -> "CorrectionConfig":
        low, high = BOUNDS[self.kind]
        if "low" not in self.model_fields_set:
            self.low = low
        if "high" not in self.model_fields_set:
            self.high = high
        if self.low >= self.high:
            raise ValueError(f"low, {self.low}, must be below high, {self.high}")
        if self.proximal == "sampling" and self.kind in ("decoupled", "truncated"):
            raise ValueError(f'proximal = "sampling" leaves kind = "{self.kind}" nothing to weigh: choose another kind')
        return self
