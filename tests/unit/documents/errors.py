"""Every message that the three packages raise, answer, log or print when something is wrong, found in the source.

A message is an argument of an exception, of a problem of a request, of a log line, or of the end of a command. Parts of
it that vary are shown as `…`. A name is followed to its assignments in the same function or module, and a call to what
a function of the same module returns. A text without two words of its own only passes on another message.
"""

import ast
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from documents.pages import ROOT

PACKAGES = "drafters", "rollout_service", "rl_loop"
VARIES = "…"
ARGUMENT: dict[str, int | str] = {
    "Problem": "message", "ErrorBody": "error", "FailedGroup": "error", "Discriminator": "custom_error_message",
    "Batch": "short", "answer": 2, "refused": 1, "_raise": 4, "_fail": -1, "fail": -1, "sys.exit": 0, "parser.error": 0,
    "super().__init__": 0, "logger.warning": 0, "logger.error": 0, "logger.exception": 0, "console.print": 0,
}  # fmt: skip
"""functions that take a message, with that argument; -1 stands for any argument"""
RETURNED = {"_of_another_kind", "new_name", "_no_such_flag", "not_lossless"}
ASSIGNED = {"wrong_fields", "why_short", "stored_results", "error"}
"""functions that return messages, or that put them together from variables"""
NEWS = (
    "written to", "All … rows", "All rows", "All … checks", "Serving", "Stopp", "held out", "acceptance length",
    "… seconds", "… for …: … parameters", "the state after",
)  # fmt: skip
"""beginnings of what is printed when all is well"""
PROGRAM = re.compile(r"(rollout-service|rl-loop|drafters)( \w+)?: ")
"""what a command puts before each of its errors"""
PHRASE = re.compile(r"[^\W\d_]{2,}")
FORMAT = re.compile(r"%[sdr]|\{![rs]\}|\{\}")
MARKUP = re.compile(r"\[(?:bold red|bold|/)\]")
Function = ast.FunctionDef | ast.AsyncFunctionDef


def messages() -> dict[str, list[str]]:
    """Each message with the places that make it, `file:line`."""
    found: dict[str, list[str]] = {}
    for package in PACKAGES:
        for file in sorted((ROOT / package).rglob("*.py")):
            for line, text in Source(file.read_text(encoding="utf-8")).messages():
                found.setdefault(text, []).append(f"{file.relative_to(ROOT)}:{line}")
    return found


@dataclass(frozen=True)
class Source:
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @cached_property
    def globals(self) -> ast.Module:
        """The module's own statements, without functions and classes."""
        return ast.Module([part for part in self.tree.body if isinstance(part, ast.Assign | ast.AnnAssign)], [])

    @cached_property
    def functions(self) -> dict[str, Function]:
        return {node.name: node for node in ast.walk(self.tree) if isinstance(node, Function)}

    def messages(self) -> Iterator[tuple[int, str]]:
        """(line, message)"""
        yield from self._messages(self.tree, self.tree)

    def _messages(self, node: ast.AST, scope: ast.AST) -> Iterator[tuple[int, str]]:
        """`scope`: the function, or the module, in which a name means what it means at `node`."""
        scope = node if isinstance(node, Function) else scope
        for part in _said(node, scope):
            for text in self._texts(part, scope):
                shown = normalised(text)
                if len(PHRASE.findall(shown)) > 1 and " " in shown and not shown.startswith(NEWS):
                    yield part.lineno, shown
        for child in ast.iter_child_nodes(node):
            yield from self._messages(child, scope)

    def _texts(self, node: ast.expr, scope: ast.AST) -> list[str]:
        """What an expression may be; nothing where it is no text."""
        match node:
            case ast.Constant(value=str(text)):
                return [text]
            case ast.Constant():
                return []
            case ast.JoinedStr(values=parts):
                return list(map("".join, itertools.product(*(self._inside(part, scope) for part in parts))))
            case ast.IfExp(body=one, orelse=other):
                return self._texts(one, scope) + self._texts(other, scope)
            case ast.BoolOp(values=parts) | ast.List(elts=parts):
                return [text for part in parts for text in self._texts(part, scope)]
            case ast.BinOp(op=ast.Add(), left=one, right=other):
                return list(map("".join, itertools.product(self._texts(one, scope), self._texts(other, scope))))
            case ast.Name(id=name):
                values = list(_assigned(scope, name)) or list(_assigned(self.globals, name))
                return [text for value in values if not _uses(value, name) for text in self._texts(value, scope)]
            case ast.Call(func=ast.Name(id=name)) if name in self.functions and name not in ARGUMENT:
                function = self.functions[name]
                returned = [part.value for part in ast.walk(function) if isinstance(part, ast.Return) and part.value]
                return [text for value in returned for text in self._texts(value, function)]
        return [VARIES]

    def _inside(self, part: ast.expr, scope: ast.AST) -> list[str]:
        """A part of an f-string: a name that stands for texts is replaced by each of them."""
        if isinstance(part, ast.FormattedValue) and isinstance(part.value, ast.Name):
            texts = self._texts(part.value, scope)
            return texts if any(" " in text and "\n" not in text for text in texts) else [VARIES]
        return self._texts(part, scope) if isinstance(part, ast.Constant) else [VARIES]


def _said(node: ast.AST, scope: ast.AST) -> list[ast.expr]:
    """Expressions at this node that are messages."""
    if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and not ast.unparse(node.exc).startswith("self."):
        return [*node.exc.args, *(keyword.value for keyword in node.exc.keywords)]
    if isinstance(node, ast.Call):
        return _argument(node)
    makes = {ast.Return: RETURNED, ast.Yield: RETURNED, ast.Assign: ASSIGNED, ast.AugAssign: ASSIGNED}
    if getattr(scope, "name", "") in makes.get(type(node), ()):
        value = node.value  # type: ignore[attr-defined]
        return value.elts if isinstance(value, ast.Tuple) else [value]
    return []


def _argument(call: ast.Call) -> list[ast.expr]:
    name = f".{ast.unparse(call.func)}"
    for known, which in ARGUMENT.items():
        if name.endswith(f".{known}"):
            if isinstance(which, str):
                return [keyword.value for keyword in call.keywords if keyword.arg == which]
            return call.args if which < 0 else call.args[which : which + 1]
    return []


def _assigned(scope: ast.AST, name: str) -> Iterator[ast.expr]:
    for node in ast.walk(scope):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for target in targets if isinstance(node, ast.Assign | ast.AnnAssign | ast.NamedExpr) else ():
            if isinstance(target, ast.Name) and target.id == name and node.value is not None:
                yield node.value
            elif isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = zip(target.elts, node.value.elts, strict=False)
                yield from (value for part, value in pairs if isinstance(part, ast.Name) and part.id == name)


def _uses(value: ast.expr, name: str) -> bool:
    return any(isinstance(part, ast.Name) and part.id == name for part in ast.walk(value))


def normalised(text: str) -> str:
    """One line, with one `…` for all that varies side by side."""
    text = PROGRAM.sub("", MARKUP.sub("", FORMAT.sub(VARIES, text)), count=1)
    return re.sub(r"…+", VARIES, " ".join(text.split()))
