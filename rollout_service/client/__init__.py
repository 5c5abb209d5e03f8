"""The service from a trainer's side. Imports protocol, endpoint and tensor_bytes; no vllm, ray or torch."""

from rollout_service.client.answers import GroupStream, RolloutError
from rollout_service.client.rollout_client import AsyncRolloutClient, RolloutClient, tensors_checksum
from rollout_service.endpoint import EndpointError

__all__ = ["AsyncRolloutClient", "EndpointError", "GroupStream", "RolloutClient", "RolloutError", "tensors_checksum"]
