"""Tensors as safetensors bytes and back without copying them, and the checksum of such bytes.

The checksum is BLAKE3 because it is several times faster than SHA-256, and a push waits for it at the sender and at the
engines.
"""

import json
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
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    parts, header, end = [], {}, 0
    for name, tensor in ordered:
        data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + data.nbytes],
        }
        end += data.nbytes
        parts.append(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return [memoryview(len(text).to_bytes(8, "little") + text), *parts]


def checksum_of(parts: Iterable[memoryview]) -> str:
    hasher = blake3()
    for part in parts:
        hasher.update(part)
    return hasher.hexdigest()


def map_tensors(file: Path) -> tuple[dict[str, Tensor], str]:
    """A safetensors file's tensors as views of one mapping, and the checksum of that mapping. So the bytes that are
    used are the bytes that were checked."""
    storage = torch.UntypedStorage.from_file(str(file), False, file.stat().st_size)
    whole = torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[arg-type]
    checksum = blake3(whole.numpy().data, max_threads=blake3.AUTO).hexdigest()
    start = 8 + int.from_bytes(whole[:8].numpy().tobytes(), "little")
    header: dict[str, Any] = json.loads(whole[8:start].numpy().tobytes())
    header.pop("__metadata__", None)
    return {name: _view(whole[start:], **entry) for name, entry in header.items()}, checksum


def _view(data: Tensor, dtype: str, shape: list[int], data_offsets: tuple[int, int]) -> Tensor:
    part = data[slice(*data_offsets)]
    wanted = TORCH_DTYPES[dtype]
    if part.storage_offset() % wanted.itemsize:  # files of other writers may not be aligned
        part = part.clone()
    return part.view(wanted).view(shape)


def file_checksum(file: Path) -> str:
    return blake3().update_mmap(file).hexdigest()
