"""Errors for wrong fields of a configuration, one line each: the name, what is allowed, and the given value.

port: Input should be less than or equal to 65535 (got 70000)
learnin_rate: there is no such field; did you mean learning_rate?
"""

import re
import types
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, SecretStr, ValidationError

from drafters.by_kind import kind_of

ALIKE = 0.7
"""ratio of common letters from which two names count as similar"""
MOST_NAMES = 3
LONGEST_VALUE = 80
"""number of characters of a value that are shown"""


def wrong_fields(error: ValidationError, config_type: type[BaseModel]) -> list[str]:
    """One line for each wrong field. `error` is from `config_type`, or from a settings class derived from it."""
    names = list(dict.fromkeys(field_names(config_type)))
    said: dict[str, list[str]] = {}
    values: dict[str, str] = {}
    for problem in error.errors(include_url=False):
        if problem["type"] == "default_factory_not_called":  # another field is wrong, and has its own line
            continue
        location, message = problem["loc"], problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            where = _dotted([*field_path(location[:-1], config_type)[0], location[-1]])
            said[where] = [
                new_name(where, config_type)
                or _of_another_kind(location, config_type)
                or f"there is no such field{did_you_mean(where, names)}"
            ]
            continue
        path, sections = field_path(location, config_type)
        where = _dotted(path)
        if problem["type"] == "model_type" and len(path) == len(location):
            message = f"is a section; its fields are {', '.join(n for s in sections for n in s.model_fields)}"
        named = re.match(r"([a-z_]+)(?:\.[a-z_.]+)?: ", message)
        if where and named and any(named[1] in section.model_fields for section in sections):
            where, message = (
                f"{where}.{named[0].removesuffix(': ')}",
                message[named.end() :],
            )  # a section names its field
        said.setdefault(where, []).append(message)
        if problem["type"] != "missing":
            values.setdefault(where, shown(problem["input"], path, config_type))
    return [
        f"{where}{': ' if where else ''}{'; or: '.join(dict.fromkeys(messages))}{values.get(where, '')}"
        for where, messages in said.items()
    ]


def _of_another_kind(location: Sequence[str | int], config_type: type[BaseModel]) -> str | None:
    """The error for a field that only other kinds of the section have; it names them. None for other fields."""
    path, alternatives = field_path(location[:-2], config_type)
    having = [kind_of(section) for section in alternatives if location[-1] in section.model_fields]
    if not having or len(path) < len(field_path(location[:-1], config_type)[0]):
        return None
    return f"kind = {location[-2]!r} has no such field; it belongs to {', '.join(having)}"


def new_name(where: str, config_type: type[BaseModel]) -> str | None:
    """The error for an old name of a field, or of the section that it was in; None for a name that never was."""
    parts = where.split(".")
    for depth in range(len(parts)):
        before, last = parts[:depth], parts[depth]
        for section in field_path(before, config_type)[1]:
            if last in getattr(section, "renamed", {}):
                name = ".".join([*before, section.renamed[last], *parts[depth + 1 :]])  # type: ignore[attr-defined]
                return f"its name is {name} now"
    return None


def _dotted(path: Sequence[str | int]) -> str:
    return ".".join(map(str, path))


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """A question with the names whose last part is most similar to that of `name`; empty if none is similar.

    Names of the same section come first and exclude others.
    """

    def parts(dotted: str) -> tuple[str, str]:
        section, _, last = dotted.lstrip("-").replace("-", "_").rpartition(".")
        return section, last

    own, wrong = parts(name)
    by_last: dict[str, list[str]] = {}
    for known in names:
        by_last.setdefault(parts(known)[1], []).append(known)
    near = [known for last in get_close_matches(wrong, by_last, n=2, cutoff=ALIKE) for known in by_last[last]]
    near = [known for known in near if parts(known)[0] == own] or near
    return f"; did you mean {' or '.join(near[:MOST_NAMES])}?" if near else ""


def field_names(config_type: type[BaseModel], before: str = "") -> Iterator[str]:
    """The names of all fields, those of sections included, with dots as in flags."""
    for name, field in config_type.model_fields.items():
        yield before + name
        for section in models_in(field.annotation):
            yield from field_names(section, f"{before}{name}.")


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The sections in a field's type: the type itself, the members of a union, or the items of a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) is Annotated:
        yield from models_in(get_args(annotation)[0])
    elif get_origin(annotation) in (list, Union, types.UnionType):
        for part in get_args(annotation):
            yield from models_in(part)


def field_path(
    location: Sequence[str | int], config_type: type[BaseModel]
) -> tuple[Sequence[str | int], list[type[BaseModel]]]:
    """The part of pydantic's location that is a field of the configuration, and the sections that the field may hold.

    Between the parts of the field, a location has the kinds of sections. After them it names the alternative of a field
    that may have several types. Both are left out.
    """
    path: list[str | int] = []
    sections = [config_type]
    for part in location:
        if isinstance(part, str):
            fields = [section.model_fields[part] for section in sections if part in section.model_fields]
            of_kind = [section for section in sections if kind_of(section) == part]
            if not fields and of_kind:
                sections = of_kind
                continue
            if not fields:
                break
            sections = [section for field in fields for section in models_in(field.annotation)]
        path.append(part)
    return path, sections


def shown(value: Any, path: Sequence[str | int], config_type: type[BaseModel]) -> str:
    """A wrong value in brackets. It is empty for a whole section, whose other fields may be right, and for a secret."""
    if isinstance(value, dict | BaseModel) or is_secret(path, config_type):
        return ""
    text = repr(value)
    return f" (got {text if len(text) <= LONGEST_VALUE else text[:LONGEST_VALUE] + ' ...'})"


def is_secret(path: Sequence[str | int], config_type: type[BaseModel]) -> bool:
    field = config_type.model_fields.get(str(path[0])) if path else None
    return field is not None and SecretStr in (field.annotation, *get_args(field.annotation))
