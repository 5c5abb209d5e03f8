"""Arms of a measurement: each generates groups on an engine of its own, or at a running endpoint."""

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from drafters.files.model_folder import resolve_model
from drafters.registry import DrafterConfig
from rollout_service.client import AsyncRolloutClient
from rollout_service.config import ServiceConfig
from rollout_service.engine.hardware import machine_cores
from rollout_service.fleet.fleet import Fleet
from rollout_service.protocol import Group, GroupRequest


def fetch_models(model: str, drafters: Iterable[DrafterConfig]) -> Path:
    """The policy's folder, once the checkpoints of all drafters are on this machine too. So a wrong name is reported
    before the first engine starts, not before the last. Raises ValueError."""
    for drafter in drafters:
        if drafter.model is not None:
            resolve_model(drafter.model, "drafters.model")
    return resolve_model(model)


def name_of(drafter: DrafterConfig) -> str:
    """The drafter's name in progress bars: kind and checkpoint."""
    return drafter.kind if drafter.model is None else f"{drafter.kind} {drafter.model}"


class Arm(Protocol):
    """One drafter, ready to generate."""

    drafter: DrafterConfig

    async def generate(self, group: GroupRequest) -> Group: ...
    async def draft_as(self, drafter: DrafterConfig) -> None:
        """From now on sample and verify drafts as `drafter` says, which otherwise equals the arm's own."""

    async def stop(self) -> None: ...


class EngineArm:
    """A fleet of one engine, which may use all of the machine's cores when its turn comes."""

    def __init__(self, config: ServiceConfig):
        self.drafter = config.drafter
        self.fleet = Fleet(config, threads=config.engine.cores or machine_cores())

    async def generate(self, group: GroupRequest) -> Group:
        return await self.fleet.generate(group)

    async def draft_as(self, drafter: DrafterConfig) -> None:
        await self.fleet.set_draft_sampling(drafter.draft_sampling)
        await self.fleet.set_verification(drafter.verification)

    async def stop(self) -> None:
        await self.fleet.stop()


class EndpointArm:
    """A running service, with the drafter that it reports."""

    def __init__(self, client: AsyncRolloutClient, drafter: DrafterConfig):
        self.client, self.drafter = client, drafter

    @classmethod
    async def connect(cls, endpoint: str, token: str | None) -> "EndpointArm":
        client = AsyncRolloutClient(endpoint, token)
        known = (await client.speculation()).drafters
        if not known:
            return cls(client, DrafterConfig())
        on = known[0].model_dump(include={"draft_tokens", "draft_sampling", "verification"})
        return cls(client, DrafterConfig(kind=known[0].drafter, **on))

    async def generate(self, group: GroupRequest) -> Group:
        (finished,) = [finished async for finished in self.client.rollouts([group])]
        return finished

    async def draft_as(self, drafter: DrafterConfig) -> None:
        """Does nothing: a running service keeps its own settings."""

    async def stop(self) -> None:
        await self.client.http.aclose()
