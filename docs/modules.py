"""Page of modules, docs/modules.md: each room and its modules, with the first line of each.

make picture
"""

import ast
from collections.abc import Iterator
from pathlib import Path

from rooms import PACKAGES, ROOT

FILE = ROOT / "docs" / "modules.md"
HEAD = """# Modules

Each room and each module in it, in its own words. `make picture` writes this page from the first line of each file.
"""


def subject(file: Path) -> str:
    """The first paragraph of the file's docstring, as one line."""
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return " ".join(docstring.partition("\n\n")[0].partition("\n    ")[0].split())


def rooms(package: Path) -> Iterator[Path]:
    """Its folders with modules, itself first."""
    yield package
    for folder in sorted(package.rglob("*/")):
        if (folder / "__init__.py").is_file():
            yield folder


def page() -> str:
    parts = [HEAD]
    for package in PACKAGES:
        for room in rooms(ROOT / package):
            level = "##" if room.name == package else "###"
            parts.append(f"{level} {room.relative_to(ROOT)}\n\n{subject(room / '__init__.py')}\n")
            modules = sorted(file for file in room.glob("*.py") if file.name != "__init__.py")
            lines = [f"- [{m.name}](../{m.relative_to(ROOT)}): {subject(m)}" for m in modules]
            parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    FILE.write_text(page(), encoding="utf-8")
    print(f"wrote {FILE}")
