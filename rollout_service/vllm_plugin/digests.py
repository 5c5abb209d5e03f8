"""What a model in the engine holds, as one number a module: it changes when the weights that the kernels use change.

On a CPU a linear layer's weight is packed inside its kernel and cannot be read back; its digest is that of the layer's
output for a fixed input instead, so a stale packed copy is seen as well.
"""

import zlib
from typing import Any

import torch
from torch import Tensor

CHUNK = 1 << 22
MODULUS = 65_521
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def digest(tensor: Tensor) -> int:
    """Of the tensor's bits, order included; computed where the tensor is."""
    flat = tensor.detach().contiguous().flatten()
    if flat.device.type == "cpu":  # one pass over the bytes: a push waits for it
        return zlib.crc32(flat.view(torch.uint8).numpy().data)
    bits = flat.view(INTEGERS[flat.element_size()])
    total, first = 0, 0
    for part in bits.split(CHUNK):
        places = (torch.arange(first, first + len(part), device=part.device) % MODULUS) + 1
        values = part.long()
        total = (total * 31 + int(values.sum()) + 1_000_003 * int((values * places).sum())) % 2**64
        first += len(part)
    return total


@torch.no_grad()
def held_digests(model: Any) -> dict[str, int]:
    """One digest for every module of `model` that has weights of its own."""
    found = {}
    for name, module in model.named_modules():
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        parts = [digest(tensor) for _, tensor in sorted(own, key=lambda item: item[0]) if tensor.numel()]
        if hasattr(module, "cpu_linear"):
            parts.append(digest(_probed(module)))
        if parts:
            found[name] = hash(tuple(parts)) % 2**64  # integers hash the same in every process
    return found


def _probed(module: Any) -> Tensor:
    """The packed layer's output for an input of fixed, irregular values [1, in]."""
    sizes = ("input_size_per_partition", "input_size", "embedding_dim")
    width = next(getattr(module, name) for name in sizes if hasattr(module, name))
    dtype = next(p.dtype for p in module.parameters() if p.is_floating_point())
    probe = torch.sin(torch.arange(1, width + 1, dtype=torch.float32)).to(dtype)[None]
    return module.cpu_linear(probe, module.weight, None)
