"""LatentMoE: a policy whose routed experts work in a latent space. Importing it registers it with transformers.

The family is that of arXiv 2601.18089, on Qwen3-Next's attention blocks. Nemotron-3 Super and Ultra have the same
experts in Nemotron-H's blocks.

    config.py   the configuration, and the paper's two designs
    model.py    the model, as transformers has others

vLLM's side is rollout_service/vllm_plugin/models/latent_moe.py.
"""

from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

from drafters.latent_moe.config import MODEL_TYPE, LatentMoEConfig
from drafters.latent_moe.model import LatentMoEDecoderLayer, LatentMoEForCausalLM

# Checkpoints hold each expert's matrices apart, as those of Qwen3-Next do.
register_checkpoint_conversion_mapping(MODEL_TYPE, get_checkpoint_conversion_mapping("qwen3_next"), overwrite=True)
AutoConfig.register(MODEL_TYPE, LatentMoEConfig, exist_ok=True)
AutoModelForCausalLM.register(LatentMoEConfig, LatentMoEForCausalLM, exist_ok=True)

__all__ = ["MODEL_TYPE", "LatentMoEConfig", "LatentMoEDecoderLayer", "LatentMoEForCausalLM"]
