"""Pushes: a version's file is checked, kept, loaded by every engine in service, and then published.

- One push is loaded at a time, and no engine restarts meanwhile. Of a run's pushes that wait for their turn only the
  newest is loaded.
- The weights belong to the run that pushed them. Another run's push is refused until the run releases them, unless the
  push takes over.
- A version is published when every engine in service holds it. An engine that could not load it restarts with what is
  then in service. An engine that falls silent while it loads goes out of service, and the push does not wait for it.
- With a state folder, a version is kept there before any engine loads it. A restarted service continues with it.
"""

import asyncio
import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import ray

from rollout_service.engine.loading import DifferentBytes, HalfLoaded, Loaded, WeightsFile, locate
from rollout_service.fleet.alarms import Alarms
from rollout_service.fleet.member import FleetError, LeftService, Member, in_words
from rollout_service.protocol import WeightsOf, WeightStatus
from rollout_service.tensor_bytes import file_checksum
from rollout_service.transports import RefusedUpdate, Update
from rollout_service.transports.transport import check_received, refused
from rollout_service.weights.state_folder import StateFolder
from rollout_service.weights.versions import WeightStore

logger = logging.getLogger("rollout_service")

SLOWEST_LOAD = 100e6
"""bytes that an engine loads in a second at least; it answers nothing meanwhile"""
DRAFTERS_KEPT = 256
"""drafter versions whose age is known; more than an engine counts apart"""


def seconds_to_load(weights: WeightsFile) -> float:
    return Path(weights.path).stat().st_size / SLOWEST_LOAD


