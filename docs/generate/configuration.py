"""Pages of configuration, docs/reference/configuration/: each command's fields, with types, defaults and meaning."""

from collections.abc import Iterator
from dataclasses import dataclass

from pydantic import BaseModel

from drafters.exploration.config import FormatsConfig
from drafters.training.config import TrainDrafterConfig
from generate.markdown import code, compose, fill, marked, sentence, table
from generate.schema import FIELDS, Schema, default_of, fields, type_of
from rl_loop.config import TrainConfig
from rollout_service.config import ServiceConfig
from rollout_service.evaluation.audit_config import AuditConfig
from rollout_service.evaluation.calibrate_config import CalibrateConfig
from rollout_service.evaluation.compare_config import CompareConfig
from rollout_service.evaluation.selftest_config import SelftestConfig


@dataclass(frozen=True)
class Command:
    program: str
    config: type[BaseModel]
    file: str
    """what the documents call its TOML file"""


COMMANDS = {
    "launch": Command("rollout-service launch", ServiceConfig, "service.toml"),
    "train": Command("rl-loop train", TrainConfig, "train.toml"),
    "calibrate": Command("rollout-service calibrate", CalibrateConfig, "calibrate.toml"),
    "compare": Command("rollout-service compare", CompareConfig, "compare.toml"),
    "audit": Command("rollout-service audit", AuditConfig, "audit.toml"),
    "selftest": Command("rollout-service selftest", SelftestConfig, "selftest.toml"),
    "drafters-train": Command("drafters train", TrainDrafterConfig, "drafters.toml"),
    "drafters-formats": Command("drafters formats", FormatsConfig, "formats.toml"),
}
"""by the name of their page; a section that several commands have stands on the first page of them"""


@dataclass(frozen=True)
class Section:
    path: str
    """dotted"""
    kinds: list[str]
    """names of its type in `$defs`; several where its fields depend on its `kind`"""
    description: str
    """empty where the kinds describe themselves"""
    repeated: bool = False
    """a list of tables, `[[path]]`"""

    @property
    def title(self) -> str:
        return f"[[{self.path}]]" if self.repeated else f"[{self.path}]"


def pages() -> dict[str, str]:
    shown: dict[str, str] = {}
    return {f"reference/configuration/{name}.md": _page(name, shown) for name in COMMANDS}


def _page(name: str, shown: dict[str, str]) -> str:
    """`shown`: links to the sections of earlier pages, by type. This page's sections are added to it."""
    command = COMMANDS[name]
    schema = command.config.model_json_schema()
    parts = [
        marked(schema["description"]),
        fill(
            "Each field is also a flag: `--field VALUE`, or `--section.field VALUE` in a section. A flag overrides the "
            "file. `--dry-run` prints the resolved configuration and exits. A file may extend another: "
            '`extends = "base.toml"`, relative to its own folder.'
        ),
        "## Top level",
        _table(schema, schema),
    ]
    for section in sections(schema, schema):
        known = section.kinds[0]
        parts += [f"## `{section.title}`", section.description]
        if known in shown:
            parts.append(f"The fields are those of {shown[known]}.")
            continue
        shown[known] = f"[`{command.program}`]({name}.md#{section.path.replace('.', '')})"
        alternatives = [schema["$defs"][kind] for kind in section.kinds]
        parts += [_table(alternatives[0], schema)] if len(alternatives) == 1 else _by_kind(alternatives)
    return compose(
        f"Configuration of {command.program}",
        f"Every field of `{command.file}`, which `{command.program} --config {command.file}` reads.",
        f"the class `{command.config.__name__}`",
        *parts,
    )


def sections(schema: Schema, root: Schema, before: str = "") -> Iterator[Section]:
    """In the order of the classes, each before those in it."""
    for name, field in schema["properties"].items():
        if not (kinds := _kinds(field, root)):
            continue
        described = [root["$defs"][kinds[0]].get("description", ""), field.get("description", "")]
        description = " ".join(map(sentence, filter(None, described))) if len(kinds) == 1 else ""
        yield Section(before + name, kinds, description, repeated=field.get("type") == "array")
        yield from sections(root["$defs"][kinds[0]], root, f"{before}{name}.")


def _kinds(field: Schema, root: Schema) -> list[str]:
    """The types of a field that is a section; none for any other field."""
    parts = field.get("oneOf", [field.get("items", field)])
    return [part["$ref"].rsplit("/", 1)[-1] for part in parts if "$ref" in part]


def _table(schema: Schema, root: Schema) -> str:
    plain = [name for name, field in schema["properties"].items() if not _kinds(field, root)]
    rows = fields(schema | {"properties": {name: schema["properties"][name] for name in plain}}, lambda _: "")
    return table(FIELDS, [(name, type_.removesuffix(", or null"), *more) for name, type_, *more in rows])


def _by_kind(kinds: list[Schema]) -> list[str]:
    """A table of the kinds, and one of their fields with each kind's default."""
    names = [kind["properties"]["kind"].get("default", kind["properties"]["kind"]["title"]) for kind in kinds]
    said = [(code(name), marked(kind.get("description", ""))) for name, kind in zip(names, kinds, strict=True)]
    rows = []
    for name in dict.fromkeys(name for kind in kinds for name in kind["properties"] if name != "kind"):
        having = [kind for kind in kinds if name in kind["properties"]]
        descriptions = [kind["properties"][name].get("description", "") for kind in having]
        defaults = [default_of(name, kind) if kind in having else "" for kind in kinds]
        type_ = type_of(having[0]["properties"][name], lambda _: "")
        rows.append((code(name), type_, *defaults, marked(next(filter(None, descriptions), ""))))
    head = ("field", "type", *(code(name) for name in names), "what it says")
    first = f"The field `kind` chooses one of these. The default is `{names[0]}`."
    return [first, table(("kind", "what it says"), said), "The fields, with each kind's default:", table(head, rows)]
