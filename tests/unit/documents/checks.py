"""Checks of a Markdown page against the tree. Each yields its errors, with their lines."""

import ast
import importlib
import importlib.util
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

from documents.commands import CONFIGURED, OURS, same_path, wrong_command, wrong_toml
from documents.pages import ROOT, Block, Page
from documents.shell import commands_of
from generate.http_api import document
from generate.metrics import scraped_names
from generate.site_hooks import formula

LONGEST, README = 300, range(80, 121)
"""lines"""
FILES = {command.file: command for command in CONFIGURED.values()}
VLLM = Path(importlib.util.find_spec("vllm").origin).parents[1]  # type: ignore[union-attr, arg-type]
NAMED_FILE = re.compile(r"([\w./-]+/[\w.-]+\.(?:py|toml|sh|md))(?:: ([\w.]+))?")
ROUTE = re.compile(r"(GET|POST|DELETE|PUT|HEAD) (/[^\s?]*)\S*")
METRIC = re.compile(r"rollout_(?!service\b)\w+_\w+(?:\{.*\})?")


def length(page: Page) -> Iterator[str]:
    lines = page.text.count("\n")
    if page.name == "README.md" and lines not in README:
        yield f"{page.name}: has {lines} lines, not {README[0]} to {README[-1]}"
    elif lines > LONGEST:
        yield f"{page.name}: has {lines} lines, more than {LONGEST}"


def first_sentence(page: Page) -> Iterator[str]:
    """A page of docs/ begins with its title and with one sentence, which the list of pages shows."""
    if page.name.startswith("docs/"):
        title, gloss, *_ = [*page.text.split("\n\n"), ""]
        if not re.fullmatch(r"# .+", title) or not re.fullmatch(r"[^.?!]*(?:[.?!]\S[^.?!]*)*\.\n?", gloss):
            yield f"{page.name}:1: the page must begin with a title and one sentence"


def wrapped_numbers(page: Page) -> Iterator[str]:
    """A line of a paragraph that begins with a number and a full stop would begin a list."""
    before = ""
    for number, line in enumerate(page.prose.split("\n"), start=1):
        if re.match(r"\d+\. ", line) and re.match(r"\w", before) and not re.match(r"\d+\. ", before):
            yield f"{page.name}:{number}: {line[:3]!r} begins a list; wrap the line elsewhere"
        before = line


def toml_blocks(page: Page) -> Iterator[str]:
    for block in page.blocks_of("toml"):
        if (command := FILES.get(block.title)) is None:
            yield f"{_at(page, block)}: title it with one of {', '.join(FILES)}"
        else:
            yield from (f"{_at(page, block)}: {problem}" for problem in wrong_toml(command, block.text))


def command_lines(page: Page) -> Iterator[str]:
    files = {block.title: block.text for block in page.blocks}
    for block in page.blocks_of("sh"):
        try:
            commands = list(commands_of(block.text))
        except ValueError as error:
            yield f"{_at(page, block)}: {error}"
            continue
        for number, words in commands:
            yield from (f"{page.name}:{block.line + number}: {problem}" for problem in wrong_command(words, files))
    for line, code in page.inline_code:
        if code.split()[0] in OURS and "=" not in code.split()[1:2]:
            for _, words in commands_of(code):
                yield from (f"{page.name}:{line}: {problem}" for problem in wrong_command(words, files))


def python_blocks(page: Page) -> Iterator[str]:
    """Each block compiles, and its imports exist."""
    own = {block.title.removesuffix(".py").replace("/", ".") for block in page.blocks if block.title}
    for block in page.blocks_of("python"):
        try:
            source = textwrap.dedent(block.text)
            tree = compile(source, page.name, "exec", ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        except SyntaxError as error:
            yield f"{page.name}:{block.line + (error.lineno or 1) - 1}: {error.msg}"
            continue
        for line, module, name in _imported(tree):
            if module not in own and not _is_there(module, name):
                full = ".".join(filter(None, (module, name)))
                yield f"{page.name}:{block.line + line - 1}: there is no {full}"


def _imported(tree: ast.AST) -> Iterator[tuple[int, str, str]]:
    """(line, module, name in it)"""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, node.module or "", alias.name) for alias in node.names)


def _is_there(module: str, name: str) -> bool:
    try:
        found = importlib.import_module(module)
        return not name or hasattr(found, name) or _is_there(f"{module}.{name}", "")
    except ImportError:
        return False


def formulas(page: Page) -> Iterator[str]:
    for block in page.blocks_of("math"):
        try:
            shown = formula(block.text)
        except Exception as error:
            yield f"{_at(page, block)}: no formula: {type(error).__name__} {error}"
            continue
        if unknown := re.findall(r"\\[A-Za-z]+", shown):
            yield f"{_at(page, block)}: the site cannot show {', '.join(unknown)}"


def links(page: Page) -> Iterator[str]:
    for line, target in page.links():
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.file.parent / path).resolve()
        if path and not file.exists():
            yield f"{page.name}:{line}: {target} leads nowhere"
        elif anchor and anchor not in (Page.read(file) if path else page).anchors:
            yield f"{page.name}:{line}: {target}: there is no such heading"


def named_files(page: Page) -> Iterator[str]:
    """A file in inline code exists: under the root, beside the page, or in vLLM. `file.py: Name` is defined in it."""
    own = {block.title for block in page.blocks}
    for line, code in page.inline_code:
        if not (named := NAMED_FILE.fullmatch(code)) or named[1] in own:
            continue
        found = [folder / named[1] for folder in (ROOT, page.file.parent, VLLM) if (folder / named[1]).is_file()]
        if not found and (named[1].endswith(".py") or (ROOT / named[1]).parent.is_dir()):
            yield f"{page.name}:{line}: {named[1]}: there is no such file"
        elif found and named[2] and named[2] not in names_in(found[0]):
            yield f"{page.name}:{line}: {named[1]} has no {named[2]}"


def names_in(file: Path) -> set[str]:
    """Functions, classes and variables of a module; those of a class as Class.name."""
    return set(_names(ast.parse(file.read_text(encoding="utf-8")).body))


def _names(body: list[ast.stmt]) -> Iterator[str]:
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name
        if isinstance(node, ast.ClassDef):
            yield from (f"{node.name}.{name}" for name in _names(node.body))
        for target in node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]:
            if isinstance(target, ast.Name):
                yield target.id


def routes_and_metrics(page: Page) -> Iterator[str]:
    """Routes and metrics in inline code exist. A page may add a metric of its own in an example."""
    paths, code_of_page = document()["paths"], "".join(block.text for block in page.blocks_of("python"))
    added = re.findall(r"\"(rollout_\w+)\"", code_of_page)
    known = scraped_names().union(*({f"{name}{end}" for end in ("", "_total", "_bucket")} for name in added))
    for line, code in page.inline_code:
        if route := ROUTE.fullmatch(code):
            methods = {method.upper() for path in paths if same_path(route[2], path) for method in paths[path]}
            methods |= {"GET"} if route[2] in ("/docs", "/openapi.json") else set()
            if route[1] not in methods:
                yield f"{page.name}:{line}: {code}: there is no such route"
        elif METRIC.fullmatch(code) and code.partition("{")[0] not in known:
            yield f"{page.name}:{line}: {code}: there is no such metric"


def _at(page: Page, block: Block) -> str:
    return f"{page.name}:{block.line}"


CHECKS: tuple[Callable[[Page], Iterator[str]], ...] = (
    length, first_sentence, wrapped_numbers, toml_blocks, command_lines, python_blocks, formulas, links, named_files,
    routes_and_metrics,
)  # fmt: skip
