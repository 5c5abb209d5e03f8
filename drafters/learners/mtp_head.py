"""The multi-token prediction head of Qwen3-Next and LatentMoE: one full-attention block.

It reads the next token and the hidden state. Its experts are what the policy's are: in a latent space for LatentMoE.

The module computes what vLLM's `qwen3_next_mtp.py` computes. At the first draft step it reads the policy's hidden state
after the final norm. At later steps it reads its own hidden state after `norm`. Embedding and output head are the
policy's: the head reads them and never trains them. The head is part of the policy's checkpoint, so `write` writes a
policy folder with the head in a file of its own.
"""

import copy
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.models.qwen3_next.modeling_qwen3_next import (
    Qwen3NextDecoderLayer,
    Qwen3NextRMSNorm,
    Qwen3NextRotaryEmbedding,
)

from drafters.files.checkpoint_folder import MTP_FILE, copy_policy, read_tensors, write_index
from drafters.kinds.mtp import is_mtp
from drafters.latent_moe import LatentMoEDecoderLayer
from drafters.learners.learner import DrafterLearner, OutputHead, PolicyOutputs
from drafters.learners.unroll import unroll
from drafters.registry import HeadShape

PREFIX = "mtp."
LAYERS = {"qwen3_next": Qwen3NextDecoderLayer, "latent_moe": LatentMoEDecoderLayer}
"""the head's layer, by the policy's `model_type`"""


class MTPHead(DrafterLearner):
    """The head of a policy with this configuration. Every layer has experts, as in all released Qwen3-Next policies.

    Raises ValueError for another architecture.
    """

    kind = "mtp"
    in_policy_folder = True

    def __init__(self, policy_config: PreTrainedConfig):
        super().__init__()
        layer = LAYERS.get(policy_config.model_type)
        if layer is None:
            raise ValueError(
                f"kind: an mtp head can be trained for a {' or '.join(LAYERS)} policy, and not for "
                f"{policy_config.model_type!r}; train eagle3 or draft_model, which fit any policy"
            )
        config: Any = copy.deepcopy(policy_config)
        config.num_hidden_layers, config.layer_types = 1, ["full_attention"]
        config._attn_implementation = "sdpa"
        width, eps = config.hidden_size, config.rms_norm_eps
        self.pre_fc_norm_hidden = Qwen3NextRMSNorm(width, eps=eps)
        self.pre_fc_norm_embedding = Qwen3NextRMSNorm(width, eps=eps)
        self.fc = nn.Linear(2 * width, width, bias=False)
        self.layers = nn.ModuleList([layer(config, layer_idx=0)])
        self.num_experts = config.num_experts
        self.norm = Qwen3NextRMSNorm(width, eps=eps)
        self.rotary = Qwen3NextRotaryEmbedding(config)

    @classmethod
    def new(cls, policy: PreTrainedModel, shape: HeadShape, texts: Iterable[list[int]]) -> Self:
        return cls.from_policy(policy)

    @classmethod
    def from_policy(cls, policy: PreTrainedModel) -> Self:
        """A new head. Block and norm start as the policy's last full-attention layer and final norm, `fc` at random."""
        head = cls(policy.config)
        decoder: Any = policy.get_decoder()
        full = [layer for layer in decoder.layers if hasattr(layer, "self_attn")]
        head.layers[0].load_state_dict(full[-1].state_dict())
        head.norm.load_state_dict(decoder.norm.state_dict())
        nn.init.normal_(head.fc.weight, std=policy.config.initializer_range)
        return head

    @classmethod
    def from_folder(cls, folder: Path, policy: PreTrainedModel) -> Self:
        head, tensors = cls(policy.config), read_tensors(folder, is_mtp)
        if not tensors:
            raise ValueError(f"{folder} holds no MTP head (no tensor `mtp.*`)")
        try:
            head.load_checkpoint(tensors)
        except (KeyError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"{folder}: the MTP head does not fit the policy: {error}") from error
        return head

    def draft_states(self, tokens_BT: Tensor, policy: PolicyOutputs, steps: int) -> list[Tensor]:
        def step(
            tokens_BT: Tensor, hidden_BTD: Tensor, positions_T: Tensor, mask_TK: Tensor, keys: DynamicCache
        ) -> tuple[Tensor, Tensor]:
            embedded_BTD = self.pre_fc_norm_embedding(policy.embedded(tokens_BT))
            hidden_BTD = self.fc(torch.cat([embedded_BTD, self.pre_fc_norm_hidden(hidden_BTD)], dim=-1))
            hidden_BTD = self.layers[0](
                hidden_BTD,
                position_embeddings=self.rotary(hidden_BTD, positions_T[None]),
                attention_mask=mask_TK[None, None],
                past_key_values=keys,
            )
            hidden_BTD = self.norm(hidden_BTD)
            return hidden_BTD, hidden_BTD

        return unroll(step, tokens_BT, policy.output_BTD, steps)

    def output_head(self, policy: PolicyOutputs) -> OutputHead:
        return policy.head

    def checkpoint(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for name, tensor in self.state_dict().items():
            if name.endswith("experts.gate_up_proj"):  # fused in transformers [E, 2 I, D], not in checkpoints
                stem = PREFIX + name.removesuffix("gate_up_proj")
                for e, fused in enumerate(tensor):
                    tensors[f"{stem}{e}.gate_proj.weight"], tensors[f"{stem}{e}.up_proj.weight"] = fused.chunk(2)
            elif name.endswith("experts.down_proj"):
                stem = PREFIX + name.removesuffix("down_proj")
                tensors |= {f"{stem}{e}.down_proj.weight": down for e, down in enumerate(tensor)}
            else:
                tensors[PREFIX + name] = tensor
        return tensors

    def load_checkpoint(self, tensors: dict[str, Tensor]) -> None:
        state = {n.removeprefix(PREFIX): t for n, t in tensors.items() if not re.search(r"\.experts\.\d+\.", n)}
        experts = "layers.0.mlp.experts."
        gate, up, down = (
            torch.stack([tensors[f"{PREFIX}{experts}{e}.{part}_proj.weight"] for e in range(self.num_experts)])
            for part in ("gate", "up", "down")
        )
        self.load_state_dict(
            state | {f"{experts}gate_up_proj": torch.cat([gate, up], dim=1), f"{experts}down_proj": down}
        )

    def write(self, folder: Path, policy_folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
        """Writes the policy of `policy_folder` with this head to `folder`, which may be `policy_folder` itself."""
        if folder.resolve() != policy_folder.resolve():
            copy_policy(policy_folder, folder, without=is_mtp, changes={"num_nextn_predict_layers": 1})
        self.save(folder / MTP_FILE, dtype)
        write_index(folder)
