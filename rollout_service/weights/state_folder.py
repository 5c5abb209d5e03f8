"""The state folder: what a restarted service continues with. Only one service at a time uses it.

state/format                      the number of this layout; a folder with another number is refused
state/lock                        held while a service runs (flock: a killed one releases it)
state/queue.sqlite                the batch queue
state/weights/policy-12.safetensors   the version in service, one file a weight set
state/weights/policy-12.json          {"run": NAME}: the run that it belongs to; no file if it belongs to no run
"""

import fcntl
import json
import os
import re
from pathlib import Path

from blake3 import blake3

from drafters.files.durable import make_folders, rename_lasting, replacing, sync
from drafters.files.stored_format import OtherFormat
from rollout_service.protocol import WeightsOf

FORMAT = 1
"""format of the folder's files, except the queue; tests/unit/test_stored_formats.py says when to raise it"""
UNNUMBERED = 1
"""format of folders from before formats had numbers"""
INSTEAD = "start the version that wrote it, or choose another folder, and push the weights again"
KEPT = re.compile(r"(policy|drafter)-\d+\.(safetensors|json)")


class StateFolder:
    def __init__(self, folder: Path):
        """Raises ValueError when another service uses the folder, it has another format, or it cannot be written."""
        self.folder = folder
        self.weights = folder / "weights"
        try:
            make_folders(self.weights)
            self.lock = (folder / "lock").open("w", encoding="utf-8")
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"state: {folder} belongs to a service that is running; choose another folder") from None
        except OSError as error:
            raise ValueError(f"state: {folder}: {error.strerror}") from error
        self._check_format(folder / "format")
        for partial in self.weights.glob(".*"):
            partial.unlink()

    def _check_format(self, file: Path) -> None:
        """Raises OtherFormat, and leaves the folder as it was."""
        number = int(file.read_text(encoding="utf-8")) if file.is_file() else 0
        strange = [kept.name for kept in self.weights.glob("[!.]*") if not KEPT.fullmatch(kept.name)]
        if (number or UNNUMBERED) != FORMAT or strange:
            found = f"{number} with weights/{min(strange)}" if strange else number
            raise OtherFormat(self.folder, found, FORMAT, INSTEAD)
        if number != FORMAT:
            with replacing(file) as partial:
                partial.write_text(f"{FORMAT}\n", encoding="utf-8")

    @property
    def queue(self) -> Path:
        return self.folder / "queue.sqlite"

    def keep(self, of: WeightsOf, version: int, file: Path, run: str | None = None) -> str:
        """Keep a copy on disk, and return its checksum. Earlier versions stay until `forget_all_but`. The version
        belongs to `run`. Raises OSError when the disk is full."""
        kept = self.weights / f"{of}-{version}.safetensors"
        partial = kept.with_name(f".{kept.name}")
        hasher = blake3()
        self.release(of, version)
        try:
            if run is not None:
                self._write_owner(of, version, run)
            with file.open("rb") as source, partial.open("wb") as copy:
                while chunk := source.read(1 << 20):
                    hasher.update(chunk)
                    copy.write(chunk)
            rename_lasting(partial, kept)
        except OSError:
            partial.unlink(missing_ok=True)
            raise
        return hasher.hexdigest()

    def keep_as(self, of: WeightsOf, version: int, new: int) -> None:
        """Keep a kept version under another number as well, with its owner. Raises OSError."""
        run = self.owner(of, version)
        self.release(of, new)
        if run is not None:
            self._write_owner(of, new, run)
        kept = self.weights / f"{of}-{new}.safetensors"
        kept.unlink(missing_ok=True)
        os.link(self.weights / f"{of}-{version}.safetensors", kept)
        sync(self.weights)

    def kept(self, of: WeightsOf) -> dict[int, Path]:
        """The kept files by version."""
        files = self.weights.glob(f"{of}-*.safetensors")
        return {int(m[1]): file for file in files if (m := re.fullmatch(rf"{of}-(\d+)\.safetensors", file.name))}

    def forget_all_but(self, of: WeightsOf, version: int) -> None:
        for file in self.weights.glob(f"{of}-*"):
            if file.stem != f"{of}-{version}":
                file.unlink()

    def owner(self, of: WeightsOf, version: int) -> str | None:
        """The run that a kept version belongs to."""
        file = self._owner(of, version)
        return json.loads(file.read_text(encoding="utf-8"))["run"] if file.is_file() else None

    def release(self, of: WeightsOf, version: int) -> None:
        """From now on a kept version belongs to no run."""
        self._owner(of, version).unlink(missing_ok=True)

    def _write_owner(self, of: WeightsOf, version: int, run: str) -> None:
        with replacing(self._owner(of, version)) as owner:
            owner.write_text(json.dumps({"run": run}), encoding="utf-8")

    def _owner(self, of: WeightsOf, version: int) -> Path:
        return self.weights / f"{of}-{version}.json"

    def close(self) -> None:
        self.lock.close()
