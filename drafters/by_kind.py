"""Sections of a configuration whose fields depend on `kind`: one class for each kind, with `kind` a Literal.

Loss = by_kind([GRPO, DAPO])        # [loss] kind = "dapo" is a DAPO; without a kind it is a GRPO, the first class
"""

from collections.abc import Sequence
from typing import Annotated, Any, Union

from pydantic import BaseModel, Discriminator, Tag


def by_kind(sections: Sequence[type[BaseModel]], other: type[BaseModel] | None = None) -> Any:
    """The type of such a section. `other`, if given, takes every kind that none of `sections` has, and validates it."""
    known = {kind_of(section): section for section in sections}

    def chosen(value: Any) -> str | None:
        kind = value.get("kind", kind_of(sections[0])) if isinstance(value, dict) else getattr(value, "kind", None)
        return kind if kind in known or other is None or not isinstance(kind, str) else kind_of(other)

    alternatives = [*sections, other] if other is not None else sections
    return Annotated[
        Union[tuple(Annotated[section, Tag(kind_of(section))] for section in alternatives)],  # noqa: UP007
        Discriminator(
            chosen,
            custom_error_type="no_such_kind",
            custom_error_message=f"is a section; its kind is one of {', '.join(known)}",
        ),
    ]


def kind_of(section: type[BaseModel]) -> str:
    """The kind of a section. A section for all other kinds has the title of its field `kind` instead."""
    field = section.model_fields.get("kind")
    kind = None if field is None else field.title or field.default
    return kind if isinstance(kind, str) else section.__name__


def kinds_described(sections: Sequence[type[BaseModel]]) -> str:
    """Help text for such a section: one line for each kind, with its docstring and its defaults.

    Defaults that equal those of the first kind are left out: `--help` shows them with the fields.
    """
    shown = {name: field.default for name, field in sections[0].model_fields.items()}
    lines = []
    for section in sections:
        own = [
            f"{name} {field.default}"
            for name, field in section.model_fields.items()
            if name != "kind" and field.default_factory is None and field.default != shown.get(name)
        ]
        said = [(section.__doc__ or "").strip(), ", ".join(own)]
        lines.append(f"  {kind_of(section)}: {'; '.join(filter(None, said))}")
    return "\n".join(lines)
