"""Padding of the demo's policy: a larger policy that computes the same, so that acceptance and cost are both real.

    python deploy/bench/padding.py --source deploy/demo/models --target /tmp/padded

- Width: the added dimensions of the residual stream hold zeros. A norm then divides by a root mean square that is
  smaller by s = sqrt(D' / D), so its output is larger by s, and the layers that read the output are divided by s. With
  D' = 4 D or 16 D, s is a power of two, and the division is exact in bfloat16. `rms_norm_eps` becomes eps / s^2.
- Added heads and feed-forward units read the stream and write zeros: their output projection is zero.
- Added layers follow the policy's own, and their output projections are zero.
- The MTP head shares the policy's configuration and is padded like one of its layers. The Eagle3 head is widened where
  it reads or shares the stream; it keeps its own heads and units. The draft model does not change.

Names are those of transformers' Qwen3-Next and of Eagle3 checkpoints. Weights without effect are random, because zeros
might cost less.
"""

import argparse
import json
import re
import shutil
from math import log2, sqrt
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from drafters.files.checkpoint_folder import read_config, read_tensors, write_index
from drafters.kinds.mtp import is_mtp
from drafters.settings import Section

SCALE = 0.02
"""standard deviation of the weights without effect"""


class Shape(Section):
    """Shape of the padded policy; the default has about 150 M parameters.

    Experts keep the demo's size. Most parameters are in attention and in the expert that all tokens share, because
    vLLM's kernel for experts multiplies in float32 on a CPU without AMX. With larger experts, a step would be mostly
    that kernel. Dense policies have no experts, and accelerators have fast kernels for them.
    """

    hidden_size: int = 768
    num_hidden_layers: int = 16
    num_attention_heads: int = 16
    num_key_value_heads: int = 8
    moe_intermediate_size: int = 128
    shared_expert_intermediate_size: int = 2816


