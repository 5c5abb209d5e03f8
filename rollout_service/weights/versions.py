"""Weight versions: what an update must hold, where its bytes lie, and what is in service.

Pushed bytes become a file in the service's shared-memory folder. Engines on this machine read that file; for engines on
other nodes it is put once into Ray's object store. The file in service is kept: an engine that restarts takes it.
That of the version before becomes the spare one, which the next push writes over: new memory costs three times as much.
"""

import contextlib
import fcntl
import os
import shutil
import uuid
from pathlib import Path

from safetensors import safe_open

from drafters.drafter import Drafter
from drafters.kinds.mtp import is_mtp
from rollout_service.engine.engine import WeightsFile
from rollout_service.protocol import Problem, WeightsOf, WeightStatus, spare_file
from rollout_service.weights.manifest import TensorSpec, checkpoint_tensors, file_tensors, problems

SHARED_MEMORY = Path("/dev/shm")
OWNER = "owner"
"""file that a service holds a lock on while it runs"""
HEADER_ALLOWANCE = 16 << 20


class RefusedUpdate(ValueError):
    """An update that was not loaded anywhere: what is wrong with it. `status` is the HTTP status that says so."""

    def __init__(self, message: str, problems: list[Problem], status: int = 400):
        super().__init__(message)
        self.problems, self.status = problems, status


class WeightSet:
    """The policy's or the drafter's tensors: their specification and the version in service."""

    def __init__(self, of: WeightsOf, expected: dict[str, TensorSpec], dtype: str):
        self.of, self.expected, self.dtype = of, expected, dtype
        elements = sum(_elements(spec) for spec in expected.values())
        self.status = WeightStatus(version=0, tensors=len(expected), bytes=0, checksum="")
        # Eight bytes an element is the widest dtype there is: a larger body cannot be an update of these tensors.
        self.largest_bytes = 8 * elements + HEADER_ALLOWANCE
        self.file: WeightsFile | None = None

    def check(self, version: int, file: Path) -> None:
        """Raises RefusedUpdate with everything that is wrong with the version and the tensors' names and shapes."""
        if version <= self.status.version:
            message = f"version {version} is not above {self.status.version}, which is in service; versions only grow"
            raise RefusedUpdate(message, [Problem(field="version", message=message)], status=409)
        try:
            found = problems(file_tensors(file), self.expected, self.dtype)
        except ValueError as error:
            raise RefusedUpdate(str(error), [Problem(field="body", message=str(error))]) from None
        if found:
            raise RefusedUpdate(
                f"the {self.of} update was refused as a whole: {len(found)} of its tensors do not fit; "
                f"version {self.status.version} stays in service",
                found,
            )

    def check_owner(self, run: str | None, take_over: bool) -> None:
        """Raises RefusedUpdate when the weights in service belong to another run than the push, which is not to take
        over. A push without a run is nobody's."""
        owner = self.status.run
        if owner is None or owner == run or take_over:
            return
        push = "this push names no run" if run is None else f"this push is of the run {run!r}"
        message = f"the {self.of} in service, version {self.status.version}, belongs to the run {owner!r}, and {push}"
        what_to_do = (
            "wait for that run's end, or go on with it (`rl-loop train --resume`), or take the service over from it "
            "(take_over=true, `rl-loop train --take_over`)"
        )
        raise RefusedUpdate(message, [Problem(field="run", message=what_to_do)], status=409)

    def release(self) -> None:
        """The weights in service are nobody's from here on."""
        self.status = self.status.model_copy(update={"run": None})

    def publish(self, weights: WeightsFile, seconds: float, pause: float, run: str | None = None) -> WeightStatus:
        """`weights` is what every engine now holds, and belongs to `run`."""
        path = Path(weights.path)
        if self.file is not None:
            Path(self.file.path).rename(path.with_name(spare_file(self.of)))
        self.file = weights
        self.status = WeightStatus(
            version=weights.version,
            tensors=len(self.expected),
            bytes=path.stat().st_size,
            checksum=weights.checksum,
            seconds=seconds,
            pause=pause,
            run=run,
        )
        return self.status


