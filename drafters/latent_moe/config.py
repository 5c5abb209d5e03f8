"""LatentMoEConfig: Qwen3-Next's configuration and the width of the latent space; and the paper's two designs.

Notation of arXiv 2601.18089: a mixture of N experts, K of them active, of width m in a model of width d. In a latent
space of width l = d / alpha, an expert has 1 / alpha of the weights. What is saved pays for more experts:

- "efficient": alpha N experts, K active. A token reads 1 / alpha of the experts' weights, at about the same quality.
- "accurate": alpha N experts, alpha K active. A token costs what it did before, and there are more combinations.

m stays what it is, because the quality depends on K m. So does d: the shared experts and the router have full width.
"""

from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import Qwen3NextConfig

MODEL_TYPE = "latent_moe"
Design = Literal["efficient", "accurate"]
LARGEST_ALPHA = 4


@strict
class LatentMoEConfig(Qwen3NextConfig):
    model_type = MODEL_TYPE

    moe_latent_size: int = 512
    """width of the latent space, under Nemotron-H's name"""

    def __post_init__(self, **more: object) -> None:
        super().__post_init__(**more)
        for field in ("moe_latent_size", "num_experts", "num_experts_per_tok"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}: {getattr(self, field)} is below 1")
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok: {self.num_experts_per_tok} of num_experts = {self.num_experts} cannot be active"
            )


def latent_design(mixture: Qwen3NextConfig, design: Design, alpha: int, force: bool = False) -> LatentMoEConfig:
    """The configuration that `design` makes of a standard mixture.

    Raises ValueError unless `alpha` divides the width. Above 4 it is refused too, unless `force`: below a width of its
    own, which the paper calls the effective rank, a latent space loses what the experts need.
    """
    if mixture.num_experts < 1:
        raise ValueError(f"num_experts: {mixture.num_experts}; a design needs a mixture of experts")
    if alpha < 2 or mixture.hidden_size % alpha:
        raise ValueError(f"alpha: {alpha} must be 2 or more and divide hidden_size = {mixture.hidden_size}")
    if alpha > LARGEST_ALPHA and not force:
        raise ValueError(
            f"alpha: {alpha} is above {LARGEST_ALPHA}. The paper finds no loss up to 4, and worse models at 8, because "
            "the latent space is then narrower than the experts' effective rank; force=True tries it all the same"
        )
    fields = mixture.to_dict() | {
        "model_type": MODEL_TYPE,
        "architectures": ["LatentMoEForCausalLM"],
        "moe_latent_size": mixture.hidden_size // alpha,
        "num_experts": alpha * mixture.num_experts,
        "num_experts_per_tok": mixture.num_experts_per_tok * (alpha if design == "accurate" else 1),
    }
    return LatentMoEConfig.from_dict(fields)
