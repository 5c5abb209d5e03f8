"""Draft model as a learner: a small causal language model with the policy's vocabulary, which reads only tokens."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

import drafters.latent_moe  # noqa: F401  (which transformers then knows)
from drafters.learners.learner import DrafterLearner, OutputHead, PolicyOutputs, shifted
from drafters.registry import HeadShape


def draft_model_config(policy: PreTrainedModel, hidden_size: int, layers: int) -> Qwen3Config:
    """A Qwen3 with the policy's vocabulary. Heads have 32 to 128 channels; vLLM's CPU attention needs at least 32."""
    of_policy: Any = policy.config
    head_dim = 32 if hidden_size <= 256 else 64 if hidden_size <= 1024 else 128
    heads = max(1, hidden_size // head_dim)
    return Qwen3Config(
        architectures=["Qwen3ForCausalLM"],
        vocab_size=of_policy.vocab_size,
        hidden_size=hidden_size,
        intermediate_size=-(-8 * hidden_size // 96) * 32,  # 8/3 of the width, as in Qwen3, in multiples of 32
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        head_dim=head_dim,
        max_position_embeddings=of_policy.max_position_embeddings,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=of_policy.bos_token_id,
        eos_token_id=of_policy.eos_token_id,
        pad_token_id=of_policy.pad_token_id,
    )


class DraftModel(DrafterLearner):
    kind = "draft_model"

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    @classmethod
    def new(cls, policy: PreTrainedModel, shape: HeadShape, texts: Iterable[list[int]]) -> Self:
        """A model with random weights, by default with half the policy's width."""
        hidden_size = shape.hidden_size or max(32, policy.config.hidden_size // 64 * 32)
        return cls(Qwen3ForCausalLM(draft_model_config(policy, hidden_size, shape.layers)))

    @classmethod
    def from_folder(cls, folder: Path, policy: PreTrainedModel) -> Self:
        """Loads any causal language model of transformers. Raises ValueError if its vocabulary is not the policy's."""
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        if model.config.vocab_size != policy.config.vocab_size:
            raise ValueError(
                f"{folder} has a vocabulary of {model.config.vocab_size} tokens and the policy one of "
                f"{policy.config.vocab_size}: a draft model needs the policy's tokens"
            )
        return cls(model)

    def draft_states(self, tokens_BT: Tensor, policy: PolicyOutputs, steps: int) -> list[Tensor]:
        """One forward pass gives all steps: step j reads the model's states j + 1 rows further on."""
        states_BTD = self.model.get_decoder()(input_ids=tokens_BT, use_cache=False).last_hidden_state
        return [shifted(states_BTD, j + 1) for j in range(steps)]

    def output_head(self, policy: PolicyOutputs) -> OutputHead:
        head: Any = self.model.get_output_embeddings()
        return OutputHead(head.weight, len(head.weight))

    def checkpoint(self) -> dict[str, Tensor]:
        """The tensors as `save_pretrained` writes them: without tied duplicates, and with fused experts split."""
        own = remove_tied_weights_from_state_dict(dict(self.model.state_dict()), self.model)
        return dict(revert_weight_conversion(self.model, own))

    def load_checkpoint(self, tensors: dict[str, Tensor]) -> None:
        missing, unexpected = self.model.load_state_dict(tensors, strict=False)
        self.model.tie_weights()
        tied = set(self.model.all_tied_weights_keys)
        if unexpected or set(missing) - tied:
            raise RuntimeError(f"missing tensors {sorted(set(missing) - tied)}, unexpected {sorted(unexpected)}")

    def write(self, folder: Path, policy_folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
        self.model.config.dtype = dtype
        self.model.config.save_pretrained(folder)
        AutoTokenizer.from_pretrained(policy_folder).save_pretrained(folder)
        self.save(folder / "model.safetensors", dtype)
