"""Stripping of a shared library: replaces GPU code that an H100 does not run by zeros, which compress well.

    python strip_cubins.py libraries/_C.abi3.so small/_C.abi3.so
    python strip_cubins.py libraries/_vllm_fa3_C.abi3.so small/_vllm_fa3_C.abi3.so --attention

Sizes and offsets stay the same, so the library loads as before. Kernels that are zeroed can no longer be launched.
"""

import argparse
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

CONTAINER = struct.Struct("<IHHQ")
"""header of a fat binary: magic number, version, size of this header, size of the entries after it"""
MAGIC, VERSION = 0xBA55ED50, 1
ENTRY = struct.Struct("<HHIQIIHHI")
"""header of an entry: kind, version, size of this header, size of the code, three fields that are not used here, two
halves of a version, compute capability times ten"""
KINDS = (1, 2, 3, 4, 16, 64)
"""known kinds of entries; 2 is machine code"""
MACHINE_CODE = 2
SMALLEST_ENTRY, LARGEST_ENTRY_HEADER = 64, 512
H100 = 90
ATTENTION = {(b"64", b"bfloat16_t"), (b"128", b"bfloat16_t")}
"""channels per head and data type of the FlashAttention 3 kernels that the checks launch"""


class Code(NamedTuple):
    """The place of an entry's code in the library, in bytes."""

    start: int
    end: int
    is_for_h100: bool


def codes_of(library: bytes) -> Iterator[Code]:
    """Every entry of every fat binary in `library`."""
    position = 0
    while (position := library.find(struct.pack("<I", MAGIC), position)) >= 0:
        _, version, header, size = CONTAINER.unpack_from(library, position)
        if version != VERSION or header != CONTAINER.size or size > len(library) - position:
            position += 4  # these bytes equal the magic number by chance
            continue
        end = position + header + size
        yield from _entries(library, position + header, end)
        position = end


def _entries(library: bytes, position: int, end: int) -> Iterator[Code]:
    while position + SMALLEST_ENTRY <= end:
        kind, _, header, size, _, _, _, _, capability = ENTRY.unpack_from(library, position)
        if kind not in KINDS or not SMALLEST_ENTRY <= header <= LARGEST_ENTRY_HEADER:
            return  # padding after the last entry
        start = position + header
        yield Code(start, start + size, kind == MACHINE_CODE and capability == H100)
        position = start + size


def has_attention(code: bytes) -> bool:
    """Whether the code is to be kept: it holds a kernel of ATTENTION, or no forward kernel of FlashAttention at all."""
    names = [name for name in re.findall(rb"_ZN[A-Za-z0-9_]{60,3500}", code) if b"FlashAttnFwdSm90" in name]
    shape = re.compile(rb"ELi(\d+)ENS_\d+(bfloat16_t|half_t|float_e4m3_t)")
    return not names or any(match.groups() in ATTENTION for name in names if (match := shape.search(name)))


def stripped(library: bytes, *, attention: bool) -> tuple[bytes, int]:
    """`library` with zeros in place of the code that is dropped, and the number of bytes of code that are kept."""
    result, kept = bytearray(library), 0
    for start, end, is_for_h100 in codes_of(library):
        if is_for_h100 and (not attention or has_attention(library[start:end])):
            kept += end - start
        else:
            result[start:end] = bytes(end - start)
    return bytes(result), kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument(
        "--attention", action="store_true", help="of attention kernels, keep bfloat16 with 64 or 128 channels"
    )
    args = parser.parse_args()
    library = args.source.read_bytes()
    result, kept = stripped(library, attention=args.attention)
    args.target.write_bytes(result)
    print(f"{args.source.name}: kept {kept // 10**6} MB of code in {len(library) // 10**6} MB")


if __name__ == "__main__":
    main()
