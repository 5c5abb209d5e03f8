"""Command lines in documents: the command's own parser accepts each, and each file that it names exists."""

import contextlib
import io
import os
import re
import tempfile
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from documents.pages import ROOT
from generate.configuration import COMMANDS, Command
from generate.http_api import document
from pydantic import SecretStr, ValidationError

from drafters.drafter import DraftSettings
from drafters.files.toml_file import merged, read_toml
from drafters.settings import read_command_line
from drafters.wrong_fields import field_names, wrong_fields
from rollout_service import bearer_token, certificates

CONFIGURED = {command.program: command for command in COMMANDS.values()}
OTHERS = {"rollout-service": {"patches"}, "drafters": {"inspect"}, "rl-loop": set()}
"""commands without a configuration"""
OURS = (*OTHERS, "make", "python")
NEEDED = {"model": "m", "policy": "m", "prompts": "p", "data": "d", "out": "o", "kind": "eagle3",
          "drafter": {"kind": "mtp"}}  # fmt: skip
"""values of required fields that a document leaves out"""
STAND_IN = re.compile(r"[A-Z][A-Z_]*|\.\.\.|.*\$.*|<.*>")
"""a value that the reader replaces"""
OF_THE_REST = re.compile(r"has no effect with|is needed|needs ")
"""errors that depend on a configuration file, so that they mean nothing if the file is not known"""
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TOPICS = re.findall(r"^TOPICS := (.*)", MAKEFILE, re.MULTILINE)[0].split()
TARGETS = {*re.findall(r"^([\w-]+):", MAKEFILE, re.MULTILINE), *(f"test-{topic}" for topic in TOPICS)}
VARIABLES = {*re.findall(r"^(\w+) [?:]?=", MAKEFILE, re.MULTILINE)}
FOLDERS = ("deploy/", "docs/", "drafters/", "rl_loop/", "rollout_service/", "tests/")


@contextlib.contextmanager
def another_machine() -> Iterator[None]:
    """A reader's machine, on which every file that a field names exists, and which has many cores."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "is_file", lambda _: True)
        patch.setattr(Path, "is_dir", lambda _: True)
        patch.setattr(os, "sched_getaffinity", lambda _: range(1024))
        patch.setattr(bearer_token, "read_token", lambda _, field: SecretStr(field))
        patch.setattr(certificates, "check_pair", lambda *_: None)
        patch.setattr(certificates, "check_authority", lambda _: None)
        patch.setattr(DraftSettings, "calibration", lambda _: None)
        patch.chdir(ROOT)
        yield


def wrong_toml(command: Command, text: str) -> list[str]:
    """What is wrong with a configuration. Required fields may be missing."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        return [f"no TOML: {error}"]
    data.pop("extends", None)
    with another_machine():
        try:
            command.config.model_validate(merged(_needed(command, data), data))
        except ValidationError as error:
            return wrong_fields(error, command.config)
    return []


def _needed(command: Command, given: Mapping[str, object]) -> dict[str, object]:
    fields = command.config.model_fields.items()
    return {name: NEEDED[name] for name, field in fields if field.is_required() and name not in given}


def wrong_command(words: list[str], files: Mapping[str, str]) -> Iterator[str]:
    """What is wrong with a command of the project's. `files`: the titled blocks of the page, by title."""
    while words and re.fullmatch(r"\w+=.*", words[0]):
        words = words[1:]
    for path in (word.partition("::")[0] for word in words):
        if path.startswith(FOLDERS) and not (ROOT / path).exists():
            yield f"{path}: there is no such file"
    program, *arguments = [words[0].rsplit("/", 1)[-1], *words[1:]] if words else [""]
    if program in OTHERS:
        yield from _ours(program, arguments, files)
    elif program == "make":
        yield from _make(arguments)
    elif re.fullmatch(r"(python|bash|sh)[\d.]*", program) and arguments and not arguments[0].startswith("-"):
        script = arguments[0]
        if not (ROOT / script).is_file() and script not in files and not STAND_IN.fullmatch(script):
            yield f"{script}: there is no such script"
    elif program == "curl":
        yield from _curl(arguments)