class Padding:
    """Maps a policy to a larger one that computes the same function."""

    def __init__(self, config: dict[str, Any], shape: Shape):
        """Raises ValueError if `shape` cannot hold the policy, or if its width is not 4, 16, ... times the policy's."""
        for name, size in shape.model_dump().items():
            if size < config[name]:
                raise ValueError(f"{name}: {size} is less than the policy's {config[name]}")
        self.old, self.shape = config, shape
        self.scale = sqrt(shape.hidden_size / config["hidden_size"])
        if not log2(self.scale).is_integer():
            raise ValueError(f"hidden_size: {shape.hidden_size} is not 4, 16, ... times {config['hidden_size']}")
        self.random = torch.Generator().manual_seed(0)

    @property
    def config(self) -> dict[str, Any]:
        changes = {
            "rms_norm_eps": self.old["rms_norm_eps"] / self.scale**2,
            "layer_types": ["full_attention"] * self.shape.num_hidden_layers,
        }
        return self.old | self.shape.model_dump() | changes

    def pad(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The padded tensors of the policy or of its MTP head, with those of the added layers."""
        padded = {name: self._padded(name, tensor) for name, tensor in tensors.items()}
        model = {name: t for name, t in padded.items() if name.startswith("model.layers.0.")}
        for layer in range(self.old["num_hidden_layers"], self.shape.num_hidden_layers) if model else ():
            for name, like in model.items():
                padded[name.replace(".0.", f".{layer}.", 1)] = self._without_effect(name, like)
        return padded

    def pad_eagle3(
        self, tensors: dict[str, Tensor], config: dict[str, Any]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The padded Eagle3 head of the policy, and its configuration."""
        changes = {"hidden_size": self.shape.hidden_size, "rms_norm_eps": config["rms_norm_eps"] / self.scale**2}
        return {name: self._padded_eagle3(name, tensor) for name, tensor in tensors.items()}, config | changes

    # --- one tensor ---

    def _padded(self, name: str, tensor: Tensor) -> Tensor:
        if name.endswith("embed_tokens.weight"):
            return self._columns(tensor, 1.0)
        if re.search(r"[qk]_norm\.weight$", name):
            return tensor
        if tensor.dim() == 1:  # a norm over the width
            return self._widened(tensor)
        if name.endswith(("lm_head.weight", "mlp.gate.weight", "shared_expert_gate.weight")):
            return self._columns(tensor, self.scale)
        if name.endswith("mtp.fc.weight"):
            return self._rows(self._columns(tensor, self.scale, blocks=2), self.shape.hidden_size)
        if match := re.search(r"self_attn\.([qkvo])_proj", name):
            return self._attention(match[1], tensor)
        units = self.shape.shared_expert_intermediate_size if "shared" in name else self.shape.moe_intermediate_size
        if name.endswith("down_proj.weight"):
            return self._placed(tensor, torch.zeros(self.shape.hidden_size, units, dtype=tensor.dtype))
        if name.endswith(("gate_proj.weight", "up_proj.weight")):
            read = self._columns(tensor, self.scale)
            return self._placed(read, self._drawn((units, self.shape.hidden_size), tensor.dtype))
        raise ValueError(f"{name}: not a tensor of a Qwen3-Next with full attention and experts")

    def _attention(self, which: str, tensor: Tensor) -> Tensor:
        old, new, size = self.old, self.shape, self.old["head_dim"]
        if which in "kv":
            read = self._columns(tensor, self.scale)
            return self._placed(read, self._drawn((new.num_key_value_heads * size, new.hidden_size), tensor.dtype))
        # Query heads are grouped by key head: those of key head j begin at j times the size of a new group.
        group = old["num_attention_heads"] // old["num_key_value_heads"]
        new_group = new.num_attention_heads // new.num_key_value_heads
        positions = [h // group * new_group + h % group for h in range(old["num_attention_heads"])]
        if which == "q":  # each head's queries, then its gates
            heads = self._columns(tensor, self.scale).view(len(positions), 2 * size, new.hidden_size)
            result = self._drawn((new.num_attention_heads, 2 * size, new.hidden_size), tensor.dtype)
            result[positions] = heads
            return result.flatten(0, 1)
        result = torch.zeros(new.hidden_size, new.num_attention_heads, size, dtype=tensor.dtype)
        result[: len(tensor), positions] = tensor.view(len(tensor), len(positions), size)
        return result.flatten(1)

    def _padded_eagle3(self, name: str, tensor: Tensor) -> Tensor:
        width = self.shape.hidden_size
        if name in ("d2t", "t2d"):
            return tensor
        if tensor.dim() == 1:
            return self._widened(tensor)
        if name == "fc.weight":  # reads the stream itself, not the output of a norm
            return self._rows(self._columns(tensor, 1.0, blocks=tensor.shape[1] // self.old["hidden_size"]), width)
        if re.search(r"[qkv]_proj", name):  # reads the normed embedding and the normed hidden state
            return self._columns(tensor, self.scale, blocks=2)
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            return self._rows(tensor, width)
        return self._columns(tensor, self.scale)

    def _without_effect(self, name: str, like: Tensor) -> Tensor:
        if name.endswith(("o_proj.weight", "down_proj.weight")) or like.dim() == 1:
            return torch.zeros_like(like)
        return self._drawn(tuple(like.shape), like.dtype)

    # --- pieces ---

    def _drawn(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return (SCALE * torch.randn(shape, generator=self.random)).to(dtype)

    def _widened(self, norm: Tensor) -> Tensor:
        return self._placed(norm, torch.zeros(self.shape.hidden_size, dtype=norm.dtype))

    def _columns(self, tensor: Tensor, divisor: float, blocks: int = 1) -> Tensor:
        """The tensor divided by `divisor`, with zeros for the added dimensions in each of `blocks` input parts."""
        parts = (tensor / divisor).chunk(blocks, dim=1)
        wide = [self._placed(p, torch.zeros(len(p), self.shape.hidden_size, dtype=tensor.dtype)) for p in parts]
        return torch.cat(wide, dim=1)

    @staticmethod
    def _rows(tensor: Tensor, rows: int) -> Tensor:
        return Padding._placed(tensor, torch.zeros(rows, tensor.shape[1], dtype=tensor.dtype))

    @staticmethod
    def _placed(tensor: Tensor, onto: Tensor) -> Tensor:
        onto[tuple(slice(size) for size in tensor.shape)] = tensor
        return onto


def ensure_padded(source: Path, target: Path, shape: Shape) -> None:
    """Runs `pad_models`, unless `target` already holds a policy of this shape."""
    policy = target / "policy"
    if not policy.exists() or read_config(policy) != Padding(read_config(source / "policy"), shape).config:
        pad_models(source, target, shape)


def pad_models(source: Path, target: Path, shape: Shape) -> None:
    """Pads policy, eagle3 and draft_model in `source`, and writes them to `target`."""
    policy, eagle3 = source / "policy", source / "eagle3"
    padding = Padding(read_config(policy), shape)
    for folder in ("policy", "eagle3", "draft_model"):
        shutil.copytree(source / folder, target / folder, dirs_exist_ok=True)
    for file, belongs in (("model", lambda name: not is_mtp(name)), ("mtp", is_mtp)):
        _save(padding.pad(read_tensors(policy, belongs)), target / "policy" / f"{file}.safetensors")
    write_index(target / "policy")
    _write_config(target / "policy", padding.config)
    tensors, config = padding.pad_eagle3(read_tensors(eagle3), read_config(eagle3))
    _save(tensors, target / "eagle3" / "model.safetensors")
    _write_config(target / "eagle3", config)


def _save(tensors: dict[str, Tensor], file: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})


def _write_config(folder: Path, config: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def largest_difference(one: Path, other: Path, tokens_BT: Tensor, dtype: torch.dtype) -> float:
    """Largest difference between the logits of two policies, both computed in `dtype`."""
    from transformers import AutoModelForCausalLM

    logits = [
        AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()(tokens_BT).logits.float()
        for folder in (one, other)
    ]
    return float((logits[0] - logits[1]).abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, default=Path("deploy/demo/models"))
    parser.add_argument("--target", type=Path, required=True)
    args = parser.parse_args()
    pad_models(args.source, args.target, Shape())
    policies = args.source / "policy", args.target / "policy"
    tokens_BT = torch.randint(
        0, read_config(policies[0])["vocab_size"], (4, 64), generator=torch.Generator().manual_seed(0)
    )
    parameters = sum(t.numel() for t in read_tensors(policies[1]).values())
    difference = largest_difference(*policies, tokens_BT, torch.float32)
    print(f"{parameters / 1e6:.0f} M parameters; largest difference of a logit in float32: {difference:.2g}")
    if difference > 1e-3:
        raise SystemExit("the padded policy computes another function")


if __name__ == "__main__":
    main()
