"""The client of the service, for trainers. Imports protocol, endpoint and transports; no vllm, ray or torch."""

from rollout_service.client.answers import GroupStream, RolloutError
from rollout_service.client.async_client import AsyncRolloutClient
from rollout_service.client.rollout_client import RolloutClient, tensors_checksum
from rollout_service.endpoint import EndpointError

__all__ = ["AsyncRolloutClient", "EndpointError", "GroupStream", "RolloutClient", "RolloutError", "tensors_checksum"]
