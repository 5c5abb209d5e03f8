"""Tensors as safetensors bytes and back without copying them, and the checksum of such bytes.

The checksum is BLAKE3 because it is several times faster than SHA-256, and a push waits for it at the sender and at the
engines.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor

ALIGNMENT = 64
"""bytes; the data begins at a multiple of it, so that the tensors of a memory-mapped file are aligned too"""
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""torch's dtypes, and their names in safetensors"""
TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}


def safetensors_parts(tensors: Mapping[str, Tensor]) -> list[memoryview]:
    """The bytes of a safetensors file: its header, then each tensor's own memory. Wide dtypes come first, so that all
    tensors are aligned. Names are sorted, so that the same tensors always give the same bytes."""
    parts, specs = {}, {}
    for name, tensor in tensors.items():
        parts[name] = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
        specs[name] = (tuple(tensor.shape), DTYPES[tensor.dtype])
    header, order = _header(specs)
    return [memoryview(header), *(parts[name] for name in order)]


def _header(specs: Mapping[str, tuple[tuple[int, ...], str]]) -> tuple[bytes, list[str]]:
    """The first bytes of a file of tensors with these shapes and dtypes, and the order in which the tensors follow."""
    order = sorted(specs, key=lambda name: (-TORCH_DTYPES[specs[name][1]].itemsize, name))
    header, end = {}, 0
    for name in order:
        shape, dtype = specs[name]
        size = math.prod(shape) * TORCH_DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text, order


def create_file(file: Path, specs: Mapping[str, tuple[tuple[int, ...], str]]) -> None:
    """Make of `file`, which may hold anything, a safetensors file with places for tensors of these shapes and dtypes
    (as safetensors names them). Their values are undefined. Raises OSError when there is no room for it."""
    header, _ = _header(specs)
    size = len(header) + sum(math.prod(shape) * TORCH_DTYPES[dtype].itemsize for shape, dtype in specs.values())
    with file.open("r+b") as out:
        out.write(header)
        out.truncate(size)
        os.posix_fallocate(out.fileno(), 0, size)  # else writing to a full memory file system would kill the process


def map_writable(file: Path) -> dict[str, Tensor]:
    """A safetensors file's tensors as views of one mapping. What is written to them is in the file."""
    return _tensors(_mapped(file, shared=True))


def checksum_of(parts: Iterable[memoryview]) -> str:
    hasher = blake3()
    for part in parts:
        hasher.update(part)
    return hasher.hexdigest()


def map_tensors(file: Path, part: int = 0, parts: int = 1, *, shared: bool = False) -> tuple[dict[str, Tensor], str]:
    """A safetensors file's tensors as views of one mapping, and the checksum of that mapping, or of one of `parts`
    equal parts of it. So the bytes that are used are the bytes that were checked. What is written to a `shared` mapping
    is in the file."""
    whole = _mapped(file, shared=shared)
    return _tensors(whole), _part_checksum(whole, part, parts)


def part_checksums(file: Path, parts: int) -> list[str]:
    """The checksum of each of `parts` equal parts of a file's bytes; the last may be shorter."""
    whole = _mapped(file, shared=False)
    return [_part_checksum(whole, part, parts) for part in range(parts)]


def _part_checksum(whole: Tensor, part: int, parts: int) -> str:
    size = -(-len(whole) // parts)
    bytes_of_part = whole[part * size : (part + 1) * size].numpy().data
    return blake3(bytes_of_part, max_threads=blake3.AUTO).hexdigest()


def _mapped(file: Path, *, shared: bool) -> Tensor:
    """The file's bytes."""
    storage = torch.UntypedStorage.from_file(str(file), shared, file.stat().st_size)
    return torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[arg-type]


def _tensors(whole: Tensor) -> dict[str, Tensor]:
    start = 8 + int.from_bytes(whole[:8].numpy().tobytes(), "little")
    header: dict[str, Any] = json.loads(whole[8:start].numpy().tobytes())
    header.pop("__metadata__", None)
    return {name: _view(whole[start:], **entry) for name, entry in header.items()}


def _view(data: Tensor, dtype: str, shape: list[int], data_offsets: tuple[int, int]) -> Tensor:
    part = data[slice(*data_offsets)]
    wanted = TORCH_DTYPES[dtype]
    if part.storage_offset() % wanted.itemsize:  # files of other writers may not be aligned
        part = part.clone()
    return part.view(wanted).view(shape)


def file_checksum(file: Path) -> str:
    return blake3().update_mmap(file).hexdigest()
