"""The shared-memory folder of a service: the files that trainers on its machine write, and its engines read.

/dev/shm/rollout-service-3f.../
    owner                      locked while the service runs; a start deletes the folders of services that were killed
    token                      the folder's name; a client that can read it is on this machine, and may push through it
    push-....safetensors       written by a trainer, which deletes it once its push is answered
    received-....safetensors   the service's own: a version on its way to the engines, and the version in service
    spare-policy.safetensors   the version before; the next push writes over it, which is faster than into new memory
"""

import contextlib
import fcntl
import shutil
import uuid
from pathlib import Path

from rollout_service.protocol import WeightsOf

SHARED_MEMORY = Path("/dev/shm")
OWNER, TOKEN = "owner", "token"


class WeightsFolder:
    """The folder of a running service."""

    def __init__(self) -> None:
        remove_orphans()
        self.path = SHARED_MEMORY / f"rollout-service-{uuid.uuid4().hex}"
        making = self.path.with_name(f".{self.path.name}")  # else one not locked yet were an orphan to another service
        making.mkdir(mode=0o700)
        self.owner = (making / OWNER).open("w", encoding="utf-8")
        fcntl.flock(self.owner, fcntl.LOCK_EX)
        (making / TOKEN).write_text(self.path.name, encoding="utf-8")
        making.rename(self.path)

    def new_file(self) -> Path:
        """A path that no file has yet."""
        return self.path / f"received-{uuid.uuid4().hex}.safetensors"

    def close(self) -> None:
        self.owner.close()
        shutil.rmtree(self.path, ignore_errors=True)


def is_of_this_machine(folder: Path) -> bool:
    """Whether a service's folder is on this machine, and can be read."""
    try:
        return (folder / TOKEN).read_text(encoding="utf-8") == folder.name
    except OSError:
        return False


def spare_file(folder: Path, of: WeightsOf) -> Path:
    """The file of a version that is no longer in service. Whoever can rename it may write over it."""
    return folder / f"spare-{of}.safetensors"


def make_writable(file: Path, of: WeightsOf) -> Path:
    """Make `file` of the spare file in its folder, or make an empty file. Returns `file`."""
    try:
        spare_file(file.parent, of).rename(file)
    except FileNotFoundError:
        file.touch()
    return file


def remove_orphans() -> None:
    """Remove the folders of services that were killed: nobody holds the lock in them any more."""
    for file in SHARED_MEMORY.glob(f"rollout-service-*/{OWNER}"):
        with contextlib.suppress(OSError), file.open("r+", encoding="utf-8") as owner:
            fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(file.parent, ignore_errors=True)
