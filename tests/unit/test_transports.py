"""Transports: the service holds the bytes that the trainer sent, whatever the trainer does later."""

import pytest
import torch

from rollout_service import transports
from rollout_service.client import tensors_checksum
from rollout_service.protocol import WeightsStatus, WeightStatus
from rollout_service.tensor_bytes import safetensors_parts
from rollout_service.transports import RefusedUpdate, WeightsFolder, folder
from rollout_service.transports.http_body import HttpSender
from rollout_service.transports.shared_memory import SharedMemorySender

TENSORS = {"a": torch.arange(6.0), "b": torch.ones(3).bfloat16()}
PARTS = safetensors_parts(TENSORS)
LIMIT = 1 << 20


@pytest.fixture
def weights_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "SHARED_MEMORY", tmp_path)
    weights_folder = WeightsFolder()
    yield weights_folder
    weights_folder.close()


@pytest.fixture(params=[HttpSender, SharedMemorySender])
def sender(request, weights_folder):
    return request.param() if request.param is HttpSender else request.param(weights_folder.path)


async def body(sent):
    """Of the request, as it arrives."""
    for chunk in [sent.content] if isinstance(sent.content, bytes) else sent.content:
        yield chunk


def status_of(weights_folder):
    status = WeightStatus(version=0, tensors=1, bytes=0, checksum="")
    return WeightsStatus(policy=status, drafter=None, dtype="float32", shared_memory=str(weights_folder.path))


async def test_the_received_bytes_are_those_sent_and_stay_after_the_push(sender, weights_folder):
    with sender.send("policy", PARTS) as sent:
        receiver = transports.receiver(sent.content_type, weights_folder)
        update = await receiver.adopt("policy", body(sent), sent.checksum, LIMIT)
    assert update.checksum == sent.checksum == tensors_checksum(TENSORS)
    assert update.file.read_bytes() == b"".join(PARTS)
    assert [file for file in weights_folder.path.iterdir() if file.name.startswith(("push-", "received-"))] == [
        update.file
    ], "the trainer's own file is gone"


async def test_the_service_computes_a_checksum_that_the_sender_left_out(sender, weights_folder):
    with sender.send("policy", PARTS) as sent:
        update = await transports.receiver(sent.content_type, weights_folder).adopt("policy", body(sent), None, LIMIT)
    assert update.checksum == tensors_checksum(TENSORS)


async def test_a_failed_push_leaves_no_file_of_the_trainer(sender, weights_folder):
    with pytest.raises(RuntimeError), sender.send("policy", PARTS):
        raise RuntimeError
    assert {file.name for file in weights_folder.path.iterdir()} == {"owner", "token"}


async def test_a_body_of_other_bytes_is_refused_and_deleted(weights_folder):
    with HttpSender().send("policy", PARTS) as sent, pytest.raises(RefusedUpdate, match="push again"):
        await transports.receiver(sent.content_type, weights_folder).adopt("policy", body(sent), "0" * 64, LIMIT)
    assert {file.name for file in weights_folder.path.iterdir()} == {"owner", "token"}


def test_a_push_uses_shared_memory_only_on_the_services_machine(weights_folder):
    service = status_of(weights_folder)
    assert isinstance(transports.sender(service), SharedMemorySender)
    (weights_folder.path / "token").write_text("of another machine's service, by chance at the same path")
    assert isinstance(transports.sender(service), HttpSender)
    (weights_folder.path / "token").unlink()
    assert isinstance(transports.sender(service), HttpSender)
