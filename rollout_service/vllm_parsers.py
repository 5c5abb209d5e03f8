"""vLLM's parsers of tool calls and of reasoning: their names, and what a configuration may say about them."""

import ast
from collections.abc import Set
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from drafters.wrong_fields import did_you_mean

Kind = Literal["tool_parser", "reasoning_parser"]
REGISTERS: dict[Kind, tuple[str, str]] = {
    "tool_parser": ("tool_parsers", "_TOOL_PARSERS_TO_REGISTER"),
    "reasoning_parser": ("reasoning", "_REASONING_PARSERS_TO_REGISTER"),
}
"""by the field that names a parser: vLLM's package, and the dictionary in which it registers its own"""


def check_parser(kind: Kind, name: str) -> None:
    """Raises ValueError for a name that vLLM does not have."""
    known = known_parsers(kind)
    if name not in known:
        near = did_you_mean(name, known)
        raise ValueError(f"vLLM has no parser of this name{near}; its parsers are {', '.join(sorted(known))}")


def known_parsers(kind: Kind) -> Set[str]:
    """The names, read from vLLM's source, because importing it would take seconds."""
    package, register = REGISTERS[kind]
    vllm: Any = find_spec("vllm")
    module = ast.parse((Path(vllm.origin).parent / package / "__init__.py").read_text(encoding="utf-8"))
    return {
        name.value
        for node in module.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict)
        if any(isinstance(target, ast.Name) and target.id == register for target in node.targets)
        for name in node.value.keys
        if isinstance(name, ast.Constant) and isinstance(name.value, str)
    }
