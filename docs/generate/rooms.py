"""Picture of the rooms, docs/rooms.svg: the three packages' rooms, on floors, with the imports between them.

A room is a folder or a file of a package's first level. It stands one floor below the lowest room that imports it. An
arrow that others imply is left out: a > c, where a > b > c.
"""

from dataclasses import dataclass
from xml.sax.saxutils import escape

import grimp

from generate.tree import PACKAGES, ROOT

WIDTH, BOX, GAP, FLOOR = 1180, 26, 14, 58
"""pixels: of the picture, a box's height, between boxes, between floors"""
STYLE = """<style>
text { font: 12px monospace; fill: #222 }
.name { font: bold 15px sans-serif }
.package { fill: #fafafa; stroke: #999 }
.folder { fill: #dbe9f6; stroke: #4a78a8 }
.file { fill: #fff; stroke: #888 }
path { fill: none; stroke: #777 }
marker path { fill: #777; stroke: none }
</style>"""
ARROW_HEAD = """<marker id="head" viewBox="0 0 6 6" refX="3" refY="3" markerWidth="6" markerHeight="6" orient="auto">
<path d="M0 0L6 3L0 6z"/></marker>"""
LETTER = 6.9
"""pixels a letter is wide, in the font below"""


@dataclass
class Room:
    name: str
    files: int
    imports: set[str]
    """names of rooms of the same package"""
    floor: int = 0
    """from the top"""
    x: float = 0.0
    y: float = 0.0

    @property
    def label(self) -> str:
        return f"{self.name}/  {self.files} files" if self.files > 1 else f"{self.name}.py"

    @property
    def width(self) -> float:
        return LETTER * len(self.label) + 16


def files_of(package: str) -> dict[str, int]:
    """How many files each room has."""
    counts = {}
    for place in sorted((ROOT / package).iterdir()):
        files = list(place.rglob("*.py")) if place.is_dir() else [place] if place.suffix == ".py" else []
        if files and place.name != "__init__.py":
            counts[place.stem] = len(files)
    return counts


def rooms_of(package: str, graph: grimp.ImportGraph, files: dict[str, int]) -> dict[str, Room]:
    rooms = {name: Room(name, count, set()) for name, count in files.items()}
    for module in graph.modules:
        for imported in graph.find_modules_directly_imported_by(module):
            of, at = module.split("."), imported.split(".")
            if of[0] == at[0] == package and len(of) > 1 and len(at) > 1 and of[1] != at[1]:
                rooms[of[1]].imports.add(at[1])
    for room in rooms.values():
        room.floor = _floor(room, rooms)
    return rooms


def _floor(room: Room, rooms: dict[str, Room]) -> int:
    return max((_floor(above, rooms) + 1 for above in rooms.values() if room.name in above.imports), default=0)


def _reached(name: str, rooms: dict[str, Room]) -> set[str]:
    below = rooms[name].imports
    return below | {far for near in below for far in _reached(near, rooms)}


def arrows(rooms: dict[str, Room]) -> list[tuple[str, str]]:
    """Those that no other arrows imply."""
    return [
        (name, to)
        for name, room in rooms.items()
        for to in sorted(room.imports)
        if not any(to in _reached(other, rooms) for other in room.imports - {to})
    ]


def _place(rooms: dict[str, Room], top: float) -> float:
    """Give each room its place, under those that import it; returns where the package's frame ends."""
    lowest = max(room.floor for room in rooms.values())
    pointing = arrows(rooms)
    for floor in range(lowest + 1):
        row = [room for room in rooms.values() if room.floor == floor]
        above = {room.name: [rooms[a].x for a, b in pointing if b == room.name] for room in row}
        row.sort(key=lambda room: (sum(above[room.name]) / max(1, len(above[room.name])), room.name))
        gap = (WIDTH - 60 - sum(room.width for room in row)) / (len(row) + 1)
        x = 30 + gap
        for room in row:
            room.x, room.y = x + room.width / 2, top + 34 + floor * FLOOR
            x += room.width + gap
    return top + 34 + lowest * FLOOR + BOX + GAP


def svg() -> str:
    graph = grimp.build_graph(*PACKAGES, cache_dir=None)
    top, parts = 8.0, []
    for package in PACKAGES:
        rooms = rooms_of(package, graph, files_of(package))
        end = _place(rooms, top)
        parts.append(
            f'<rect class="package" x="8" y="{top:.0f}" width="{WIDTH - 16}" height="{end - top:.0f}" rx="8"/>'
        )
        parts.append(f'<text class="name" x="20" y="{top + 22:.0f}">{package}</text>')
        for a, b in arrows(rooms):
            x1, y1, x2, y2 = rooms[a].x, rooms[a].y + BOX, rooms[b].x, rooms[b].y - 4
            bend = (y2 - y1) / 2
            parts.append(
                f'<path d="M{x1:.0f} {y1:.0f}C{x1:.0f} {y1 + bend:.0f} {x2:.0f} {y2 - bend:.0f} {x2:.0f} {y2:.0f}"'
                ' marker-end="url(#head)"/>'
            )
        for room in rooms.values():
            kind = "folder" if room.files > 1 else "file"
            x, width = room.x - room.width / 2, room.width
            parts.append(
                f'<rect class="{kind}" x="{x:.0f}" y="{room.y:.0f}" width="{width:.0f}" height="{BOX}" rx="4"/>'
                f'<text x="{room.x:.0f}" y="{room.y + 17:.0f}" text-anchor="middle">{escape(room.label)}</text>'
            )
        top = end + GAP
    size = f'width="{WIDTH}" height="{top:.0f}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {WIDTH} {top:.0f}">'
    return "\n".join([head, STYLE, ARROW_HEAD, f'<rect {size} fill="#fff"/>', *parts, "</svg>\n"])
