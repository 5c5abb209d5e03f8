"""Transports: how a version's bytes get from a trainer to the service. The client imports it: no vllm, ray or torch.

Another transport is one file, and a line in each of `sender` and `receiver`. A transport whose bytes are never a file
also needs another Update, and another place from which engines read it (engine/loading.py).
"""

from pathlib import Path

from rollout_service.protocol import WeightsStatus
from rollout_service.transports import http_body, shared_memory
from rollout_service.transports.folder import WeightsFolder, is_of_this_machine
from rollout_service.transports.transport import Receiver, RefusedUpdate, Sender, Sent, Update

__all__ = ["Receiver", "RefusedUpdate", "Sender", "Sent", "Update", "WeightsFolder", "receiver", "sender"]


def sender(service: WeightsStatus) -> Sender:
    """The trainer's end of the fastest transport to a service."""
    folder = Path(service.shared_memory)
    return shared_memory.SharedMemorySender(folder) if is_of_this_machine(folder) else http_body.HttpSender()


def receiver(content_type: str, folder: WeightsFolder) -> Receiver:
    """The service's end of the transport that a push used."""
    of_reference = content_type.startswith(shared_memory.CONTENT_TYPE)
    return shared_memory.SharedMemoryReceiver(folder) if of_reference else http_body.HttpReceiver(folder)
