"""The Eagle3 head (arXiv 2503.01840): one Llama block over the next token and three fused hidden states of the policy.

The module computes what vLLM's `llama_eagle3.py` computes, with the variants `norm_before_residual`, `norm_before_fc`,
`fc_norm` and `norm_output`. At the first draft step, the hidden state is `fc` of the policy's hidden states. At later
steps it is the head's own hidden state before `norm`. The embedding is the policy's. The output head is the drafter's
own, over an optional reduced vocabulary.
"""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding

from drafters.learners.layouts import read_eagle3
from drafters.learners.learner import DrafterLearner, OutputHead, PolicyOutputs
from drafters.learners.unroll import unroll
from drafters.registry import HeadShape

NOT_TRAINED = ("t2d", "embed_tokens.weight")
"""tensors of a checkpoint that are kept unchanged"""


def frequent_tokens(texts: Iterable[list[int]], size: int, vocab_size: int) -> list[int]:
    """The `size` most frequent token ids, ascending; ties go to the lower id. Other tokens are never drafted."""
    counts = Counter(token for text in texts for token in text)
    return sorted(sorted(range(vocab_size), key=lambda token: -counts[token])[:size])


def default_layers(policy_layers: int) -> tuple[int, ...]:
    """vLLM's ids (2, N / 2, N - 3). In a shallow policy these collide, and the ids are thirds of its depth instead."""
    usual = (2, policy_layers // 2, policy_layers - 3)
    return usual if 2 < usual[1] < usual[2] else tuple(policy_layers * i // 3 for i in (1, 2, 3))


def eagle3_config(
    policy: PreTrainedModel, layers: tuple[int, ...], vocabulary_size: int, intermediate_size: int = 0
) -> LlamaConfig:
    """The head's `config.json`: the policy's width and heads, and the keys that vLLM reads.

    `intermediate_size` 0 stands for twice the policy's width.
    """
    config: Any = policy.config
    read_by_vllm: dict[str, Any] = {
        "draft_vocab_size": vocabulary_size,
        # Always given, because vLLM's default ids collide on a shallow policy.
        "eagle_aux_hidden_state_layer_ids": list(layers),
        "num_aux_hidden_states": len(layers),
    }
    return LlamaConfig(
        architectures=["LlamaForCausalLMEagle3"],
        num_hidden_layers=1,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=intermediate_size or 2 * config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        rms_norm_eps=getattr(config, "rms_norm_eps", 1e-6),  # the head's own; Nemotron-H's has another name
        max_position_embeddings=config.max_position_embeddings,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        **read_by_vllm,
    )


class Eagle3Layer(nn.Module):
    """A Llama block whose attention reads the embedding and the hidden state, concatenated."""

    def __init__(self, config: Any):
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.norm_before_residual = getattr(config, "norm_before_residual", False)
        self.input_layernorm = LlamaRMSNorm(width, eps=eps)
        self.hidden_norm = LlamaRMSNorm(width, eps=eps)
        self.self_attn = LlamaAttention(config, layer_idx=0)
        for name in ("q_proj", "k_proj", "v_proj"):
            of_llama = getattr(self.self_attn, name)
            bias = of_llama.bias is not None
            setattr(self.self_attn, name, nn.Linear(2 * width, of_llama.out_features, bias=bias))
        self.post_attention_layernorm = LlamaRMSNorm(width, eps=eps)
        self.mlp = LlamaMLP(config)

    def forward(self, embedded_BTD: Tensor, hidden_BTD: Tensor, **attention) -> Tensor:
        normed_BTD = self.hidden_norm(hidden_BTD)
        both = torch.cat([self.input_layernorm(embedded_BTD), normed_BTD], dim=-1)
        residual_BTD = normed_BTD if self.norm_before_residual else hidden_BTD
        hidden_BTD = residual_BTD + self.self_attn(both, **attention)[0]
        return hidden_BTD + self.mlp(self.post_attention_layernorm(hidden_BTD))


class Eagle3Head(DrafterLearner):
    """`config` as from `eagle3_config`; `vocabulary` lists the ids that can be drafted, ascending (None: all)."""

    kind = "eagle3"
    d2t: Tensor

    def __init__(self, config: Any, vocabulary: list[int] | None):
        super().__init__()
        config._attn_implementation = "sdpa"
        self.config = config
        self.policy_layers = tuple(config.eagle_aux_hidden_state_layer_ids)
        width, eps, count = config.hidden_size, config.rms_norm_eps, len(self.policy_layers)
        policy_width = getattr(config, "target_hidden_size", None) or width
        self.input_norm = (
            LlamaRMSNorm(count * policy_width, eps=eps) if getattr(config, "norm_before_fc", False) else None
        )
        self.fc_norm = (
            nn.ModuleList(LlamaRMSNorm(policy_width, eps=eps) for _ in range(count))
            if getattr(config, "fc_norm", False)
            else None
        )
        self.fc = nn.Linear(count * policy_width, width, bias=False)
        self.midlayer = Eagle3Layer(config)
        self.norm = LlamaRMSNorm(width, eps=eps)
        self.lm_head = nn.Linear(width, config.vocab_size if vocabulary is None else len(vocabulary), bias=False)
        self.rotary = LlamaRotaryEmbedding(config)
        # The checkpoint holds offsets: policy id = draft id + d2t[draft id]. vLLM expects none for a whole vocabulary.
        if vocabulary is not None:
            self.register_buffer("d2t", torch.tensor(vocabulary) - torch.arange(len(vocabulary)))
        self.layer_name = "midlayer."
        self.not_trained: dict[str, Tensor] = {}
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=config.initializer_range)

    @classmethod
    def new(cls, policy: PreTrainedModel, shape: HeadShape, texts: Iterable[list[int]]) -> Self:
        """A new head. Its reduced vocabulary holds the most frequent tokens of `texts`."""
        of_policy: Any = policy.config
        depth, size = of_policy.num_hidden_layers, shape.vocabulary_size
        layers = tuple(sorted(shape.policy_layers)) or default_layers(depth)
        if len(set(layers)) != len(layers) or not all(0 <= i <= depth for i in layers):
            raise ValueError(f"head.policy_layers: {list(layers)} must be different ids from 0 to {depth}")
        reduced = frequent_tokens(texts, size, of_policy.vocab_size) if 0 < size < of_policy.vocab_size else None
        return cls.from_policy(policy, layers, reduced, shape.intermediate_size)

    @classmethod
    def from_policy(
        cls,
        policy: PreTrainedModel,
        layers: tuple[int, ...],
        vocabulary: list[int] | None,
        intermediate_size: int = 0,
    ) -> Self:
        """A new head. Its output head starts with the policy's rows for the tokens of `vocabulary`."""
        size = policy.config.vocab_size if vocabulary is None else len(vocabulary)
        head = cls(eagle3_config(policy, layers, size, intermediate_size), vocabulary)
        policy_head: Any = policy.get_output_embeddings()
        head.lm_head.weight.data.copy_(policy_head.weight if vocabulary is None else policy_head.weight[vocabulary])
        return head

    @classmethod
    def from_folder(cls, folder: Path, policy: PreTrainedModel) -> Self:
        """The head in `folder`, in either layout of drafters/learners/layouts.py."""
        config, vocabulary, tensors = read_eagle3(folder, policy)
        head = cls(config, vocabulary)
        try:
            head.load_checkpoint(tensors)
        except RuntimeError as error:
            raise ValueError(f"{folder}: {error}") from error
        return head

    @property
    def vocabulary(self) -> Tensor | None:
        """The ids that can be drafted, ascending; None for all."""
        if not hasattr(self, "d2t"):
            return None
        return self.d2t + torch.arange(len(self.d2t), device=self.d2t.device)

    def draft_states(self, tokens_BT: Tensor, policy: PolicyOutputs, steps: int) -> list[Tensor]:
        def step(
            tokens_BT: Tensor, hidden_BTD: Tensor, positions_T: Tensor, mask_TK: Tensor, keys: DynamicCache
        ) -> tuple[Tensor, Tensor]:
            hidden_BTD = self.midlayer(
                self._embedded(tokens_BT, policy),
                hidden_BTD,
                position_embeddings=self.rotary(hidden_BTD, positions_T[None]),
                attention_mask=mask_TK[None, None],
                past_key_values=keys,
            )
            normed_BTD = self.norm(hidden_BTD)
            return normed_BTD, normed_BTD if getattr(self.config, "norm_output", False) else hidden_BTD

        return unroll(step, tokens_BT, self._fused(policy), steps)

    def _fused(self, policy: PolicyOutputs) -> Tensor:
        layers = list(policy.layers_BTD)
        if self.input_norm is not None:
            layers = list(self.input_norm(torch.cat(layers, dim=-1)).chunk(len(layers), dim=-1))
        if self.fc_norm is not None:
            layers = [norm(layer_BTD) for norm, layer_BTD in zip(self.fc_norm, layers, strict=True)]
        return self.fc(torch.cat(layers, dim=-1))

    def _embedded(self, tokens_BT: Tensor, policy: PolicyOutputs) -> Tensor:
        own = self.not_trained.get("embed_tokens.weight")
        return policy.embedded(tokens_BT) if own is None else nn.functional.embedding(tokens_BT, own).float()

    def output_head(self, policy: PolicyOutputs) -> OutputHead:
        return OutputHead(self.lm_head.weight, self.config.vocab_size, self.vocabulary)

    def checkpoint(self) -> dict[str, Tensor]:
        trained = {name.replace("midlayer.", self.layer_name): t for name, t in self.state_dict().items()}
        # Without the embedding: vLLM shares the policy's module, and an update would overwrite it.
        return trained | {name: t for name, t in self.not_trained.items() if not name.startswith("embed_tokens.")}

    def load_checkpoint(self, tensors: dict[str, Tensor]) -> None:
        self.layer_name = "layers.0." if any(name.startswith("layers.0.") for name in tensors) else "midlayer."
        self.not_trained = {name: t for name, t in tensors.items() if name in NOT_TRAINED}
        trained = {n.replace(self.layer_name, "midlayer."): t for n, t in tensors.items() if n not in NOT_TRAINED}
        self.load_state_dict(trained)

    def write(self, folder: Path, policy_folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
        self.config.dtype = dtype
        self.config.save_pretrained(folder)
        self.save(folder / "model.safetensors", dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> "Eagle3Head":
        """Moves and converts the untrained tensors along with the module."""
        self.not_trained = {name: fn(t) for name, t in self.not_trained.items()}
        return super()._apply(fn, recurse)
