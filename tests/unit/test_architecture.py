"""The picture of the rooms is that of the imports as they are."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "docs"))

import rooms  # noqa: E402


def test_the_picture_shows_the_imports_as_they_are():
    drawn = (ROOT / "docs" / "rooms.svg").read_text(encoding="utf-8")
    assert drawn == rooms.svg(), "make picture draws it anew"


def test_an_import_shows_as_an_arrow_or_a_way_along_arrows(monkeypatch):
    graph = rooms.grimp.ImportGraph()
    for importer, imported in [("p.a", "p.b"), ("p.b.x", "p.c"), ("p.a", "p.c"), ("p.b.x", "p.b.y")]:
        graph.add_import(importer=importer, imported=imported)
    drawn = rooms.rooms_of("p", graph, {"a": 1, "b": 2, "c": 1})
    assert {name: room.floor for name, room in drawn.items()} == {"a": 0, "b": 1, "c": 2}
    assert rooms.arrows(drawn) == [("a", "b"), ("b", "c")]
