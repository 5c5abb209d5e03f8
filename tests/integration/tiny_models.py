"""Tiny models: random policies of every supported architecture and their drafters, with clearly different outputs."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    NemotronHConfig,
    NemotronHForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)
from transformers.core_model_loading import revert_weight_conversion

from drafters.latent_moe import LatentMoEConfig, LatentMoEForCausalLM
from drafters.learners.eagle3_head import Eagle3Head
from drafters.learners.mtp_head import LAYERS, MTPHead
from drafters.registry import DrafterConfig

VOCAB = 128
DENSE = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "head_dim": 32,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256, "eos_token_id": 1,
    "bos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
NEXT = DENSE | {
    "layer_types": ["full_attention"] * 3, "mlp_only_layers": [], "num_experts": 4, "num_experts_per_tok": 4,
    "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64, "num_nextn_predict_layers": 1,
    "tie_word_embeddings": False, "partial_rotary_factor": 1.0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
}  # fmt: skip
LATENT = NEXT | {"num_experts": 8, "num_experts_per_tok": 3, "moe_latent_size": 32}
NEMOTRON = {
    "vocab_size": VOCAB, "hidden_size": 64, "layers_block_type": ["full_attention", "moe"] * 2, "head_dim": 32,
    "num_attention_heads": 2, "num_key_value_heads": 1, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_latent_size": 32, "moe_intermediate_size": 64, "moe_shared_expert_intermediate_size": 64,
    "routed_scaling_factor": 1.5, "num_nextn_predict_layers": 1, "max_position_embeddings": 256, "eos_token_id": 1,
    "bos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
MAMBA = NEMOTRON | {
    "layers_block_type": ["linear_attention", "full_attention", "linear_attention", "mlp"], "intermediate_size": 128,
    "mamba_num_heads": 4, "mamba_head_dim": 32, "ssm_state_size": 16, "n_groups": 2, "num_nextn_predict_layers": 0,
}  # fmt: skip
"""Nemotron-H with recurrent layers, for which an engine on a CPU cannot draft"""
POLICIES = {
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**DENSE, tie_word_embeddings=False)),
    "qwen3_tied": lambda: Qwen3ForCausalLM(Qwen3Config(**DENSE, tie_word_embeddings=True)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**DENSE, tie_word_embeddings=False)),
    "qwen3_next": lambda: Qwen3NextForCausalLM(Qwen3NextConfig(**NEXT)),
    "latent_moe": lambda: LatentMoEForCausalLM(LatentMoEConfig(**LATENT)),
    "nemotron_h": lambda: NemotronHForCausalLM(NemotronHConfig(**NEMOTRON)),
    "mamba": lambda: NemotronHForCausalLM(NemotronHConfig(**MAMBA)),
}
DRAFTERS = ("none", "ngram", "draft_model", "eagle3")
WITH_HEAD = ("qwen3_next", "latent_moe", "nemotron_h")
PAIRS = [(policy, drafter) for policy in POLICIES if policy != "mamba" for drafter in DRAFTERS]
PAIRS += [(policy, "mtp") for policy in WITH_HEAD]
EACH_ONCE = [("qwen3", "eagle3"), ("qwen3_tied", "draft_model"), ("llama", "ngram"), ("qwen3_next", "none"),
             ("qwen3_next", "mtp"), ("latent_moe", "mtp"), ("nemotron_h", "mtp")]  # fmt: skip
"""pairs that contain every policy and every drafter"""


def random_policy(name: str, seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    model = POLICIES[name]().float().eval()
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, std=0.15)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            torch.nn.init.normal_(buffer, std=0.3)
    return model


def mtp_head(policy: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The tensors of an MTP head, by their names in a checkpoint, that begins as a block of the policy."""
    if policy.config.model_type in LAYERS:
        return MTPHead.from_policy(policy).checkpoint()
    own = revert_weight_conversion(policy, dict(policy.state_dict()))
    width = policy.config.hidden_size
    head = {f"mtp.layers.0.{name}.weight": torch.ones(width) for name in ("enorm", "hnorm")}
    head["mtp.layers.0.eh_proj.weight"] = torch.randn(width, 2 * width) * 0.15
    head["mtp.layers.1.final_layernorm.weight"] = own["backbone.norm_f.weight"]
    for layer in (0, 1):  # attention and experts
        of_policy = f"backbone.layers.{layer}."
        head |= {
            f"mtp.layers.{layer}.{n.removeprefix(of_policy)}": t for n, t in own.items() if n.startswith(of_policy)
        }
    return {name: tensor.clone() for name, tensor in head.items()}


def save_policy(name: str, seed: int, folder: Path, tokenizer: Path) -> PreTrainedModel:
    """Save a random policy (with an MTP head where it declares one) and a tokenizer; returns the policy."""
    model = random_policy(name, seed)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    if name in WITH_HEAD:
        file = folder / "model.safetensors"
        save_file(load_file(file) | mtp_head(model), file, metadata={"format": "pt"})
    return model


def save_drafter(kind: str, policy: PreTrainedModel, seed: int, folder: Path) -> DrafterConfig:
    """Save a random drafter for `policy` (for mtp only the head's tensors). Returns its configuration."""
    torch.manual_seed(seed)
    folder.mkdir(exist_ok=True)
    if kind == "eagle3":
        head = Eagle3Head.from_policy(policy, layers=(0, 1, 3), vocabulary=list(range(64)))
        head.config.save_pretrained(folder)
        head.save(folder / "model.safetensors", torch.float32)
    elif kind == "draft_model":
        random_policy("qwen3", seed).save_pretrained(folder)
    elif kind == "mtp":
        save_file(mtp_head(policy), folder / "model.safetensors", metadata={"format": "pt"})
    model = str(folder) if kind in ("eagle3", "draft_model") else None
    return DrafterConfig(kind=kind, model=model, draft_tokens=3)