def _make(words: list[str]) -> Iterator[str]:
    for word in words:
        name, given, _ = word.partition("=")
        if word.startswith("-") or STAND_IN.fullmatch(word.removeprefix("test-")):
            continue
        if given and name not in VARIABLES:
            yield f"make {name}=: the Makefile has no such variable"
        elif not given and name not in TARGETS:
            yield f"make {name}: there is no such target"


def _ours(program: str, arguments: list[str], files: Mapping[str, str]) -> Iterator[str]:
    subcommand = arguments[0] if arguments else "--help"
    command = CONFIGURED.get(f"{program} {subcommand}")
    if command is not None:
        yield from _configured(command, arguments[1:], files)
    elif subcommand not in OTHERS[program] | {"--help", "-h"} and not STAND_IN.fullmatch(subcommand):
        yield f"{program} {subcommand}: there is no such command"


def _configured(command: Command, flags: list[str], files: Mapping[str, str]) -> Iterator[str]:
    if "--help" in flags:
        return
    yield from _without_stand_ins(flags := list(flags), {*field_names(command.config), "config"})
    with contextlib.ExitStack() as stack:
        given, known = _configuration(flags, files, stack)
        names = {flag.removeprefix("--").partition("=")[0].partition(".")[0] for flag in flags if flag.startswith("--")}
        for name, value in _needed(command, dict(given) | dict.fromkeys(names)).items():
            flags += [f"--{name}.kind", "mtp"] if name == "drafter" else [f"--{name}", str(value)]
        printed = stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(another_machine())
        try:
            read_command_line(command.config, command.program, [*flags, "--dry-run"])
        except SystemExit as end:
            if end.code == 0:
                return
    yield from (line for line in printed.getvalue().splitlines() if known or not OF_THE_REST.search(line))


def _without_stand_ins(flags: list[str], names: set[str]) -> list[str]:
    """Removes the flags whose value is a stand-in. Returns an error for each that is no flag."""
    wrong = []
    for i, word in reversed(list(enumerate(flags))):
        if word == "...":
            del flags[i]
        elif STAND_IN.fullmatch(word):
            flag = flags[i - 1] if i else word
            if flag.removeprefix("--") not in names and not STAND_IN.fullmatch(flag.removeprefix("--")):
                wrong.append(f"{flag}: there is no such flag")
            del flags[max(0, i - 1) : i + 1]
    return wrong


def _configuration(
    flags: list[str], files: Mapping[str, str], stack: contextlib.ExitStack
) -> tuple[Mapping[str, object], bool]:
    """What the file of `--config` holds, and whether the file is known: it is in the tree or a block of the page.

    A block is written into a temporary file, which lives as long as `stack`. The flag of an unknown file is removed.
    """
    if "--config" not in flags:
        return {}, False
    at = flags.index("--config") + 1
    name = flags[at] if at < len(flags) else ""
    if (ROOT / name).is_file():
        return read_toml(ROOT / name), True
    if name not in files:
        del flags[at - 1 : at + 1]
        return {}, False
    file = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "config.toml"
    file.write_text(text := re.sub(r"^extends = .*", "", files[name], flags=re.MULTILINE), encoding="utf-8")
    flags[at] = str(file)
    return tomllib.loads(text), True


def _curl(arguments: list[str]) -> Iterator[str]:
    routes = (*document()["paths"], "/docs", "/openapi.json")
    for url in filter(None, (re.match(r"https?://[^/]+:\d+(/[^?]*)", word) for word in arguments)):
        if not any(same_path(url[1], route) for route in routes):
            yield f"{url[1]}: there is no such route"


def same_path(written: str, template: str) -> bool:
    """A part in braces or in capital letters stands for any other."""
    pairs = list(zip(written.split("/"), template.split("/"), strict=False))
    alike = all(a == b or b.startswith("{") or a.startswith("{") or STAND_IN.fullmatch(a) for a, b in pairs)
    return alike and written.count("/") == template.count("/")
