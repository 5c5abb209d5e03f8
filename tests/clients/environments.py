"""The environment of a client: its Python and its packages, installed into .clients/NAME.

git ignores that folder. uv links files from its cache, so two environments with the same torch hold it once.
"""

import hashlib
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".clients"
UV = str(Path(sys.executable).parent / "uv")
PYENV = Path.home() / ".pyenv" / "versions"


@dataclass(frozen=True)
class Environment:
    name: str
    requirements: tuple[str, ...]
    python: str = "3.11"
    without_torch: bool = False
    """leave torch out: the client names its types only, and there may be no CPU build of it for this Python"""
    any_python: tuple[str, ...] = ()
    """packages that are installed alone, whatever they say about the version of Python"""

    @property
    def folder(self) -> Path:
        return FOLDER / self.name

    def make(self) -> Path:
        """Install what is not installed yet. Returns the environment's Python. Raises CalledProcessError."""
        interpreter, stamp = self.folder / "bin" / "python", self.folder / "installed"
        digest = hashlib.sha256(repr(self).encode()).hexdigest()
        if stamp.is_file() and stamp.read_text() == digest:
            return interpreter
        print(f"Installing into {self.folder.relative_to(ROOT)}: {', '.join(self.requirements)} ...", file=sys.stderr)
        call(UV, "venv", "--quiet", "--clear", "--seed", "--python", self.python, str(self.folder))
        overrides = ROOT / "deploy" / "overrides.txt"
        if self.without_torch:
            overrides = self.folder / "overrides.txt"
            overrides.write_text("torch; sys_platform == 'never'\n")
        install = UV, "pip", "install", "--quiet", "--python", str(interpreter), "--override", str(overrides)
        call(*install, *torch_from(), *self.requirements)
        if self.any_python:
            alone = "--quiet", "--no-deps", "--ignore-requires-python"
            call(str(interpreter), "-m", "pip", "install", *alone, *self.any_python)
        stamp.write_text(digest)
        return interpreter


def torch_from() -> tuple[str, ...]:
    """Where the CPU build of torch comes from, as in the Makefile."""
    folder = os.environ.get("PIP_FIND_LINKS")
    return ("--find-links", folder) if folder else ("--torch-backend", "cpu")


def call(*command: str) -> None:
    """Run a command in the root of the tree. It also finds the Pythons of pyenv."""
    folders = [str(folder / "bin") for folder in sorted(PYENV.glob("3.*"))] if PYENV.is_dir() else []
    path = os.pathsep.join([os.environ["PATH"], *folders])
    subprocess.run(command, check=True, cwd=ROOT, env=clean(os.environ) | {"PATH": path})


def clean(environment: Mapping[str, str]) -> dict[str, str]:
    """Without what would bring this tree's own packages into a client's environment."""
    return {name: value for name, value in environment.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
