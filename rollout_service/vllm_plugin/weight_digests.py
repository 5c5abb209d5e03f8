"""Weight digests: one number for each module of a model, which changes with the weights that its kernels use.

On a CPU a linear layer's weight is packed inside its kernel and cannot be read back. Its digest is that of the layer's
output for a fixed input instead, which also shows a packed copy that is stale.
"""

import zlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

WIDTH = 4093
"""64-bit words in a row; a prime, so that rows, heads or experts that change places do not stay in their columns"""


def digest(tensor: Tensor) -> int:
    """A digest of the tensor's bits and their order: that of the column sums of its words in rows of WIDTH. It takes
    one pass at the memory's speed, wherever the tensor is, because engines do not generate meanwhile."""
    raw = tensor.detach().contiguous().flatten().view(torch.uint8)
    if raw.storage_offset() % 8:
        raw = raw.clone()
    words = raw.numel() // (8 * WIDTH) * 8 * WIDTH
    sums = raw[:words].view(torch.int64).view(-1, WIDTH).sum(0)
    return zlib.crc32(torch.cat([sums.view(torch.uint8), raw[words:]]).cpu().numpy().data)


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


@torch.no_grad()
def packed_digests(model: Any) -> Iterator[tuple[str, int]]:
    """The name and a digest of every layer whose weight is packed inside its kernel."""
    for name, module in model.named_modules():
        if hasattr(module, "cpu_linear"):
            yield name, digest(_probed(module))


def _probed(module: Any) -> Tensor:
    """The packed layer's output for an input of fixed, irregular values [1, in]."""
    sizes = ("input_size_per_partition", "input_size", "embedding_dim")
    width = next(getattr(module, name) for name in sizes if hasattr(module, name))
    dtype = next(p.dtype for p in module.parameters() if p.is_floating_point())
    probe = torch.sin(torch.arange(1, width + 1, dtype=torch.float32)).to(dtype)[None]
    return module.cpu_linear(probe, module.weight, None)
