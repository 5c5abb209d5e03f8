"""Commands of the project in files that start it: the configuration that each gets, or what is wrong with it."""

import contextlib
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from documents.commands import CONFIGURED
from documents.shell import commands_of

from drafters.settings import read_command_line


def configurations(script: str, root: Path | None = None) -> Iterator[Any]:
    """The configuration of each command of ours in a shell script. With `root`, absolute paths are below it.

    Raises ValueError with what the command says when it refuses its flags or its file.
    """
    for _, words in commands_of(script):
        words = words[1:] if words[:1] == ["exec"] else words
        if (command := CONFIGURED.get(" ".join(words[:2]))) is None:
            continue
        flags = [str(root) + word if root and word.startswith("/") else word for word in words[2:]]
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                yield read_command_line(command.config, command.program, flags)
        except SystemExit:
            raise ValueError(said.getvalue().strip()) from None


def below(root: Path, text: str) -> str:
    """TOML with each absolute path below `root`."""
    return re.sub(r'"(/[^"\n]*)"', lambda found: f'"{root}{found[1]}"', text)
