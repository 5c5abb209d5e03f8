"""Configuration of a command: a TOML file, flags of the same names over it, `--help`, and `--dry-run`.

    config = read_command_line(ServiceConfig, "rollout-service launch", argv)

A nested field is a dotted flag (`--drafter.kind mtp`). Unknown names and wrong values end the program with exit code 2
and one line a field, before anything starts.
"""

import argparse
import json
import os
import sys
import tomllib
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator
from pydantic_settings import BaseSettings, CliSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from drafters.text_lines import read_text


def in_home(path: Path) -> Path:
    """`~` at the beginning is the home folder, as in a shell."""
    return Path(os.path.expanduser(path))  # which leaves an unknown user's as it is, and Path.expanduser raises


class Section(BaseModel):
    """A part of a configuration. A docstring under a field is its help text; unknown names are errors."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    @field_validator("*")
    @classmethod
    def _home(cls, value: Any) -> Any:
        return in_home(value) if isinstance(value, Path) else value


ConfigT = TypeVar("ConfigT", bound=BaseModel)


def read_command_line(config_type: type[ConfigT], program: str, argv: list[str]) -> ConfigT:
    """The configuration of `program` from `argv`; prints it and exits for `--dry-run`.

    Errors: exits with 2 after printing each wrong field, its value and what is allowed.
    """
    first = argparse.ArgumentParser(prog=program, add_help=False)
    first.add_argument("--config", type=Path, metavar="FILE", help="TOML file to read; flags go over it")
    first.add_argument("--dry-run", action="store_true", help="print the resolved configuration and exit")
    chosen, rest = first.parse_known_args(argv)
    from_file = _read_toml(program, chosen.config)

    # pydantic-settings reads flags into a settings class; the sources are ordered by precedence.
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
                root_parser=_with_help(program, first),
                cli_hide_none_type=True,
                cli_avoid_json=True,
            )
            return flags, init_settings

    Settings.__doc__ = config_type.__doc__
    try:
        resolved = config_type.model_validate(Settings(**from_file).model_dump(exclude_unset=True))
    except ValidationError as error:
        for problem in error.errors():
            where = ".".join(str(part) for part in problem["loc"]) or "configuration"
            value = "" if problem["type"] == "missing" else f" (got {problem['input']!r})"
            print(f"{program}: {where}: {problem['msg']}{value}", file=sys.stderr)
        sys.exit(2)
    if chosen.dry_run:
        print(json.dumps(resolved.model_dump(mode="json"), indent=2))
        sys.exit(0)
    return resolved


def _read_toml(program: str, path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        return tomllib.loads(read_text(in_home(path)))
    except (OSError, ValueError) as error:
        print(f"{program}: --config {path}: {error}", file=sys.stderr)
        sys.exit(2)


def _with_help(program: str, first: argparse.ArgumentParser) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=program, parents=[first], formatter_class=argparse.RawDescriptionHelpFormatter)
