"""Eagle3 (arXiv 2503.01840): one decoder layer over fused hidden states of three layers of the policy."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from drafters.drafter import Drafter
from drafters.files.model_folder import resolve_model
from drafters.policy_costs import Costs, DraftCosts, attention, feed_forward, linear
from drafters.settings import Section

VARIANTS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
LAYERS = "eagle_aux_hidden_state_layer_ids"
"""keys of config.json: the variants of a head, and the ids of the hidden states that it reads"""


def is_speculators(config: Mapping[str, Any]) -> bool:
    """Whether a config.json has the layout of the speculators library. If not, it has SpecForge's."""
    return "speculators_model_type" in config


def default_variants(config: Mapping[str, Any]) -> dict[str, bool]:
    """The variants that are on unless config.json says otherwise.

    speculators sets norm_before_residual to True by default. vLLM sets it to False
    (transformers_utils/configs/speculators/algos.py).
    """
    return {"norm_before_residual": True} if is_speculators(config) else {}


class Eagle3Shape(Section):
    policy_layers: list[int] = Field(default_factory=list)
    """eagle3: ids of the policy's hidden states that the head reads (0: embeddings, N: output of the last of N layers);
    if empty, vLLM's default ids, or thirds of a shallow policy's layers"""
    vocabulary_size: int = Field(default=0, ge=0)
    """eagle3: number of tokens that can be drafted, the most frequent ones in the data; 0 for all"""
    intermediate_size: int = Field(default=0, ge=0)
    """eagle3: width of the feed-forward layer; 0 for twice the policy's hidden size"""


class Eagle3Drafter(Drafter):
    kind = "eagle3"
    has_folder = True
    shape = Eagle3Shape

    def speculative_config(self) -> dict[str, Any] | None:
        return self._sampled("eagle3", model=self._model())

    def owns(self, name: str) -> bool:
        # The checkpoint may hold the embedding, but vLLM shares the policy's module: an update would overwrite that.
        return not name.startswith("embed_tokens.")

    def checkpoint(self, policy: Path) -> Path | None:
        return Path(self._model())

    def costs(self, policy: Any) -> DraftCosts:
        """Hidden states of the policy are fused in the first pass only. A copy of the policy's embedding in the head's
        checkpoint is not counted."""
        return head_costs(read_eagle3_config(resolve_model(self._model(), "drafter.model"), policy.num_hidden_layers))

    @classmethod
    def recognised(cls, config: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, Any] | None:
        architectures = config.get("architectures") or []
        if config.get("speculators_model_type") != cls.kind and not any("Eagle3" in name for name in architectures):
            return None
        of_eagle, defaults = config.get("eagle_config") or {}, default_variants(config)
        return {
            "layout": "speculators" if is_speculators(config) else "SpecForge",
            "policy layers read": config.get(LAYERS) or of_eagle.get(LAYERS) or "vLLM's default: 2, N/2, N-3",
            "tokens it can draft": config.get("draft_vocab_size") or "all",
            "variants": ", ".join(v for v in VARIANTS if config.get(v, defaults.get(v))) or "none",
            "also holds": ", ".join(sorted({"d2t", "t2d", "embed_tokens.weight"} & set(sizes))) or "nothing",
        }


def read_eagle3_config(folder: Path, policy_layers: int) -> Any:
    """The head's configuration in either layout of drafters/learners/layouts.py, with vLLM's defaults filled in.

    Raises ValueError for a head that is not supported.
    """
    from transformers import LlamaConfig

    from drafters.files.checkpoint_folder import read_config

    published = read_config(folder)
    kind = published.get("speculators_model_type", Eagle3Drafter.kind)
    if kind != Eagle3Drafter.kind:
        raise ValueError(f"{folder} is a {kind!r} drafter, not eagle3")
    block = published["transformer_layer_config"] if is_speculators(published) else published
    if block.get("model_type", "llama") != "llama" or block.get("num_hidden_layers", 1) != 1:
        what = f"{block.get('num_hidden_layers', 1)} layers of {block.get('model_type')!r}"
        raise ValueError(f"{folder}: only Eagle3 heads of one Llama layer can be trained; this head has {what}")
    if published.get("logit_scale", 1.0) != 1.0:
        raise ValueError(f"{folder}: logit_scale {published['logit_scale']} is not supported")
    config: Any = LlamaConfig(**{key: value for key, value in block.items() if key not in ("model_type", "dtype")})
    config.architectures = ["LlamaForCausalLMEagle3"]
    config.draft_vocab_size = published.get("draft_vocab_size") or config.vocab_size
    config.target_hidden_size = published.get("target_hidden_size") or config.hidden_size
    of_eagle = published.get("eagle_config") or {}
    defaults = default_variants(published)
    for variant in VARIANTS:
        default = published.get(variant, defaults.get(variant, False))
        setattr(config, variant, bool(of_eagle.get(variant, default)))
    usual = (2, policy_layers // 2, policy_layers - 3)
    layers = published.get(LAYERS) or of_eagle.get(LAYERS) or usual
    setattr(config, LAYERS, list(layers))
    config.num_aux_hidden_states = len(layers)
    return config


def head_costs(config: Any) -> DraftCosts:
    """Of a head with the configuration that `read_eagle3_config` gives."""
    width, fused = config.hidden_size, config.num_aux_hidden_states * config.target_hidden_size
    fusion = linear(fused, width) + Costs(vectors=fused * (config.norm_before_fc + config.fc_norm))
    later = (
        attention(config, inputs=2 * width, bias=config.attention_bias)
        + feed_forward(width, config.intermediate_size, config.mlp_bias)
        + linear(width, config.draft_vocab_size)
        + Costs(vectors=4 * width)
    )
    return DraftCosts(fusion + later, later)
