"""Recurrent layers, such as Mamba's: an engine on a CPU cannot draft for a policy that has some.

A recurrent layer keeps a state of the whole text so far. When drafts are rejected, the layer must go back to its state
before them. What vLLM 0.32 does about that on a CPU:

- Mamba: the convolution ignores how many drafts were accepted. Log-probabilities are wrong by nats, or infinite, and
  there is no error.
- The linear attention of Qwen3-Next: right with an MTP head that drafts the same number of tokens in every step, and
  wrong in the same way with n-grams, which have steps without drafts. Schedules of draft lengths have them too.
- With prefix caching, both: the engine ends at the first request, because only a GPU has the kernel that copies states.

So such a policy is refused together with a drafter, before any engine starts.
"""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drafters.drafter import DraftSettings

if TYPE_CHECKING:
    from vllm.config import VllmConfig

RECURRENT = {"linear_attention", "hybrid", "hybrid_sliding", "conv", "mamba", "recurrent"}
"""transformers' types of layers that keep a state. It calls Mamba's layers linear attention"""


def check_drafts_are_taken_back(drafter: DraftSettings, folder: Path, device: str) -> None:
    """Raises ValueError, which says what layers there are, when an engine on `device` cannot draft for the policy in
    `folder`."""
    if device == "cpu" and drafter.drafts:
        counts = Counter(layer for layer in layer_types(folder) if layer in RECURRENT)
        if counts:
            layers = ", ".join(f"{count} of type {layer}" for layer, count in counts.items())
            raise ValueError(refusal(drafter.kind, layers))


def check_by_vllm(vllm_config: "VllmConfig", device: str) -> None:
    """The same by vLLM's own word, which knows more architectures than transformers. For an engine before it loads the
    policy."""
    model, speculative = vllm_config.model_config, vllm_config.speculative_config
    if device == "cpu" and speculative is not None and (model.is_hybrid or model.is_attention_free):
        raise ValueError(refusal(str(speculative.method), model.architecture))


def refusal(kind: str, layers: str) -> str:
    return (
        f"drafter.kind: {kind!r} cannot draft for this policy on a CPU, because it has recurrent layers ({layers}): "
        "vLLM does not take their states back there when drafts are rejected. Set drafter.kind to none, or use a GPU"
    )


def layer_types(folder: Path) -> list[str]:
    """The type of each layer, as transformers reads the checkpoint's configuration. It fills in what config.json leaves
    out. Empty for an architecture that has one type of layers only, or that transformers does not know."""
    from transformers import AutoConfig

    import drafters.latent_moe  # noqa: F401

    try:
        config: Any = AutoConfig.from_pretrained(folder).get_text_config()
    except ValueError:
        return []
    return getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or []
