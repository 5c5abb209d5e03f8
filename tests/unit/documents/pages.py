"""A Markdown page in parts: blocks of code, code in running text, links and anchors."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pymdownx.slugs import slugify

ROOT = Path(__file__).resolve().parents[3]
FENCE = re.compile(r" *(`{3,})([^`]*)")
HEADING = re.compile(r"#{1,6} (.+)")
CODE = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", re.DOTALL)
"""inline code; more than one backtick on each side where the code has backticks itself"""
LINK = re.compile(r"\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^)\s]+)\)")
slug = slugify(case="lower")


@dataclass(frozen=True)
class Block:
    language: str
    title: str
    text: str
    line: int
    """of its first line of code, from 1"""


@dataclass(frozen=True)
class Page:
    file: Path
    text: str

    @classmethod
    def read(cls, file: Path) -> "Page":
        return cls(file, file.read_text(encoding="utf-8"))

    @property
    def name(self) -> str:
        return self.file.relative_to(ROOT).as_posix()

    @cached_property
    def _parts(self) -> tuple[list[Block], str]:
        """Blocks, and the text with empty lines in their place."""
        blocks, prose, inside = [], [], None
        for number, line in enumerate(self.text.splitlines(), start=1):
            fence = FENCE.fullmatch(line)
            if inside is None and fence:
                inside, info, code = fence[1], fence[2].strip(), []
            elif inside is not None and fence and fence[1].startswith(inside) and not fence[2].strip():
                title = re.search(r'title="([^"]*)"', info)
                language = info.split()[0] if info else ""
                blocks.append(Block(language, title[1] if title else "", "\n".join(code), number - len(code)))
                inside = None
            elif inside is not None:
                code.append(line)
            prose.append("" if inside or fence else line)
        return blocks, "\n".join(prose)

    @property
    def blocks(self) -> list[Block]:
        return self._parts[0]

    @property
    def prose(self) -> str:
        return self._parts[1]

    def blocks_of(self, language: str) -> list[Block]:
        return [block for block in self.blocks if block.language == language]

    @cached_property
    def inline_code(self) -> list[tuple[int, str]]:
        """(line, code)"""
        found = CODE.finditer(self.prose)
        return [(self._line(code.start()), " ".join(code[2].split())) for code in found if code[2].strip()]

    def links(self) -> Iterator[tuple[int, str]]:
        for link in LINK.finditer(re.sub(r"`[^`]*`", lambda code: "`" * len(code[0]), self.prose)):
            yield self._line(link.start()), link[1]

    @cached_property
    def anchors(self) -> set[str]:
        headings = filter(None, map(HEADING.fullmatch, self.prose.splitlines()))
        return {slug(re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading[1]).replace("`", ""), "-") for heading in headings}

    def _line(self, position: int) -> int:
        return self.prose.count("\n", 0, position) + 1
