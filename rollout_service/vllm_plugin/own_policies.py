"""Own policies: the families that this project adds to those which vLLM serves, and their MTP heads.

vLLM finds the MTP head of a policy by the policy's `model_type`, in a function that knows its own families only.
"""

from typing import Any

from rollout_service.vllm_plugin.patch import Patch

NAME = "vllm.config.speculative.SpeculativeConfig.hf_config_override"
MODELS = "rollout_service.vllm_plugin.models.latent_moe"


def register_own_policies() -> None:
    """Makes `latent_moe` known to transformers and to vLLM, in this process."""
    from vllm import ModelRegistry

    import drafters.latent_moe  # noqa: F401

    for name in ("LatentMoEForCausalLM", "LatentMoEMTP"):
        ModelRegistry.register_model(name, f"{MODELS}:{name}")


def know_own_mtp_heads() -> None:
    from vllm.config.speculative import SpeculativeConfig

    stock = SpeculativeConfig.hf_config_override

    def hf_config_override(hf_config: Any) -> Any:
        if hf_config.model_type != "latent_moe":
            return stock(hf_config)
        hf_config.model_type = "qwen3_next_mtp"  # of which vLLM knows the number of layers and their attention
        hf_config.update({"n_predict": hf_config.num_nextn_predict_layers, "architectures": ["LatentMoEMTP"]})
        return hf_config

    SpeculativeConfig.hf_config_override = staticmethod(hf_config_override)  # type: ignore[method-assign]


def finds_the_head() -> bool:
    """A latent_moe policy's head is this project's own."""
    from transformers import PreTrainedConfig
    from vllm.config.speculative import SpeculativeConfig

    config: Any = PreTrainedConfig(architectures=["LatentMoEForCausalLM"])
    config.model_type, config.num_nextn_predict_layers = "latent_moe", 1
    return SpeculativeConfig.hf_config_override(config).architectures == ["LatentMoEMTP"]


OWN_MTP_HEADS = Patch(
    NAME,
    "it does not know the MTP head of a latent_moe policy",
    when="in each of vLLM's processes when the plugin is loaded",
    unneeded="vLLM serves latent_moe policies and their heads itself",
    apply=know_own_mtp_heads,
    is_right=finds_the_head,
    relies_on={NAME: "hf_config"},
)
