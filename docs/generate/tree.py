"""The tree that the pages are generated from: its root, its packages from the top, and a file's own summary."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PACKAGES = ("rl_loop", "rollout_service", "drafters")
"""from the top"""


def subject(file: Path) -> str:
    """The first paragraph of the file's docstring, as one line."""
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return " ".join(docstring.partition("\n\n")[0].partition("\n    ")[0].split())
