"""Fleet: the engines of one service. engine_lives.py starts them, routing.py gives them requests, pushes.py weights."""

import asyncio
import contextlib
import secrets
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError

from drafters.files.checkpoint_folder import checkpoint_names, read_config
from drafters.files.model_folder import resolve_model
from drafters.registry import make_drafter
from drafters.schedule import Range
from rollout_service.config import ServiceConfig
from rollout_service.engine.arguments import check_arguments
from rollout_service.engine.hardware import machine_cores, resolve_device, runner_of
from rollout_service.engine.mixture import check_mixture
from rollout_service.engine.recurrent_layers import check_drafts_are_taken_back
from rollout_service.fleet.alarms import Alarms
from rollout_service.fleet.controls import Controls
from rollout_service.fleet.engine_lives import EngineLives
from rollout_service.fleet.member import FleetError, Member
from rollout_service.fleet.pausing import Pausing
from rollout_service.fleet.pushes import Pushes
from rollout_service.fleet.ray_cluster import start_ray
from rollout_service.fleet.resources import check_cluster, check_machine, engines_that_fit
from rollout_service.fleet.routing import ENGINE_LOST
from rollout_service.fleet.scaling import Scaling
from rollout_service.fleet.updates import Updates
from rollout_service.protocol import DraftSchedule
from rollout_service.weights.state_folder import StateFolder
from rollout_service.weights.versions import WeightStore

if TYPE_CHECKING:
    from rollout_service.engine.measuring import Plan
    from rollout_service.engine.step_costs import Measured

ANSWER_WITHIN = 5.0
"""seconds an engine has to say how it is doing"""


