"""The fleet: start N engines, route a group to the least loaded, send control to all, restart and re-weight the dead.

- A group goes to one engine. When that engine dies the group is generated again; the client notices only time.
- An engine is in service from the moment it holds the current weights. A restarted one takes them before it serves.
- A version is published when every engine in service holds it. One push at a time, and no engine starts during a push.
  Of pushes that wait for their turn only the newest is loaded.
- With a state folder, a version is kept there before any engine takes it; a service that starts again goes on with it.
"""

import asyncio
import contextlib
import logging
import shutil
import time
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError, RayError, RayTaskError

from drafters.registry import make_drafter
from drafters.schedule import Range
from rollout_service.alarms import Alarms
from rollout_service.asgi import ResponseStart
from rollout_service.checkpoint_files import model_config, resolve_model
from rollout_service.config import ServiceConfig
from rollout_service.engine import Aborted, DifferentBytes, Engine, WeightsFile
from rollout_service.hardware import engine_environment, machine_cores, resolve_device
from rollout_service.member import Member
from rollout_service.protocol import DraftSchedule, Group, GroupRequest, Problem, WeightsOf, WeightStatus
from rollout_service.ray_cluster import start_ray
from rollout_service.state import StateFolder
from rollout_service.tensor_bytes import file_checksum
from rollout_service.weights import RefusedUpdate, WeightStore, check_received

if TYPE_CHECKING:
    from rollout_service.step_costs import Measured, Plan

logger = logging.getLogger("rollout_service")

ATTEMPTS = 3
"""times a group is generated before its engines' deaths are the client's business"""
CHECK_EVERY = 2.0
"""seconds between looks at an engine that has nothing to do"""
ENGINE_WITHIN = 300.0
"""seconds a request waits for an engine to come into service"""
STOP_WITHIN = 10.0
"""seconds an engine has to end in order; then its actor is killed"""
REPORTED: set[str] = set()
"""functions of vLLM that were replaced and reported: every engine of a machine replaces the same"""
ENGINE_LOST = (RayActorError, ActorDiedError, ActorUnavailableError)


class FleetError(RuntimeError):
    """The engines could not do what was asked, after all attempts."""


