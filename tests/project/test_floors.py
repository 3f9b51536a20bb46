"""The floors: ops, functional, nn, commands; no import runs up or in a circle."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "dynmm_kernels"
ROOMS = ["ops", "functional", "nn", "measure", "demo", "cli"]  # from the ground up


def imports(file: Path) -> set[Path]:
    """The files of the package that `file` imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            origin = file.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            for path in (origin / alias.name for alias in node.names):
                spellings = [
                    p for q in (path, origin) for p in (q.with_suffix(".py"), q / "__init__.py")
                ]
                found.add(next(spelling for spelling in spellings if spelling.exists()))
    return found


GRAPH = {file: imports(file) for file in sorted(PACKAGE.rglob("*.py"))}


def test_no_import_runs_up():
    def floor(file: Path) -> int:
        room = file.relative_to(PACKAGE).parts[0]
        return ROOMS.index(room) if room in ROOMS else len(ROOMS)

    up = [(a.name, b.name) for a, targets in GRAPH.items() for b in targets if floor(b) > floor(a)]
    assert not [(a, b) for a, b in up if b != "version.py"]
    assert sum(map(len, GRAPH.values())) > 2 * len(GRAPH)  # imports are found at all


def test_no_circle():
    TopologicalSorter(GRAPH).prepare()  # raises an error that names the circle


def test_files_are_rooms():
    lines = {file.name: len(file.read_text().splitlines()) for file in GRAPH}
    assert max(lines.values()) <= 350, lines