class Fleet(EngineLives):
    """Use: `fleet = Fleet(config); await fleet.start(); ...; await fleet.stop()`."""

    def __init__(self, config: ServiceConfig, *, threads: int | None = None):
        """`threads`: cores of each engine in place of the equal share, none reserved, for engines that take turns."""
        super().__init__()
        self.device = resolve_device(config.engine.device)
        self.runner = runner_of(self.device)
        check_arguments(config, self.device)
        if config.engines == "all" and self.device == "cpu" and not config.engine.cores:
            raise ValueError(
                "engine.cores: engines = 'all' needs the number of cores that each engine takes; give 1 or more"
            )
        if config.ray_address is None and threads is None:
            check_machine(config, self.device)
        self.folder = resolve_model(config.model)
        self.policy_config = read_config(self.folder)
        if config.engine.routed_experts:
            check_mixture(self.policy_config)
        check_drafts_are_taken_back(config.drafter, self.folder, self.device)
        own_config = None
        if config.drafter.model is not None:
            local = resolve_model(config.drafter.model, "drafter.model").resolve()
            own_config = read_config(local)
            here = config.drafter.model_copy(update={"model": str(local)})
            config = config.model_copy(update={"drafter": here})
        if (calibration := config.drafter.calibration()) is not None:  # engines on other nodes cannot read the file
            calibrated = config.drafter.model_copy(update={"schedule": calibration})
            config = config.model_copy(update={"drafter": calibrated})
        self.config = config
        self.drafter = make_drafter(config.drafter)
        holder = self.drafter.checkpoint(self.folder)
        self.drafter.check(self.policy_config, own_config, checkpoint_names(holder) if holder is not None else [])
        self.state = StateFolder(config.state) if config.state is not None else None
        self.store = WeightStore(self.folder, self.drafter, config.engine.dtype)
        self.alarms = Alarms(config.alarms)
        self.key = secrets.token_hex(32)
        count = max(1, engines_that_fit(config, self.device)) if config.engines == "all" else config.engines
        share = config.engine.cores or max(1, machine_cores() // count)
        ranks = config.engine.tensor_parallel_size
        self.threads, self.reserved_cores = max(1, (threads or share) // ranks), 0 if threads else share
        self.pushes = Pushes(self.store, self.state, self.alarms, self.members)
        self.pushes.ranks = ranks
        sleeps = self.device == "cuda" and bool(config.engine.vllm.get("enable_sleep_mode"))
        self.controls = Controls(self.members)
        self.pausing = Pausing(self.controls, self.pushes.lock, frees_memory=sleeps)
        self.pushes.check_awake = self.pausing.check_awake
        self.updates = Updates(self.store, self.pushes, self.controls, self.device)
        self.scaling = Scaling(self)

    # --- life ---

    async def start(self) -> None:
        """Returns when every engine is in service. Raises FleetError when a joined cluster has no room for the engines,
        and when one cannot start."""
        if not ray.is_initialized():
            start_ray(self.config.ray_address, self.config.engine_logs)
        self.pushes.take_up_kept()
        if self.config.ray_address is not None:
            await check_cluster(self.config, self.device, self.reserved_cores)
        fit = await asyncio.to_thread(self.scaling.fit) if self.config.engines == "all" else 0
        for _ in range(max(self.config.first_engines, fit)):
            self.make_engine()
        try:
            await self.start_engines(self.members)
        except FleetError:
            await self.stop()
            raise
        self.scaling.start()

    async def stop(self) -> None:
        self.scaling.stop()
        await self.end_engines(self.members)
        self.store.close()
        if self.state is not None:
            self.state.close()

    # --- control ---

    async def set_draft_sampling(self, draft_sampling: str) -> None:
        await asyncio.gather(*(member.actor.set_draft_sampling.remote(draft_sampling) for member in self.members))

    async def set_verification(self, verification: str) -> None:
        await asyncio.gather(*(member.actor.set_verification.remote(verification) for member in self.members))

    async def running(self) -> dict[str, str]:
        """How the engines in service sample and verify drafts now, as the first says; empty without a drafter."""
        return next(iter((await self._of_each("running")).values()), {})

    async def schedules(self) -> list[DraftSchedule]:
        """How many tokens each engine in service drafts at present; empty without a drafter."""
        if not self.config.drafter.drafts:
            return []
        return list((await self._of_each("schedule")).values())

    async def measure(self, plan: "Plan") -> "Measured":
        """Measure the costs of steps on the first engine, while nothing else is generated."""
        return await self.members[0].actor.measure.remote(plan)

    async def set_draft_lengths(self, ranges: list[Range]) -> None:
        """Set the draft lengths of every engine, from its next step on."""
        await asyncio.gather(*(member.actor.set_draft_lengths.remote(ranges) for member in self.members))

    async def speculation(self) -> list[dict[str, Any]]:
        """Counts by version, one row for each engine and pair of versions."""
        return [row for rows in (await self._of_each("speculation")).values() for row in rows]

    async def check_acceptance(self) -> None:
        """Raise the alarms that follow from the counts so far."""
        self.alarms.check_acceptance(await self.speculation())

    async def context_acceptance(self) -> list[dict[int, list[int]]]:
        """Histograms of accepted drafts by context length, one for each engine."""
        return list((await self._of_each("context_acceptance")).values())

    async def metrics(self) -> dict[int, str]:
        """vLLM's Prometheus text of each engine in service, by its index."""
        return await self._of_each("metrics")

    async def _of_each(self, method: str) -> dict[int, Any]:
        """What each engine in service answers, by its index. An engine that dies or is silent is left out."""

        async def ask(member: Member) -> Any:
            with contextlib.suppress(*ENGINE_LOST, TimeoutError):
                async with asyncio.timeout(ANSWER_WITHIN):
                    answers[member.index] = await member.answer(getattr(member.actor, method).remote())

        answers: dict[int, Any] = {}
        await asyncio.gather(*(ask(member) for member in self.members if member.in_service))
        return dict(sorted(answers.items()))

    async def ready(self, timeout: float = ANSWER_WITHIN) -> bool:
        """Whether every engine is in service and answers, except those that are being added or taken away."""
        members = [member for member in self.members if not member.joining and not member.draining]
        if not members or not all(member.in_service for member in members):
            return False
        try:
            await asyncio.wait_for(asyncio.gather(*(m.actor.check.remote() for m in members)), timeout)
        except (TimeoutError, RayError):
            return False
        return True
