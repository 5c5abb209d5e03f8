"""Home folder: `~` in a path that a user wrote."""

import os
from pathlib import Path


def in_home(path: Path) -> Path:
    """`~` at the beginning is the home folder, as in a shell."""
    return Path(os.path.expanduser(path))  # which leaves an unknown user's as it is, and Path.expanduser raises
