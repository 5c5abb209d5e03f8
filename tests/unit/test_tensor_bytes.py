"""Pushed bytes: safetensors, written and read without a copy, with a checksum of the bytes that are used."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from rollout_service.client import tensors_checksum
from rollout_service.tensor_bytes import ALIGNMENT, file_checksum, map_tensors, part_checksums, safetensors_parts
from rollout_service.transports.folder import make_writable, spare_file
from rollout_service.transports.http_body import chunks
from rollout_service.transports.shared_memory import write

TENSORS = {
    "b.weight": torch.randn(5, 3).bfloat16(),
    "a.bias": torch.randn(7),
    "transposed": torch.randn(4, 6).T,
    "scalar": torch.tensor(2.5),
    "d2t": torch.arange(9),
    "none": torch.empty(0, 3),
    "flags": torch.tensor([True, False, True]),
}


def written(tensors, folder):
    file = make_writable(folder / "update.safetensors", "policy")
    write(file, safetensors_parts(tensors))
    return file


def same(found, expected):
    return found.keys() == expected.keys() and all(
        torch.equal(found[n], t) and found[n].dtype == t.dtype for n, t in expected.items()
    )


def test_safetensors_reads_what_is_written(tmp_path):
    assert same(load_file(written(TENSORS, tmp_path)), TENSORS)


def test_a_file_that_safetensors_wrote_is_mapped_unchanged(tmp_path):
    contiguous = {name: tensor.contiguous() for name, tensor in TENSORS.items()}
    save_file(contiguous, tmp_path / "theirs", metadata={"format": "pt"})
    tensors, checksum = map_tensors(tmp_path / "theirs")
    assert same(tensors, TENSORS)
    assert checksum == file_checksum(tmp_path / "theirs")


def test_unaligned_tensors_are_read_too(tmp_path):
    """Files need not be aligned: here the header, and so the file, is one byte longer."""
    data = written(TENSORS, tmp_path).read_bytes()
    length = int.from_bytes(data[:8], "little")
    askew = (length + 1).to_bytes(8, "little") + data[8 : 8 + length] + b" " + data[8 + length :]
    (tmp_path / "askew").write_bytes(askew)
    assert same(map_tensors(tmp_path / "askew")[0], TENSORS)


def test_the_checksum_is_that_of_the_file_of_the_body_and_of_what_is_mapped(tmp_path):
    file = written(TENSORS, tmp_path)
    assert tensors_checksum(TENSORS) == file_checksum(file) == map_tensors(file)[1]
    assert b"".join(chunks(safetensors_parts(TENSORS))) == file.read_bytes()
    assert tensors_checksum(dict(reversed(TENSORS.items()))) == tensors_checksum(TENSORS), "whatever their order"


@pytest.mark.parametrize("place", [9, -1])
def test_a_byte_that_changed_has_another_checksum(place, tmp_path):
    file = written(TENSORS, tmp_path)
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)
    assert file_checksum(file) != tensors_checksum(TENSORS)


def test_every_tensor_begins_where_its_dtype_can_be_read(tmp_path):
    tensors, _ = map_tensors(written(TENSORS, tmp_path))
    assert all(t.untyped_storage().data_ptr() == tensors["d2t"].untyped_storage().data_ptr() for t in tensors.values())
    assert tensors["d2t"].storage_offset() * 8 % ALIGNMENT == 0


@pytest.mark.parametrize("size", [10, 100_000])
def test_a_spare_file_is_overwritten_and_cut_to_size(size, tmp_path):
    spare = spare_file(tmp_path, "policy")
    spare.write_bytes(b"x" * size)
    memory = spare.stat().st_ino
    file = written(TENSORS, tmp_path)
    assert file.stat().st_ino == memory
    assert not spare.exists()
    assert same(load_file(file), TENSORS)


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_parts_that_several_ranks_check_cover_every_byte_once(parts, tmp_path):
    file = written(TENSORS, tmp_path)
    sent = part_checksums(file, parts)
    assert [map_tensors(file, part, parts)[1] for part in range(parts)] == sent
    assert parts > 1 or sent == [file_checksum(file)]
    data = file.read_bytes()
    for place in range(len(data)):
        file.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        differ = [new != old for new, old in zip(part_checksums(file, parts), sent, strict=True)]
        assert sum(differ) == 1
