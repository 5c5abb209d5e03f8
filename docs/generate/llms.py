"""List of pages, docs/llms.txt, in the form of llmstxt.org: every page of the site with its first sentence."""

from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from generate.tree import DOCS, ROOT


def page(generated: Mapping[str, str]) -> str:
    """`generated`: pages by their path under docs/, as they have to be; the other pages are read."""
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    parts = [f"# {site['site_name']}", f"> {site['site_description']}"]
    for title, paths in chapters(site["nav"]):
        lines = []
        for path in paths:
            text = generated.get(path) or (DOCS / path).read_text(encoding="utf-8")
            lines.append(f"- [{text.splitlines()[0].removeprefix('# ')}]({path}): {gloss(text)}")
        parts.append("\n".join([f"## {title}", "", *lines]))
    return "\n\n".join(parts) + "\n"


def chapters(nav: list[Any]) -> Iterator[tuple[str, list[str]]]:
    """Each title of the navigation's first level, with the paths of its pages."""
    for chapter in nav:
        ((title, inside),) = chapter.items()
        yield title, list(_paths(inside))


def _paths(inside: Any) -> Iterator[str]:
    if isinstance(inside, str):
        yield inside
    for part in inside if isinstance(inside, list) else inside.values() if isinstance(inside, dict) else ():
        yield from _paths(part)


def gloss(text: str) -> str:
    """The paragraph under a page's title, as one line."""
    return " ".join(text.split("\n\n")[1].split())
