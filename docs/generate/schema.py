"""JSON Schemas in words: a field's type with its bounds, and its default."""

import json
from collections.abc import Callable
from typing import Any

from generate.markdown import alternatives, code, marked

Schema = dict[str, Any]
Link = Callable[[str], str]
"""from a type's name to its link; to an empty text for a type that is not shown"""
LARGE = 10**6


def type_of(schema: Schema, link: Link) -> str:
    if "$ref" in schema:
        return link(schema["$ref"].rsplit("/", 1)[-1])
    if "allOf" in schema:
        return type_of(schema["allOf"][0], link)
    if "const" in schema:
        return code(json.dumps(schema["const"]))
    if "enum" in schema:
        return alternatives([code(json.dumps(value)) for value in schema["enum"]])
    for union in ("anyOf", "oneOf"):
        if union in schema:
            rest = {name: value for name, value in schema.items() if name != union}
            above = rest.get("exclusiveMinimum", -1)
            parts = [part for part in schema[union] if isinstance(c := part.get("const", 1), str) or c > above]
            return ", or ".join(dict.fromkeys(filter(None, (type_of(rest | part, link) for part in parts))))
    match schema.get("type"):
        case "array":
            return _list(schema, link)
        case "object":
            values = schema.get("additionalProperties")
            return f"object of {type_of(values, link)}" if isinstance(values, dict) and values else "object"
        case "string":
            return _string(schema)
        case None:
            return "any"
        case plain:
            return " ".join(filter(None, [plain, bounds(schema)]))


def _list(schema: Schema, link: Link) -> str:
    if "prefixItems" in schema:
        return f"[{', '.join(type_of(part, link) for part in schema['prefixItems'])}]"
    words = [f"list of {type_of(schema.get('items', {}), link)}"]
    words += ["not empty"] if schema.get("minItems") else []
    words += [f"at most {number(schema['maxItems'])}"] if "maxItems" in schema else []
    return ", ".join(words)


def _string(schema: Schema) -> str:
    plain = {"path": "path", "file-path": "path", "binary": "bytes"}.get(schema.get("format", ""), "string")
    if "pattern" in schema:
        return f"{plain} that matches {code(schema['pattern'])}"
    return f"{plain} (at most {schema['maxLength']} characters)" if "maxLength" in schema else plain


def bounds(schema: Schema) -> str:
    """(1 to 16)"""
    least, above = schema.get("minimum"), schema.get("exclusiveMinimum")
    most, below = schema.get("maximum"), schema.get("exclusiveMaximum")
    if least is not None and most is not None:
        return f"({number(least)} to {number(most)})"
    words = {"at least": least, "above": above if least is None else None, "at most": most, "below": below}
    given = [f"{word} {number(bound)}" for word, bound in words.items() if bound is not None]
    return f"({', '.join(given)})" if given else ""


def number(value: float) -> str:
    """A large power of two is written as one."""
    whole = int(value)
    for more, shown in ((0, "2^{}"), (1, "2^{} - 1")):
        if abs(whole) > LARGE and (whole + more).bit_count() == 1:
            return ("-" if whole < 0 else "") + shown.format((whole + more).bit_length() - 1)
    return str(whole) if whole == value else f"{value:g}"


def default_of(name: str, parent: Schema) -> str:
    """Of a field of `parent`."""
    schema = parent["properties"][name]
    if name in parent.get("required", ()):
        return "required"
    if schema.get("default") is not None:
        return code(json.dumps(schema["default"], ensure_ascii=False))
    if "default" in schema or {"type": "null"} in schema.get("anyOf", ()):
        return "not set"
    # A function makes the default: an empty object or list, or what the description says.
    return {"object": "`{}`", "array": "`[]`"}.get(schema.get("type", ""), "computed")


def fields(schema: Schema, link: Link) -> list[tuple[str, str, str, str]]:
    """Rows of a table: name, type, default, description."""
    return [
        (code(name), type_of(field, link), default_of(name, schema), marked(field.get("description", "")))
        for name, field in schema.get("properties", {}).items()
    ]


FIELDS = ("field", "type", "default", "what it says")
"""head of that table"""
