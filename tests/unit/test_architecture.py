"""The picture of the rooms, the first line of each module and the glossary are those of the code."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "docs"))

from generate import rooms  # noqa: E402
from generate.tree import PACKAGES, subject  # noqa: E402


def test_an_import_shows_as_an_arrow_or_a_way_along_arrows(monkeypatch):
    graph = rooms.grimp.ImportGraph()
    for importer, imported in [("p.a", "p.b"), ("p.b.x", "p.c"), ("p.a", "p.c"), ("p.b.x", "p.b.y")]:
        graph.add_import(importer=importer, imported=imported)
    drawn = rooms.rooms_of("p", graph, {"a": 1, "b": 2, "c": 1})
    assert {name: room.floor for name, room in drawn.items()} == {"a": 0, "b": 1, "c": 2}
    assert rooms.arrows(drawn) == [("a", "b"), ("b", "c")]


def test_every_module_says_its_subject_in_a_sentence_on_its_first_line():
    folders = [*PACKAGES, "deploy", "docs"]
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.py")]
    assert len(files) > 200
    assert [file for file in files if not re.match(r'"""\S', file.read_text(encoding="utf-8"))] == []
    said = {file: subject(file).partition(". ")[0] for file in files}
    assert [file for file, sentence in said.items() if not 0 < len(sentence.split()) <= 25] == []


def test_the_glossary_is_sorted_and_names_files_that_are_there():
    lines = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8").splitlines()
    terms = [re.fullmatch(r"- \*\*([\w -]+)\*\*: .+", line) for line in lines if line.startswith("- ")]
    assert len(terms) > 20
    assert [term[1] for term in terms] == sorted((term[1] for term in terms), key=str.lower)
    for term in terms:
        files = re.findall(r"`([\w/]+\.py)`", term[0])
        assert files, term[1]
        assert [file for file in files if not (ROOT / file).is_file()] == [], term[1]
