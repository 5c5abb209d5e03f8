"""Weight versions: what an update must hold, and what is in service.

Only a WeightSet keeps the version in service. Others ask `WeightStore.version`, or are told of a published version
(`Pushes.on_published`). An engine keeps only what it holds itself, and the state folder keeps what a restarted service
continues with.
"""

import asyncio
import math
from pathlib import Path

from safetensors import safe_open

from drafters.drafter import Drafter
from drafters.files.checkpoint_folder import TensorSpec, checkpoint_specs, read_tensors, tensor_specs
from drafters.kinds.mtp import is_mtp
from rollout_service.engine.loading import WeightsFile
from rollout_service.protocol import Problem, WeightsOf, WeightStatus
from rollout_service.transports import RefusedUpdate, Update, WeightsFolder
from rollout_service.transports.folder import spare_file
from rollout_service.transports.transport import refused
from rollout_service.weights.manifest import problems

HEADER_ALLOWANCE = 16 << 20


class WeightSet:
    """The policy's or the drafter's tensors: their specification and the version in service."""

    def __init__(self, of: WeightsOf, expected: dict[str, TensorSpec], dtype: str):
        self.of, self.expected, self.dtype = of, expected, dtype
        elements = sum(math.prod(spec.shape) for spec in expected.values())
        self.status = WeightStatus(version=0, tensors=len(expected), bytes=0, checksum="")
        """changed only by `publish`, `relabel` and `release`"""
        # The widest dtype has eight bytes an element, so a larger body cannot be an update of these tensors.
        self.largest_bytes = 8 * elements + HEADER_ALLOWANCE
        self.file: WeightsFile | None = None
        self._file_for = asyncio.Lock()

    @property
    def version(self) -> int:
        return self.status.version

    def check(self, version: int, update: Update) -> None:
        """Raises RefusedUpdate with everything that is wrong with the version and the tensors' names and shapes."""
        self.check_version(version)
        try:
            found = problems(tensor_specs(update.file), self.expected, self.dtype)
        except ValueError as error:
            raise refused("body", str(error)) from None
        if found:
            raise RefusedUpdate(
                f"the whole {self.of} update was refused: {len(found)} of its tensors do not fit; "
                f"version {self.version} stays in service",
                found,
            )

    def check_version(self, version: int) -> None:
        """Raises RefusedUpdate for a version that is not above the one in service."""
        if version <= self.version:
            message = f"version {version} is not above {self.version}, which is in service; versions only grow"
            raise refused("version", message, status=409)

    def check_owner(self, run: str | None, take_over: bool) -> None:
        """Raises RefusedUpdate when the weights in service belong to another run than the push, unless the push takes
        over. A push without a run belongs to no run."""
        owner = self.status.run
        if owner is None or owner == run or take_over:
            return
        push = "this push names no run" if run is None else f"this push is of the run {run!r}"
        message = f"the {self.of} in service, version {self.version}, belongs to the run {owner!r}, and {push}"
        what_to_do = (
            "wait until that run ends, or continue it (`rl-loop train --resume`), or take the service over from it "
            "(take_over=true, `rl-loop train --take_over`)"
        )
        raise RefusedUpdate(message, [Problem(field="run", message=what_to_do)], status=409)

    def release(self) -> None:
        """From now on the weights in service belong to no run."""
        self.status = self.status.model_copy(update={"run": None})

    def relabel(self, version: int) -> WeightStatus:
        """Give the weights in service, which have a file, a higher version."""
        assert self.file is not None
        self.file = self.file._replace(version=version)
        self.status = self.status.model_copy(update={"version": version})
        return self.status

    async def file_for(self, node: str) -> WeightsFile | None:
        """What is in service, so that an engine on `node` can read it. Nothing must be published meanwhile."""
        async with self._file_for:  # the engines of a start ask at the same time
            if self.file is not None:
                self.file = await asyncio.to_thread(self.file.for_nodes, [node])
            return self.file

    def publish(self, weights: WeightsFile, seconds: float, pause: float, run: str | None = None) -> WeightStatus:
        """Put `weights` into service, which every engine now holds and which belong to `run`. The file that was in
        service becomes the spare one."""
        path = Path(weights.path)
        if self.file is not None:
            Path(self.file.path).rename(spare_file(path.parent, self.of))
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
    """Both weight sets of a service, and the shared-memory folder that their files lie in.

    The file in service is kept, because an engine that restarts loads it.
    """

    def __init__(self, policy_folder: Path, drafter: Drafter, dtype: str):
        self.folder = WeightsFolder()
        self.policy_folder = policy_folder
        self.sets: dict[WeightsOf, WeightSet] = {
            "policy": WeightSet("policy", checkpoint_specs(policy_folder, lambda name: not is_mtp(name)), dtype)
        }
        of_drafter = self.drafter_folder = drafter.checkpoint(policy_folder)
        if of_drafter is not None:
            self.sets["drafter"] = WeightSet("drafter", checkpoint_specs(of_drafter, drafter.owns), dtype)

    def version(self, of: WeightsOf) -> int:
        """The version in service; 0 if the drafter has no weights of its own."""
        return self.sets[of].version if of in self.sets else 0

    def differs(self, of: WeightsOf, update: Update) -> bool | None:
        """Whether an update differs from what is in service; None if only reading a whole policy would tell.

        A service's first drafter comes from a checkpoint, whose tensors are compared in the update's dtype. Equal
        tensors then give None, because a trainer that begins with that checkpoint may push it to be sure.
        """
        in_service = self.sets[of].status
        if in_service.version > 0:
            return update.checksum != in_service.checksum
        return None if of == "policy" else self._differs_from_checkpoint(update.file) or None

    def close(self) -> None:
        self.folder.close()

    def _differs_from_checkpoint(self, file: Path) -> bool:
        assert self.drafter_folder is not None
        loaded = read_tensors(self.drafter_folder, self.sets["drafter"].expected.__contains__)
        with safe_open(file, "pt") as update:
            pushed = {name: update.get_tensor(name) for name in loaded}
        return not all(bool((loaded[name].to(t.dtype) == t).all()) for name, t in pushed.items())