class Pushes:
    """Use: `await fleet.pushes.push("policy", version, update)`."""

    def __init__(self, store: WeightStore, state: StateFolder | None, alarms: Alarms, members: list[Member]):
        """`members` are the fleet's, which adds to them later."""
        self.store, self.state, self.alarms, self.members = store, state, alarms, members
        self.lock = asyncio.Lock()
        """held during a push, and while an engine restarts"""
        self.ranks = 1
        """of each engine, which check a part of the bytes each"""
        self.on_published: Callable[[WeightsOf, int], None] = lambda of, version: None
        self.drafter_since: dict[int, int] = {0: 0}
        """the newest drafter versions, each with the policy version that was in service when it came"""
        self.check_awake: Callable[[], None] = lambda: None
        """raises RefusedUpdate while engines have no memory for weights"""
        self._waiting: list[tuple[WeightsOf, str | None, int]] = []
        """weight set, run and version of each push that waits for its turn"""

    def take_up_kept(self) -> None:
        """Put the weights that the state folder keeps into service. Raises FleetError when they do not fit the
        model."""
        for of, weights_set in self.store.sets.items():
            kept = self.state.kept(of) if self.state is not None else {}
            if not kept:
                continue
            version = max(kept)
            run = self.state.owner(of, version) if self.state is not None else None
            file = self.store.folder.new_file()
            shutil.copyfile(kept[version], file)
            update = Update(file, file_checksum(file))
            try:
                weights_set.check(version, update)
            except RefusedUpdate as error:
                raise FleetError(
                    f"state: {kept[version]} does not fit this model: {error}; choose another folder"
                ) from None
            weights_set.publish(locate(version, update, self.ranks, ()), seconds=0.0, pause=0.0, run=run)

    async def push(
        self,
        of: WeightsOf,
        version: int,
        update: Update,
        run: str | None = None,
        take_over: bool = False,
        over: int | None = None,
    ) -> WeightStatus:
        """Load an update into every engine and publish its version, which then belongs to `run`. Its file is kept while
        it is in service, and deleted otherwise. Each engine verifies the checksum of the bytes that it reads before it
        changes anything.

        Raises RefusedUpdate; every engine then holds what it held before. Raises FleetError when no engine could load
        the update. The status says `skipped` when a newer version of the run came while this one waited for its turn,
        or another than `over` is in service then.
        """
        weights_set, waiting = self.store.sets[of], (of, run, version)
        try:
            weights_set.check_owner(run, take_over)
            weights_set.check(version, update)
            self._waiting.append(waiting)
            try:
                await self.lock.acquire()
            finally:
                self._waiting.remove(waiting)
            try:
                # Another push may have come into service meanwhile, of this run or of another.
                weights_set.check_owner(run, take_over)
                if self._is_overtaken(of, run, version) or over not in (None, weights_set.version):
                    return weights_set.status.model_copy(update={"skipped": True})
                weights_set.check(version, update)
                self.check_awake()
                return await self._load_everywhere(of, version, update, run)
            finally:
                self.lock.release()
        finally:
            if weights_set.file is None or weights_set.file.path != str(update.file):
                update.file.unlink(missing_ok=True)

    def _is_overtaken(self, of: WeightsOf, run: str | None, version: int) -> bool:
        """Whether a newer version of the same run is in service already, or waits for its turn."""
        in_service = self.store.sets[of].status
        waiting = any(other[:2] == (of, run) and other[2] > version for other in self._waiting)
        return waiting or (in_service.run == run and in_service.version > version)

    async def release(self, run: str) -> int:
        """From now on the run's weights belong to no run; they stay in service. Returns the number of these weight
        sets. Waits for a push that is being loaded, because it would make them the run's again."""
        async with self.lock:
            released = [(of, weights) for of, weights in self.store.sets.items() if weights.status.run == run]
            for of, weights_set in released:
                weights_set.release()
                if self.state is not None:
                    self.state.release(of, weights_set.version)
            return len(released)

    async def relabel(self, version: int) -> WeightStatus:
        """Give the policy in service, which was pushed, a higher version on every engine and in the state folder.
        Raises RefusedUpdate, and FleetError when no engine could do it; the version is then what it was."""
        of: WeightsOf = "policy"
        async with self.lock:
            weights_set = self.store.sets[of]
            weights_set.check_owner(None, False)
            weights_set.check_version(version)
            if self.state is not None:
                try:
                    self.state.keep_as(of, weights_set.version, version)
                except OSError as full:
                    message = f"version {version} could not be kept in {self.state.folder}: {full.strerror}"
                    raise refused("state", message, status=507) from full
            members = [member for member in self.members if member.in_service]
            calls = [member.answer(member.actor.relabel.remote(version)) for member in members]
            results = await asyncio.gather(*calls, return_exceptions=True)
            failed = [(m, r) for m, r in zip(members, results, strict=True) if isinstance(r, BaseException)]
            for member, error in failed:
                logger.error("engine %d could not take %s version %d: %s", member.index, of, version, in_words(error))
                self._restart(member, error)
            if len(failed) == len(members):
                self._forget_all_but_published(of)
                raise FleetError(f"no engine could take {of} version {version}; push again once one is in service")
            status = weights_set.relabel(version)
            try:
                self._forget_all_but_published(of)
                self.on_published(of, version)
            except Exception:  # as after a push
                logger.exception("%s version %d is in service, but what follows a push failed", of, version)
            return status

    def _restart(self, member: Member, error: BaseException) -> None:
        """It comes into service again with what is then in service. So does one that left service, without this."""
        if not isinstance(error, LeftService):
            member.leave()
            ray.kill(member.actor, no_restart=False)

    async def _load_everywhere(self, of: WeightsOf, version: int, update: Update, run: str | None) -> WeightStatus:
        began, before = time.monotonic(), self.store.sets[of].status.run
        if self.state is not None:
            await self._keep(self.state, of, version, update, run)
        nodes = {member.node for member in self.members if member.in_service}
        weights = await asyncio.to_thread(locate, version, update, self.ranks, nodes)
        members = [member for member in self.members if member.in_service]
        loads = [self._load(member, weights, of == "drafter") for member in members]
        results = await asyncio.gather(*loads, return_exceptions=True)
        failed = [(m, r) for m, r in zip(members, results, strict=True) if isinstance(r, BaseException)]
        if failed and all(isinstance(r, DifferentBytes) for r in results):
            self._forget_all_but_published(of)
            raise refused("checksum", f"{in_words(failed[0][1])}: push again")
        for member, error in failed:
            logger.error("engine %d could not load %s version %d: %s", member.index, of, version, in_words(error))
            self._restart(member, error)  # it must not serve half-loaded weights
        if len(failed) == len(members):
            self._forget_all_but_published(of)
            reason = in_words(failed[0][1]) if failed else "none is in service"
            raise FleetError(f"no engine could load {of} version {version}: {reason}")
        loaded = {m.index: r for m, r in zip(members, results, strict=True) if not isinstance(r, BaseException)}
        is_new = self.store.differs(of, update)
        pause = max(report.pause for report in loaded.values())
        status = self.store.sets[of].publish(weights, time.monotonic() - began, pause, run)
        if before not in (None, run):
            logger.warning("%s version %d: the run %r took over from the run %r", of, version, run, before)
        try:
            self._forget_all_but_published(of)
            self._tell_of(of, version, is_new, loaded, failed)
        except Exception:  # the version is in service, and an error would say that it is not
            logger.exception("%s version %d is in service, but what follows a push failed", of, version)
        return status

    async def _load(self, member: Member, weights: WeightsFile, of_drafter: bool) -> Loaded:
        with member.busy(seconds_to_load(weights)):
            return await member.answer(member.actor.load.remote(weights, of_drafter))

    def _tell_of(
        self,
        of: WeightsOf,
        version: int,
        is_new: bool | None,
        loaded: dict[int, Loaded],
        failed: list[tuple[Member, BaseException]],
    ) -> None:
        """Raise the alarms, and tell whoever waits for a new version."""
        policy, drafter = (self.store.version(name) for name in ("policy", "drafter"))
        if of == "drafter":
            self.drafter_since = dict([*self.drafter_since.items(), (version, policy)][-DRAFTERS_KEPT:])
        self.on_published(of, version)
        self.alarms.after_push(of, policy, drafter, is_new=is_new, loaded=loaded)
        for member, error in failed:
            if isinstance(error, DifferentBytes | HalfLoaded):
                self.alarms.different_bytes(of, policy, drafter, member.index, in_words(error))

    async def _keep(self, state: StateFolder, of: WeightsOf, version: int, update: Update, run: str | None) -> None:
        try:
            kept = await asyncio.to_thread(state.keep, of, version, update.file, run)
        except OSError as full:
            message = f"version {version} could not be kept in {state.folder}: {full.strerror}"
            raise refused("state", message, status=507) from full
        try:
            check_received(kept, update.checksum)
        except RefusedUpdate:
            self._forget_all_but_published(of)
            raise

    def _forget_all_but_published(self, of: WeightsOf) -> None:
        if self.state is not None:
            self.state.forget_all_but(of, self.store.sets[of].version)
