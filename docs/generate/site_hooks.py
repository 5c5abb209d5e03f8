"""Hooks of the site (mkdocs.yml): formulas, anchors as GitHub makes them, links to code, and each page as Markdown."""

import logging
import re
import shutil
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.pages import Page
from pymdownx.slugs import slugify

logger = logging.getLogger("mkdocs.hooks.site")
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((\.\.?/[^)#\s]+)(#[^)]*)?\)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    math = {"name": "math", "class": "math", "format": formula}
    config.mdx_configs.setdefault("pymdownx.superfences", {})["custom_fences"] = [math]
    config.mdx_configs.setdefault("toc", {})["slugify"] = slugify(case="lower")
    return config


def formula(source: str, *_: Any, **__: Any) -> str:
    """A block of LaTeX as MathML, which browsers show without scripts."""
    return convert(source, display="block")


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, **_: Any) -> str:
    """Links out of docs/ lead to code that is not part of the site: they become the code's path. A warning, and so an
    error of a strict build, where there is no such file."""
    docs = Path(config.docs_dir)
    here = (docs / page.file.src_uri).parent

    def path(link: re.Match[str]) -> str:
        text, target = link[1], (here / link[2]).resolve()
        if target.is_relative_to(docs):
            return link[0]
        if not target.exists():
            logger.warning("%s links to %s, which is not there", page.file.src_uri, link[2])
        name = target.relative_to(docs.parent).as_posix()
        return f"`{name}`" if name.endswith(text.strip("`")) else f"{text} (`{name}`)"

    return LINK.sub(path, markdown)


def on_post_build(config: MkDocsConfig) -> None:
    """llms.txt names the pages in Markdown: they lie beside those in HTML."""
    docs, site = Path(config.docs_dir), Path(config.site_dir)
    for file in docs.rglob("*.md"):
        target = site / file.relative_to(docs)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
