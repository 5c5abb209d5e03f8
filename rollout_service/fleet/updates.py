"""Updates: weight updates as vLLM's clients make them, in several calls. Each ends as one push (pushes.py).

    start ------> a session: an empty file with a place for each tensor
    update, ... > tensors into the file: from a folder, a file in shared memory, or a trainer's NCCL group
    finish -----> every tensor is there, so the file is pushed whole: checked, kept, loaded everywhere, published

- Nothing changes before `finish`. A session that is cut, or lacks a tensor, changes nothing at all.
- There is one session at a time. An update that fails ends it, as in vLLM.
- A session that is silent for SILENCE seconds is dropped, and so is one whose trainer opens a new connection: its
  trainer has died.
"""

import asyncio
import errno
import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from drafters.files.checkpoint_folder import weight_files
from rollout_service.engine.update_file import UpdateFile
from rollout_service.fleet.controls import Controls
from rollout_service.fleet.pushes import Pushes
from rollout_service.fleet.transfer import Transfer
from rollout_service.protocol import MAX_VERSION, SharedMemoryPush, WeightsOf, WeightStatus
from rollout_service.tensor_bytes import file_checksum
from rollout_service.transports import RefusedUpdate, Update
from rollout_service.transports.folder import make_writable
from rollout_service.transports.transport import refused
from rollout_service.weights.checkpoint_files import folder_files, write_files
from rollout_service.weights.update_rules import rules_of
from rollout_service.weights.versions import WeightStore

logger = logging.getLogger("rollout_service")

SILENCE = 300.0
"""seconds without a call after which a session is dropped"""
OWN = "weight_dir", "file"
"""forms of `update_info` that are the service's own; every other one is vLLM's"""


@dataclass
class Session:
    update: UpdateFile
    began: float = field(default_factory=time.time)
    at_work: bool = False
    """a call is writing tensors"""
    timer: asyncio.TimerHandle | None = None

    @property
    def of(self) -> WeightsOf:
        return self.update.rules.of

    def end(self) -> None:
        """Forget what came."""
        if self.timer is not None:
            self.timer.cancel()
        self.update.file.unlink(missing_ok=True)


@dataclass(frozen=True)
class Pushed:
    """An update that is in service, and the names that were left out of it."""

    of: WeightsOf
    status: WeightStatus
    left_out: list[str]