class Fleet:
    """Use: `fleet = Fleet(config); await fleet.start(); ...; await fleet.stop()`."""

    def __init__(self, config: ServiceConfig, *, threads: int | None = None):
        """`threads` per engine overrides the equal share, without reserving cores: for engines that take turns."""
        self.device = resolve_device(config.engine.device)
        self.folder = resolve_model(config.model)
        self.policy_config = model_config(self.folder)
        own_config = None
        if config.drafter.model is not None:
            local = resolve_model(config.drafter.model).resolve()
            own_config = model_config(local)
            here = config.drafter.model_copy(update={"model": str(local)})
            config = config.model_copy(update={"drafter": here})
        if (calibration := config.drafter.calibration()) is not None:  # engines on other nodes cannot read the file
            calibrated = config.drafter.model_copy(update={"schedule": calibration})
            config = config.model_copy(update={"drafter": calibrated})
        self.config = config
        self.drafter = make_drafter(config.drafter)
        self.drafter.check(self.policy_config, own_config)
        self.state = StateFolder(config.state) if config.state is not None else None
        self.store = WeightStore(self.folder, self.drafter, config.engine.dtype)
        self.alarms = Alarms(config.alarms)
        self.drafter_since: dict[int, int] = {0: 0}
        """drafter versions, and the policy version that was in service when each came"""
        share = config.engine.cores or max(1, machine_cores() // config.engines)
        self.threads, self.reserved_cores = threads or share, 0 if threads else share
        self.members: list[Member] = []
        self.on_started: Callable[[int], None] = lambda index: None
        self.on_published: Callable[[WeightsOf, int], None] = lambda of, version: None
        self.wasted_tokens = 0
        """of completions that were aborted: by a cancellation, or by a weight update that generates them again"""
        self._counting: set[asyncio.Task[None]] = set()
        self._newest: dict[WeightsOf, int] = {}
        self._watchers: list[asyncio.Task[None]] = []
        self._change = asyncio.Condition()  # an engine came into service
        self._weights_lock = asyncio.Lock()

    # --- life ---

    async def start(self) -> None:
        """Returns when every engine is in service. Raises FleetError when one cannot start."""
        if not ray.is_initialized():
            start_ray(self.config.ray_address, self.config.engine_logs)
        self._take_up_kept_weights()
        options = self._actor_options()
        for index in range(self.config.engines):
            actor = (
                ray.remote(Engine)
                .options(**options)
                .remote(
                    self.config.model_dump(mode="json", exclude={"token"}),
                    str(self.folder.resolve()),
                    self.device,
                    index,
                )
            )
            self.members.append(Member(index, actor))
        try:
            await asyncio.gather(*(self._bring_into_service(member) for member in self.members))
        except RayError as error:
            await self.stop()
            raise FleetError(f"an engine could not start: {error}") from error
        self._watchers = [asyncio.create_task(self._watch(member)) for member in self.members]

    async def stop(self) -> None:
        for task in self._watchers:
            task.cancel()
        stops = asyncio.gather(*(member.actor.stop.remote() for member in self.members), return_exceptions=True)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stops, STOP_WITHIN)
        for member in self.members:
            ray.kill(member.actor, no_restart=True)
        self.store.close()
        if self.state is not None:
            self.state.close()

    def _take_up_kept_weights(self) -> None:
        """What was in service when the state folder was left. Raises FleetError when it does not fit the model."""
        for of, weights_set in self.store.sets.items():
            kept = self.state.kept(of) if self.state is not None else {}
            if not kept:
                continue
            version = max(kept)
            file = self.store.new_file()
            shutil.copyfile(kept[version], file)
            try:
                weights_set.check(version, file)
            except RefusedUpdate as error:
                raise FleetError(
                    f"state: {kept[version]} is not of this model: {error}; choose another folder"
                ) from None
            weights_set.publish(self._locate(version, file, file_checksum(file)), seconds=0.0, pause=0.0)

    def _actor_options(self) -> dict[str, Any]:
        cuda = self.device == "cuda"
        return {
            "num_gpus": self.config.engine.tensor_parallel_size if cuda else 0,
            "num_cpus": 1 if cuda else self.reserved_cores,
            "max_restarts": -1,
            "max_concurrency": 4096,
            "runtime_env": {"env_vars": engine_environment(self.device, self.threads)},
        }

    async def _bring_into_service(self, member: Member) -> None:
        async with self._weights_lock if member.restarts else contextlib.nullcontext():
            files = {of: weights.file for of, weights in self.store.sets.items()}
            started = await member.actor.start.remote(files.get("policy"), files.get("drafter"), member.costs)
            member.in_service, member.costs = True, started.costs
        for function, reason in started.replaced.items():
            if function not in REPORTED:
                REPORTED.add(function)
                logger.warning("Replaced in vLLM: %s, because %s", function, reason)
        self.on_started(member.index)
        async with self._change:
            self._change.notify_all()

    async def _watch(self, member: Member) -> None:
        """Notice an engine's death, wait for Ray's new actor, and bring it into service."""
        restarting = False
        while True:
            try:
                if member.in_service:
                    await asyncio.sleep(CHECK_EVERY)
                    await member.actor.check.remote()
                else:
                    if not restarting:
                        member.restarts += 1
                        logger.warning("engine %d died; starting it again with the weights in service", member.index)
                    restarting = True
                    await self._bring_into_service(member)
                    restarting = False
                    logger.warning("engine %d is in service again", member.index)
            except RayTaskError as error:  # alive, and unable to start: a new actor tries again
                logger.error("engine %d could not start: %s", member.index, error)
                ray.kill(member.actor, no_restart=False)
            except RayError:
                if not member.in_service:  # Ray is still making the new actor
                    await asyncio.sleep(CHECK_EVERY)
                member.in_service = False

    # --- generation ---

    async def _least_loaded(self) -> Member:
        async with self._change:
            waiting = self._change.wait_for(lambda: any(member.in_service for member in self.members))
            try:
                await asyncio.wait_for(waiting, ENGINE_WITHIN)
            except TimeoutError:
                raise FleetError(f"no engine has come into service for {ENGINE_WITHIN:.0f} s") from None
        return min((m for m in self.members if m.in_service), key=lambda m: m.load)

    async def generate(self, group: GroupRequest) -> Group:
        """The finished group. Cancelling aborts it in the engine. Raises FleetError after ATTEMPTS engines died."""
        deaths = 0
        while deaths < ATTEMPTS:
            member = await self._least_loaded()
            key = f"group-{uuid.uuid4().hex}"
            member.add_load(group.n)
            call = asyncio.ensure_future(member.actor.generate.remote(group, key))
            try:
                outcome = await asyncio.shield(call)
                if isinstance(outcome, Group):
                    return outcome
                self.wasted_tokens += outcome.tokens  # a weight update aborted it: again, with the new weights
            except asyncio.CancelledError:
                member.actor.abort.remote(key)
                self._count_what_it_leaves(call)
                raise
            except ENGINE_LOST:
                member.in_service = False
                deaths += 1
            finally:
                member.load -= group.n
        raise FleetError(f"group {group.id or group.prompt_token_ids}: its engine died {ATTEMPTS} times in a row")

    def _count_what_it_leaves(self, call: "asyncio.Future[Group | Aborted]") -> None:
        async def count() -> None:
            with contextlib.suppress(RayError):
                outcome = await call
                if isinstance(outcome, Aborted):
                    self.wasted_tokens += outcome.tokens
                else:
                    self.wasted_tokens += sum(len(completion.token_ids) for completion in outcome.completions)

        task = asyncio.create_task(count())
        self._counting.add(task)
        task.add_done_callback(self._counting.discard)

    async def openai(self, method: str, path: str, headers: dict[str, str], body: bytes) -> AsyncIterator[Any]:
        """One request to vLLM's own routes in the least loaded engine: a ResponseStart, then pieces of the body."""
        for _ in range(ATTEMPTS):
            member = await self._least_loaded()
            member.add_load(1)
            stream = member.actor.openai.options(num_returns="streaming").remote(method, path, headers, body)
            started = False
            try:
                async for reference in stream:
                    part = await reference
                    started = started or isinstance(part, ResponseStart)
                    yield part
                return
            except ENGINE_LOST:
                member.in_service = False
                if started:  # what was sent cannot be taken back
                    raise
            finally:
                ray.cancel(stream)
                member.add_load(-1)
        raise FleetError(f"the engine that answered died {ATTEMPTS} times in a row")

    # --- control ---

    async def push(self, of: WeightsOf, version: int, file: Path, checksum: str) -> WeightStatus:
        """Load a file into every engine and publish its version. `file` is ours: kept while in service; `checksum` is
        what its bytes must have: each engine verifies them as it reads them, before it changes anything.

        Raises RefusedUpdate while every engine holds what it held, FleetError when no engine could take it. The status
        says `skipped` when a newer version came while this one was waiting for its turn.
        """
        weights_set = self.store.sets[of]
        weights_set.check(version, file)
        self._newest[of] = max(version, self._newest.get(of, 0))
        async with self._weights_lock:
            if version < self._newest[of]:
                file.unlink(missing_ok=True)
                return weights_set.status.model_copy(update={"skipped": True})
            try:
                weights_set.check(version, file)  # another version may have come into service meanwhile
                return await self._load_everywhere(of, version, file, checksum)
            except BaseException:
                self._newest[of] = weights_set.status.version
                raise

    async def _load_everywhere(self, of: WeightsOf, version: int, file: Path, checksum: str) -> WeightStatus:
        began = time.monotonic()
        if self.state is not None:
            await self._keep(self.state, of, version, file, checksum)
        weights = self._locate(version, file, checksum)
        members = [member for member in self.members if member.in_service]
        loads = [member.actor.load.remote(weights, of == "drafter") for member in members]
        results = await asyncio.gather(*loads, return_exceptions=True)
        failed = [(m, r) for m, r in zip(members, results, strict=True) if isinstance(r, BaseException)]
        if failed and all(isinstance(r, DifferentBytes) for r in results):
            self._forget_all_but_published(of)
            message = f"{failed[0][1]}: push again"
            raise RefusedUpdate(message, [Problem(field="checksum", message=message)])
        for member, error in failed:
            # Half-loaded weights serve nobody: the engine starts again with what is then in service.
            logger.error("engine %d could not load %s version %d: %s", member.index, of, version, error)
            member.in_service = False
            ray.kill(member.actor, no_restart=False)
        if len(failed) == len(members):
            self._forget_all_but_published(of)
            reason = failed[0][1] if failed else "none is in service"
            raise FleetError(f"no engine could load {of} version {version}: {reason}")
        loaded = {m.index: r for m, r in zip(members, results, strict=True) if not isinstance(r, BaseException)}
        is_new = self.store.differs(of, file, checksum)
        pause = max(report.pause for report in loaded.values())
        status = self.store.sets[of].publish(weights, time.monotonic() - began, pause)
        self._forget_all_but_published(of)
        policy, drafter = (self.store.version(name) for name in ("policy", "drafter"))
        if of == "drafter":
            self.drafter_since[version] = policy
        self.alarms.after_push(of, policy, drafter, is_new=is_new, loaded=loaded)
        for member, error in failed:
            if isinstance(error, DifferentBytes):
                self.alarms.different_bytes(of, policy, drafter, member.index, str(error))
        self.on_published(of, version)
        return status

    async def _keep(self, state: StateFolder, of: WeightsOf, version: int, file: Path, checksum: str) -> None:
        try:
            kept = await asyncio.to_thread(state.keep, of, version, file)
        except OSError as full:
            message = f"version {version} could not be kept in {state.folder}: {full.strerror}"
            raise RefusedUpdate(message, [Problem(field="state", message=message)], status=507) from full
        try:
            check_received(kept, checksum)
        except RefusedUpdate:
            self._forget_all_but_published(of)
            raise

    def _forget_all_but_published(self, of: WeightsOf) -> None:
        if self.state is not None:
            self.state.forget_all_but(of, self.store.sets[of].status.version)

    def _locate(self, version: int, file: Path, checksum: str) -> WeightsFile:
        here = ray.get_runtime_context().get_node_id()
        elsewhere = any(node["Alive"] and node["NodeID"] != here for node in ray.nodes())
        stored = None
        if elsewhere:
            import numpy as np

            stored = ray.put(np.fromfile(file, dtype=np.uint8))
        return WeightsFile(version, str(file), checksum, here, stored)

    async def set_draft_sampling(self, draft_sampling: str) -> None:
        await asyncio.gather(*(member.actor.set_draft_sampling.remote(draft_sampling) for member in self.members))

    async def set_verification(self, verification: str) -> None:
        await asyncio.gather(*(member.actor.set_verification.remote(verification) for member in self.members))

    async def schedules(self) -> list[DraftSchedule]:
        """How many tokens each engine in service drafts at present; none without a drafter."""
        if self.config.drafter.kind == "none":
            return []
        return await asyncio.gather(*(member.actor.schedule.remote() for member in self.members if member.in_service))

    async def measure(self, plan: "Plan") -> "Measured":
        """Costs of steps on the first engine, while nothing else is generated."""
        return await self.members[0].actor.measure.remote(plan)

    async def set_draft_lengths(self, ranges: list[Range]) -> None:
        await asyncio.gather(*(member.actor.set_draft_lengths.remote(ranges) for member in self.members))

    async def speculation(self) -> list[dict[str, Any]]:
        """Counts by version, one row an engine and version."""
        calls = [member.actor.speculation.remote() for member in self.members if member.in_service]
        return [row for rows in await asyncio.gather(*calls) for row in rows]

    async def check_acceptance(self) -> None:
        """Raise the alarms that the counts so far give reason to; an engine that dies meanwhile has no say."""
        with contextlib.suppress(*ENGINE_LOST):
            self.alarms.check_acceptance(await self.speculation())

    async def context_acceptance(self) -> list[dict[int, list[int]]]:
        """Histograms of accepted drafts by context length, one an engine."""
        calls = [member.actor.context_acceptance.remote() for member in self.members if member.in_service]
        return await asyncio.gather(*calls)

    async def metrics(self) -> dict[int, str]:
        """vLLM's Prometheus text of each engine in service, by its index."""
        members = [member for member in self.members if member.in_service]
        texts = await asyncio.gather(*(member.actor.metrics.remote() for member in members))
        return {member.index: text for member, text in zip(members, texts, strict=True)}

    async def ready(self, timeout: float = 5.0) -> bool:
        """Whether every engine is in service and answers."""
        if not all(member.in_service for member in self.members):
            return False
        try:
            await asyncio.wait_for(asyncio.gather(*(m.actor.check.remote() for m in self.members)), timeout)
        except (TimeoutError, RayError):
            return False
        return True
