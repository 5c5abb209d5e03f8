"""Pages of modules, docs/reference/modules/: each room of a package and its modules, with the first line of each."""

from collections.abc import Iterator
from pathlib import Path

from generate.markdown import compose, fill
from generate.tree import PACKAGES, ROOT, subject

TO_ROOT = "../../.."
"""from a page to the tree's root"""


def rooms(package: Path) -> Iterator[Path]:
    """Its folders with modules, itself first."""
    yield package
    for folder in sorted(package.rglob("*/")):
        if (folder / "__init__.py").is_file():
            yield folder


def pages() -> dict[str, str]:
    return {f"reference/modules/{package}.md": _page(package) for package in PACKAGES}


def _page(package: str) -> str:
    parts = []
    for room in rooms(ROOT / package):
        if room.name != package:
            parts.append(f"## {room.relative_to(ROOT)}")
        parts.append(fill(subject(room / "__init__.py")))
        modules = sorted(file for file in room.glob("*.py") if file.name != "__init__.py")
        lines = [f"- [{m.name}]({TO_ROOT}/{m.relative_to(ROOT)}): {subject(m)}" for m in modules]
        parts.append("\n".join(lines))
    gloss = f"Each module of the package `{package}` in a line."
    return compose(f"Modules of {package}", gloss, "the first line of each file", *parts)
