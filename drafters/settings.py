"""Configuration of a command: a TOML file, flags of the same names that override it, `--help`, and `--dry-run`.

    config = read_command_line(ServiceConfig, "rollout-service launch", argv)

A nested field is a dotted flag (`--drafter.kind mtp`). A file may extend another (drafters/files/toml_file.py). Unknown
names and wrong values end the program before anything starts, with exit code 2 and one line for each field
(drafters/wrong_fields.py).
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, NoReturn, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from drafters.files.home import in_home
from drafters.files.toml_file import read_toml
from drafters.wrong_fields import did_you_mean, new_name, wrong_fields


def _is_file(path: Path) -> Path:
    path = in_home(path)
    if not path.is_file():
        raise ValueError("no such file")
    return path


ExistingFile = Annotated[Path, AfterValidator(_is_file)]
"""pydantic's FilePath does not know `~`"""


class Section(BaseModel):
    """A part of a configuration. A docstring under a field is its help text; unknown names are errors."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)
    renamed: ClassVar[Mapping[str, str]] = {}
    """old names of fields and sections, with the new name or advice: the error for an old name says it"""

    @field_validator("*")
    @classmethod
    def _home(cls, value: Any) -> Any:
        return in_home(value) if isinstance(value, Path) else value

    def refuse_unread(self, names: Iterable[str], where: str) -> None:
        """Raises ValueError for the first of these fields that is given, because nothing reads it with `where`.

        A field that equals its default counts as not given, so that a configuration can be written and read again.
        """
        for name in names:
            field, value = type(self).model_fields[name], getattr(self, name)
            if value != field.get_default(call_default_factory=True):
                raise ValueError(f"{name}: has no effect with {where}; leave it out (got {value!r})")


def _at_most_the_cores(threads: int) -> int:
    cores = len(os.sched_getaffinity(0))
    if threads > cores:
        raise ValueError(f"more than the {cores} core(s) of this machine")
    return threads


Threads = Annotated[int, Field(ge=0), AfterValidator(_at_most_the_cores)]
"""CPU threads of a command; 0 for all cores"""

ConfigT = TypeVar("ConfigT", bound=BaseModel)


def read_command_line(config_type: type[ConfigT], program: str, argv: list[str], epilog: str = "") -> ConfigT:
    """The configuration of `program` from `argv`. For `--dry-run` it is printed, and the program exits.

    `epilog` is the last paragraph of `--help`. After errors the program exits with 2. It prints one line for each wrong
    field: its value and what is allowed, or for an unknown field the nearest names.
    """
    first = _Parser(prog=program, add_help=False, allow_abbrev=False)
    first.add_argument("--config", type=Path, metavar="FILE", help="TOML file to read; flags override it")
    first.add_argument("--dry-run", action="store_true", help="print the resolved configuration and exit")
    chosen, rest = first.parse_known_args(argv)
    from_file = _from_file(program, chosen.config)
    parser = _with_help(program, first, epilog)
    parser.config_type = config_type

    # pydantic-settings reads flags into a settings class. The first source has precedence.
    class Settings(config_type, BaseSettings):  # type: ignore[valid-type, misc]
        model_config = SettingsConfigDict(extra="forbid", use_attribute_docstrings=True)

        @classmethod
        def settings_customise_sources(  # type: ignore[override]
            cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource, **_: Any
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            flags = CliSettingsSource[Any](
                settings_cls,
                cli_prog_name=program,
                cli_parse_args=rest,
                root_parser=parser,
                cli_hide_none_type=True,
                cli_avoid_json=True,
            )
            return flags, init_settings

    Settings.__doc__ = config_type.__doc__
    try:
        resolved = config_type.model_validate(Settings(**from_file).model_dump(exclude_unset=True))
    except ValidationError as error:
        print(*(f"{program}: {line}" for line in wrong_fields(error, config_type)), sep="\n", file=sys.stderr)
        sys.exit(2)
    except SettingsError as error:  # the value of a flag for a table or a list
        field = re.findall(r"for (?:field )?\"?([\w.]+)", str(error))[0]
        parser.error(f"{field}: a table is written as JSON, '{{\"name\": 1}}', a list as '[1, 2]'")
    if chosen.dry_run:
        print(json.dumps(resolved.model_dump(mode="json"), indent=2))
        sys.exit(0)
    return resolved


def _from_file(program: str, path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        return read_toml(in_home(path))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error).removeprefix(f"{path}, ")
        print(f"{program}: --config {path}: {reason}", file=sys.stderr)
        sys.exit(2)


class _Parser(argparse.ArgumentParser):
    """Prints one line for a wrong command line, and for an unknown flag the nearest names."""

    config_type: type[BaseModel]

    def error(self, message: str) -> NoReturn:
        before, _, unknown = message.partition("unrecognized arguments: ")
        if not before:
            names = (word.split("=")[0] for word in unknown.split(" "))
            message = (
                "; ".join(f"{name}: {self._no_such_flag(name)}" for name in names if name.startswith("--"))
                or f"{unknown!r} belongs to no flag"
            )
        self.exit(2, f"{self.prog}: {message}\n")

    def _no_such_flag(self, name: str) -> str:
        if (renamed := new_name(name.removeprefix("--"), self.config_type)) is not None:
            return renamed
        flags = [flag for action in self._actions for flag in action.option_strings]
        return f"there is no such flag{did_you_mean(name, flags)}"


def _with_help(program: str, first: argparse.ArgumentParser, epilog: str) -> "_Parser":
    return _Parser(
        prog=program, parents=[first], formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        epilog=epilog,
    )  # fmt: skip
