"""RecomputationConfig: where and how transformers recomputes the exact distributions. Imports no torch."""

from typing import Literal

from pydantic import Field

from drafters.settings import Section


class RecomputationConfig(Section):
    """The forward passes of transformers that samples are tested against."""

    device: str = Field(default="cpu", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    """auto: cuda if there is a GPU, else cpu. An engine on the same GPU needs room beside it: lower
    engine.gpu_memory_utilization, since the recomputation is loaded first"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """dtype of weights and matrix products; logits are scored in float32. bfloat16 takes half of the memory, and its
    rounding adds to every difference"""
