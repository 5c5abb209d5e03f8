"""An update as a worker reads it: on a GPU its mapping is pinned while it is used, and no longer."""

import pytest
import torch
from safetensors.torch import save_file

from rollout_service.tensor_bytes import file_checksum, part_checksums
from rollout_service.vllm_plugin.mapped_update import MappedUpdate

CPU, GPU = torch.device("cpu"), torch.device("cuda:1")
TENSORS = {"a": torch.arange(40.0), "b": torch.arange(9)}


@pytest.fixture
def file(tmp_path):
    save_file(TENSORS, tmp_path / "update.safetensors")
    return tmp_path / "update.safetensors"


@pytest.fixture
def driver(monkeypatch):
    """What the GPU's driver is asked for, in order. `driver.pins`: whether it can pin."""

    class Driver(list):
        pins = True

    calls, module = Driver(), "vllm.v1.kv_offload.cpu.host_register"
    monkeypatch.setattr("torch.cuda.set_device", lambda device: calls.append(("device", device)))
    monkeypatch.setattr("torch.accelerator.synchronize", lambda: calls.append(("wait",)))
    monkeypatch.setattr(f"{module}.host_register", lambda *where: calls.append(("pin", *where)) or calls.pins)
    monkeypatch.setattr(f"{module}.host_unregister", lambda where: calls.append(("unpin", where)))
    return calls


def test_a_gpus_worker_pins_the_whole_mapping_on_its_own_device_until_the_update_is_loaded(file, driver):
    update = MappedUpdate(file, 0, 1, GPU)
    assert all(torch.equal(update.tensors[name], tensor) for name, tensor in TENSORS.items())
    begin = update.tensors["a"].untyped_storage().data_ptr()
    assert driver == [("device", GPU), ("pin", begin, file.stat().st_size)]
    del update
    assert driver[2:] == [("wait",), ("unpin", begin)]


def test_an_update_that_cannot_be_pinned_is_read_all_the_same(file, driver):
    driver.pins = False
    update = MappedUpdate(file, 0, 1, GPU)
    assert update.checksum == file_checksum(file)
    del update
    assert [call[0] for call in driver] == ["device", "pin"]


def test_a_file_that_the_worker_may_not_write_is_not_pinned(file, driver, monkeypatch):
    monkeypatch.setattr("os.access", lambda *_: False)
    assert MappedUpdate(file, 0, 1, GPU).checksum == file_checksum(file)
    assert driver == []


@pytest.mark.parametrize("device", [CPU, GPU])
def test_each_rank_checks_its_part(file, driver, device):
    assert [MappedUpdate(file, part, 3, device).checksum for part in range(3)] == part_checksums(file, 3)
    assert bool(driver) == (device == GPU)


def test_writing_to_tensors_of_a_cpus_worker_leaves_the_file_as_it_is(file):
    before = file.read_bytes()
    MappedUpdate(file, 0, 1, CPU).tensors["a"].zero_()
    assert file.read_bytes() == before