class WeightStore:
    """Both weight sets of a service and the shared-memory folder their files lie in."""

    def __init__(self, policy_folder: Path, drafter: Drafter, dtype: str):
        remove_orphans()
        self.folder = SHARED_MEMORY / f"rollout-service-{uuid.uuid4().hex}"
        self.folder.mkdir(mode=0o700)
        self.owner = (self.folder / OWNER).open("w", encoding="utf-8")
        fcntl.flock(self.owner, fcntl.LOCK_EX)
        # A client that can read this file is on this machine and may push through the folder.
        (self.folder / "token").write_text(self.folder.name, encoding="utf-8")
        self.sets: dict[WeightsOf, WeightSet] = {
            "policy": WeightSet("policy", checkpoint_tensors(policy_folder, lambda name: not is_mtp(name)), dtype)
        }
        of_drafter = self.drafter_folder = drafter.checkpoint(policy_folder)
        if of_drafter is not None:
            self.sets["drafter"] = WeightSet("drafter", checkpoint_tensors(of_drafter, drafter.owns), dtype)

    def new_file(self) -> Path:
        return self.folder / f"received-{uuid.uuid4().hex}.safetensors"

    def file_to_write(self, of: WeightsOf) -> Path:
        """The spare file under a new name, or a new one."""
        file = self.new_file()
        try:
            (self.folder / spare_file(of)).rename(file)
        except FileNotFoundError:
            file.touch()
        return file

    def adopt(self, name: str) -> Path:
        """A client's file in the folder, under a name of ours: it may unlink its own. Raises RefusedUpdate."""
        file = self.new_file()
        try:
            os.link(self.folder / name, file)
        except FileNotFoundError:
            message = f"no file {name!r} in {self.folder}"
            raise RefusedUpdate(message, [Problem(field="file", message=message)]) from None
        return file

    def version(self, of: WeightsOf) -> int:
        return self.sets[of].status.version if of in self.sets else 0

    def differs(self, of: WeightsOf, file: Path, checksum: str) -> bool | None:
        """Whether an update differs from what is in service; None where only reading a whole policy would tell.

        A service's first drafter comes from a checkpoint, whose tensors are compared in the update's dtype; being equal
        is then no fault: a trainer that begins with that checkpoint may push it to be sure.
        """
        in_service = self.sets[of].status
        if in_service.version > 0:
            return checksum != in_service.checksum
        return None if of == "policy" else self._differs_from_checkpoint(file) or None

    def _differs_from_checkpoint(self, file: Path) -> bool:
        from drafters.files.checkpoint_folder import read_tensors

        assert self.drafter_folder is not None
        loaded = read_tensors(self.drafter_folder, self.sets["drafter"].expected.__contains__)
        with safe_open(file, "pt") as update:
            pushed = {name: update.get_tensor(name) for name in loaded}
        return not all(bool((loaded[name].to(t.dtype) == t).all()) for name, t in pushed.items())

    def close(self) -> None:
        self.owner.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def remove_orphans() -> None:
    """Folders of services that were killed: nobody holds the lock in them any more."""
    for file in SHARED_MEMORY.glob(f"rollout-service-*/{OWNER}"):
        with contextlib.suppress(OSError), file.open("r+", encoding="utf-8") as owner:
            fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(file.parent, ignore_errors=True)


def check_received(received: str, sent: str | None) -> None:
    """Raises RefusedUpdate when bytes with the checksum `received` are not the sender's."""
    if sent is not None and received != sent:
        message = f"received bytes with the BLAKE3 {received}, and the sender's have {sent}: push again"
        raise RefusedUpdate(message, [Problem(field="checksum", message=message)])


def _elements(spec: TensorSpec) -> int:
    count = 1
    for size in spec.shape:
        count *= size
    return count
