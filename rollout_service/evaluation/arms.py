"""Arms of a measurement: each generates groups on an engine of its own, or at a running endpoint."""

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from drafters.files.model_folder import resolve_model
from drafters.registry import DrafterConfig, make_drafter
from rollout_service.client import AsyncRolloutClient
from rollout_service.config import ServiceConfig
from rollout_service.engine.hardware import machine_cores
from rollout_service.engine.recurrent_layers import check_drafts_are_taken_back
from rollout_service.engine.switches import SWITCHED
from rollout_service.evaluation.ran import Ran
from rollout_service.fleet.fleet import Fleet
from rollout_service.protocol import Group, GroupRequest


def fetch_models(model: str, drafters: Iterable[DrafterConfig], device: str) -> Path:
    """The policy's folder, once the checkpoints of all drafters are on this machine too, and each can draft for the
    policy on `device`. So an error is reported before the first engine starts, not before the last. Raises
    ValueError."""
    drafters = list(drafters)
    for drafter in drafters:
        if drafter.model is not None:
            resolve_model(drafter.model, "drafters.model")
    folder = resolve_model(model)
    for drafter in drafters:
        check_drafts_are_taken_back(drafter, folder, device)
    return folder


def name_of(drafter: DrafterConfig) -> str:
    """The drafter's name in progress bars: kind and checkpoint."""
    return drafter.kind if drafter.model is None else f"{drafter.kind} {drafter.model}"


def engine_name(arm: "EngineArm") -> str:
    """As above, and how drafts are sampled if that takes an engine start of its own."""
    drafter = arm.drafter
    if "draft_sampling" in SWITCHED[arm.fleet.runner] or not make_drafter(drafter).samples:
        return name_of(drafter)
    return f"{name_of(drafter)}, {drafter.draft_sampling} drafts"


class Arm(Protocol):
    """One drafter, ready to generate."""

    drafter: DrafterConfig
    dtype: str
    """dtype of the engine's weights and caches"""

    async def generate(self, group: GroupRequest) -> Group: ...
    async def draft_as(self, drafter: DrafterConfig) -> Ran:
        """From now on sample and verify drafts as `drafter` says, which otherwise equals the arm's own. Returns what
        the engine says that it does now."""

    async def stop(self) -> None: ...


class EngineArm:
    """A fleet of one engine, which may use all of the machine's cores when its turn comes."""

    def __init__(self, config: ServiceConfig):
        self.drafter = config.drafter
        self.dtype: str = config.engine.dtype
        self.fleet = Fleet(config, threads=config.engine.cores or machine_cores())

    async def generate(self, group: GroupRequest) -> Group:
        return await self.fleet.generate(group)

    async def draft_as(self, drafter: DrafterConfig) -> Ran:
        if make_drafter(drafter).samples:
            await self.fleet.set_draft_sampling(drafter.draft_sampling)
        await self.fleet.set_verification(drafter.verification)
        return Ran(**await self.fleet.running())

    async def stop(self) -> None:
        await self.fleet.stop()


class EndpointArm:
    """A running service, with the drafter that it reports."""

    def __init__(self, client: AsyncRolloutClient, dtype: str, drafter: DrafterConfig, ran: Ran):
        self.client, self.dtype, self.drafter, self.ran = client, dtype, drafter, ran

    @classmethod
    async def connect(cls, endpoint: str, token: str | None, ca_file: Path | None) -> "EndpointArm":
        client = AsyncRolloutClient(endpoint, token, ca_file=ca_file)
        known, dtype = (await client.speculation()).drafters, (await client.weights()).dtype
        if not known:
            return cls(client, dtype, DrafterConfig(), Ran())
        on = known[0]
        drafter = DrafterConfig(kind=on.drafter, **on.model_dump(include={"draft_tokens", "draft_sampling"}))
        return cls(client, dtype, drafter, Ran(on.draft_sampling, on.verification))

    async def generate(self, group: GroupRequest) -> Group:
        (finished,) = [finished async for finished in self.client.rollouts([group])]
        return finished

    async def draft_as(self, drafter: DrafterConfig) -> Ran:
        """Changes nothing: a running service keeps its own settings."""
        return self.ran

    async def stop(self) -> None:
        await self.client.http.aclose()
