"""Multi-token prediction: a layer in the policy's own checkpoint that shares the policy's embedding and output head."""

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from drafters.drafter import Drafter
from drafters.policy_costs import Costs, DraftCosts, cost_facts, linear, nemotron_h_layer, qwen3_next_layer


def is_mtp(name: str) -> bool:
    """Whether a tensor of the policy's checkpoint belongs to its MTP layers (Qwen3-Next and MiMo names)."""
    return name.startswith(("mtp.", "model.mtp_layers."))


def missing_modules(tensors: Collection[str]) -> list[str]:
    """The modules that a head of Qwen3-Next or LatentMoE needs and the checkpoint lacks.

    A head needs four modules of its own, and a layer with every module of the policy's last full-attention layer. vLLM
    0.32 does not notice that a linear layer has no weights (default_loader.py, `track_weights_loading`).
    """
    weights = _modules(name for name in tensors if name.endswith(".weight"))  # a quantised policy's scales are left out
    layers = [re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module) for module in weights]
    full = {int(found[1]) for found in layers if found and found[2].startswith("self_attn.")}
    of_layer = {found[2] for found in layers if found and int(found[1]) == max(full, default=-1)}
    needed = {f"mtp.{name}" for name in ("fc", "norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")}
    return sorted((needed | {f"mtp.layers.0.{name}" for name in of_layer}) - _modules(tensors))


def missing_of_nemotron_h(policy_config: Mapping[str, Any], tensors: Collection[str]) -> list[str]:
    """The same of a Nemotron-H head: by default a layer of attention and one of experts. Each has every module of the
    policy's last layer of its type. Three modules stand before them, and a norm after."""
    types = policy_config.get("mtp_layers_block_type") or policy_config.get("mtp_hybrid_override_pattern") or "*E"
    layers = [re.fullmatch(r"backbone\.layers\.(\d+)\.(.+)", module) for module in _modules(tensors)]
    needed = {f"mtp.layers.0.{name}" for name in ("enorm", "hnorm", "eh_proj")}
    needed.add(f"mtp.layers.{len(types) - 1}.final_layernorm")
    for index, layer_type in enumerate(types):
        mark = "mixer.experts" if layer_type in ("E", "moe") else "mixer.q_proj"
        like = max((int(found[1]) for found in layers if found and found[2] == mark), default=-1)
        needed |= {f"mtp.layers.{index}.{found[2]}" for found in layers if found and int(found[1]) == like}
    return sorted(needed - _modules(tensors))


def _modules(names: Iterable[str]) -> set[str]:
    """The modules that hold these tensors. A layer's experts, fused or not, count as one module."""
    return {re.sub(r"\.experts\..*", ".experts", name.rpartition(".")[0]) for name in names}


class MTPDrafter(Drafter):
    kind = "mtp"

    def speculative_config(self) -> dict[str, Any] | None:
        return self._sampled("mtp")

    def owns(self, name: str) -> bool:
        return is_mtp(name)

    def checkpoint(self, policy: Path) -> Path | None:
        return policy

    def costs(self, policy: Any) -> DraftCosts:
        """The policy's output head multiplies each of its tokens too, and belongs to the policy."""
        head = head_costs(policy)
        return DraftCosts(head, head)

    @classmethod
    def recognised(cls, config: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, Any] | None:
        own = [size for name, size in sizes.items() if is_mtp(name)]
        if not own:
            return None
        head = {"kind": "mtp (a policy with a head)", "head tensors": len(own), "head parameters": f"{sum(own):,}"}
        return head | cost_facts(config)

    def check(self, policy_config: dict[str, Any], own_config: dict[str, Any] | None, tensors: Collection[str]) -> None:
        if not (policy_config.get("num_nextn_predict_layers") or policy_config.get("mtp_num_hidden_layers")):
            raise ValueError(
                f"drafter.kind: 'mtp' needs a policy with an MTP layer in its checkpoint, but "
                f"{policy_config.get('architectures')} declares none (num_nextn_predict_layers)"
            )
        if not any(map(is_mtp, tensors)):
            raise ValueError(
                "drafter.kind: 'mtp' needs the head's tensors (mtp.*) in the policy's checkpoint: its config.json "
                "declares an MTP layer, and its files hold none. Serve a folder that holds the head, or train a head "
                "with `drafters train --kind mtp`"
            )
        architecture, missing = policy_config.get("model_type"), list[str]()
        if architecture in ("qwen3_next", "latent_moe"):
            missing = missing_modules(tensors)
        elif architecture == "nemotron_h":
            missing = missing_of_nemotron_h(policy_config, tensors)
        if missing:
            raise ValueError(
                f"drafter.kind: 'mtp' needs the whole head in the policy's checkpoint, but its files lack "
                f"{', '.join(missing)}: an engine would draft with uninitialised memory in their place"
            )


def head_costs(policy: Any) -> Costs:
    width = policy.hidden_size
    match policy.model_type:
        case "qwen3_next" | "latent_moe":
            layers = [qwen3_next_layer(policy, "full_attention")]
        case "nemotron_h":
            layers = [nemotron_h_layer(policy, kind) for kind in policy.mtp_layers_block_type]
        case other:
            raise ValueError(f"no formulas for the MTP head of {other!r}")
    ends = linear(2 * width, width) + Costs(vectors=3 * width, borrowed=policy.vocab_size * width)
    return sum(layers, ends)
