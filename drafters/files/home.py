"""Home folder: `~` in a path from a user."""

import os
from pathlib import Path


def in_home(path: Path) -> Path:
    """`path` with a leading `~` replaced by the home folder, as in a shell."""
    return Path(os.path.expanduser(path))  # leaves an unknown user's `~name` as it is; Path.expanduser raises