class Updates:
    """Use: `start("policy")`, `await update({"weight_dir": "/weights"})`, `await finish(None)`."""

    def __init__(self, store: WeightStore, pushes: Pushes, controls: Controls, device: str):
        self.store, self.pushes, self.transfer = store, pushes, Transfer(controls, device)
        self.session: Session | None = None
        self._of_folders: dict[tuple[WeightsOf, Path], asyncio.Task[Pushed]] = {}
        """pushes of folders that are under way"""
        self._numbering = asyncio.Lock()  # two updates must not get the same number

    # --- a session ---

    async def start(self, of: WeightsOf) -> None:
        """Raises RefusedUpdate when a session is open, when the weights belong to a run, or when the drafter has no
        weights."""
        if of not in self.store.sets:
            raise refused("drafter", "the drafter in service has no weights of its own; update the policy only")
        self.store.sets[of].check_owner(None, False)
        self._check_that_none_is_open()
        session = Session(await self._new_file(of))
        try:
            self._check_that_none_is_open()
        except RefusedUpdate:
            session.end()
            raise
        self.session = session
        self._wait_for_the_next_call(self.session)

    def _check_that_none_is_open(self) -> None:
        if self.session is not None:
            since = time.strftime("%H:%M:%S", time.localtime(self.session.began))
            raise refused(
                "session",
                f"a weight update of the {self.session.of} is open since {since}; finish it. If its trainer has died, "
                f"the service drops it after {SILENCE:.0f} s without a call, or at /init_weight_transfer_engine",
                status=409,
            )

    async def update(self, info: dict[str, Any]) -> list[str]:
        """Add tensors to the session. Returns the names that were left out so far. Raises RefusedUpdate, and FleetError
        when a transfer fails. The session is over then."""
        session = self._take()
        try:
            if any(name in info for name in OWN):
                await self._read(session.update, info)
            else:
                await self.transfer.receive(session.update, info)
        except BaseException:
            self._drop(session)
            raise
        if self.session is not session:
            raise refused("session", "this weight update was dropped: a trainer opened a new connection", status=409)
        self._wait_for_the_next_call(session)
        return sorted(session.update.left_out)

    async def finish(self, version: str | None) -> Pushed:
        """Push what the session holds as `version`, or as the one after that in service. Raises RefusedUpdate and
        FleetError. Nothing has changed then, and the session is over, unless only the version was wrong."""
        session = self._take()
        try:
            number = self._number(session.of, version, "weight_version")
        except RefusedUpdate:
            self._wait_for_the_next_call(session)
            raise
        self.session = None  # from here on its file is the push's, and nothing else may drop it
        return await self._push(session.update, number)

    def _take(self) -> Session:
        """The open session, for one call."""
        session = self.session
        if session is None:
            message = (
                f"no weight update is open: POST /start_weight_update first. One that failed, or was silent for "
                f"{SILENCE:.0f} s, is over"
            )
            raise refused("session", message, status=409)
        if session.at_work:
            raise refused("session", "another call of this weight update is under way; wait for its answer", status=409)
        session.at_work = True
        if session.timer is not None:
            session.timer.cancel()
        return session

    def _wait_for_the_next_call(self, session: Session) -> None:
        def is_silent() -> None:
            logger.warning("a weight update was dropped: no call came for %d s", SILENCE)
            self._drop(session)

        if self.session is not session:  # it was dropped during the call
            return
        session.at_work = False
        session.timer = asyncio.get_running_loop().call_later(SILENCE, is_silent)

    def _drop(self, session: Session) -> None:
        session.end()
        if self.session is session:
            self.session = None

    # --- where tensors come from ---

    async def _read(self, update: UpdateFile, info: dict[str, Any]) -> None:
        for name in info:
            if name not in OWN or len(info) > 1:
                raise refused(f"update_info.{name}", "give weight_dir or file, and nothing beside it")
        files = [self._shared_file(info["file"])] if "file" in info else folder_files(info["weight_dir"])
        await asyncio.to_thread(write_files, update, files)

    def _shared_file(self, name: Any) -> Path:
        file = self.store.folder.path / SharedMemoryPush.model_validate({"file": name}).file
        if not file.is_file():
            raise refused("file", f"no file {name!r} in {self.store.folder.path}")
        return file

    async def open_transfer(self, init_info: dict[str, Any]) -> str:
        """Join a trainer's NCCL group, or agree on CUDA IPC. Returns which. A session that another trainer left open is
        dropped. Raises RefusedUpdate on a CPU, and when `init_info` is wrong."""
        self.transfer.check()
        if self.session is not None:
            logger.warning("a weight update was dropped: a trainer opens a new connection")
            self._drop(self.session)
        return await self.transfer.open(init_info)

    async def close_transfer(self) -> None:
        await self.transfer.close()

    # --- whole updates in one call ---

    async def push_folder(self, of: WeightsOf, folder: Any) -> Pushed:
        """Push the safetensors files of a folder on this machine as the next version. A second call for a folder whose
        push is under way waits for that one, because clients try again when an answer takes long."""
        self.store.sets[of].check_owner(None, False)
        files = folder_files(folder)
        key = of, Path(folder)
        if key not in self._of_folders:
            task = self._of_folders[key] = asyncio.create_task(self._push_files(of, files))
            task.add_done_callback(lambda _: self._of_folders.pop(key))
        return await asyncio.shield(self._of_folders[key])

    async def _push_files(self, of: WeightsOf, files: list[Path]) -> Pushed:
        return await self._push(await self._filled(of, files), None)

    async def _filled(self, of: WeightsOf, files: list[Path]) -> UpdateFile:
        """A new update with the tensors of these files."""
        update = await self._new_file(of)
        try:
            await asyncio.to_thread(write_files, update, files)
        except BaseException:
            update.file.unlink(missing_ok=True)
            raise
        return update

    async def relabel(self, version: str) -> WeightStatus:
        """Give the policy in service a higher version. The checkpoint that the service started with has no file that a
        restarted engine could load under a version, so it is pushed."""
        weights_set = self.store.sets["policy"]
        weights_set.check_owner(None, False)
        number = self._number("policy", version, "new_version")
        assert number is not None
        if weights_set.version == 0:
            update = await self._filled("policy", weight_files(self.store.policy_folder))
            checksum = await self._checksum(update)
            status = await self.pushes.push("policy", number, Update(update.file, checksum), over=0)
            if not status.skipped:
                return status
        return await self.pushes.relabel(number)  # also if another version came meanwhile

    def _number(self, of: WeightsOf, version: str | None, field: str) -> int | None:
        """Raises RefusedUpdate when the text is no version, or not above the one in service."""
        if version is None:
            return None
        number = version_number(version, field)
        self.store.sets[of].check_version(number)
        return number

    async def _new_file(self, of: WeightsOf) -> UpdateFile:
        rules = rules_of(self.store, of)
        file = make_writable(self.store.folder.new_file(), of)
        try:
            return await asyncio.to_thread(UpdateFile.create, file, rules)
        except OSError as error:
            file.unlink(missing_ok=True)
            if error.errno != errno.ENOSPC:
                raise
            message = f"{self.store.folder.path} has no room for the {of}'s tensors; make room in /dev/shm"
            raise refused("weights", message, status=507) from None

    async def _push(self, update: UpdateFile, number: int | None) -> Pushed:
        """`number`: the version, or None for the one after that in service."""
        of, checksum = update.rules.of, await self._checksum(update)
        async with self._numbering:
            if number is None:
                number = self.store.sets[of].version + 1
            status = await self.pushes.push(of, number, Update(update.file, checksum))
        if status.skipped:
            message = f"a newer version than {number} came while this one waited for its turn"
            raise refused("weight_version", message, status=409)
        if update.left_out:
            logger.info("%s version %d: left out %s", of, number, ", ".join(sorted(update.left_out)))
        return Pushed(of, status, sorted(update.left_out))

    async def _checksum(self, update: UpdateFile) -> str:
        """The checksum of a whole update. Raises RefusedUpdate when a tensor is missing; its file is then deleted."""
        try:
            update.complete()
            return await asyncio.to_thread(file_checksum, update.file)
        except BaseException:
            update.file.unlink(missing_ok=True)
            raise


def version_number(text: str, field: str) -> int:
    """Raises RefusedUpdate when the text is not a version."""
    number = int(text) if text.isascii() and text.isdigit() and len(text) <= len(str(MAX_VERSION)) else 0
    if not 1 <= number <= MAX_VERSION:
        raise refused(field, f'{text!r} is no version: give a whole number from 1, such as "13"')
    return number
