"""Arrows run one way, between packages and between files: no circle at any level."""

import ast
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.kit.launches import ROOT

#: From the top down: each may import those after it.
ROOMS = ("experiments", "launcher", "engine", "data")
#: Folders hold no more modules, files no more lines.
MOST, LONGEST = 12, 400


#: Under which all are imported.
PACKAGE = "selfdistill"


def module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join((PACKAGE, *parts)).removesuffix(".__init__")


def room_of(name: str) -> str:
    return name.split(".")[1]


FILES = {module(p): p for room in ROOMS for p in sorted((ROOT / room).rglob("*.py"))}


def imported(name: str) -> set[str]:
    """The modules of ours that a module imports, wherever in it; not for type checkers alone."""
    found = set()
    tree = ast.parse(FILES[name].read_text(encoding="utf-8"))
    unread = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in unread:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{name}: imports are absolute"
            parts = {f"{node.module}.{alias.name}" for alias in node.names} & FILES.keys()
            found |= parts or {node.module}
    bare = {one for one in found if one.split(".")[0] in ROOMS}
    assert not bare, f"{name}: an installed copy has {bare} under {PACKAGE} alone"
    return {one for one in found if one in FILES and one != name}


GRAPH = {name: imported(name) for name in FILES}


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Some nodes that lead round to one another; none where all arrows run one way."""
    state: dict[str, int] = {}

    def visit(node: str, path: list[str]) -> list[str]:
        if state.get(node) == 1:
            return path[path.index(node) :]
        if node in state:
            return []
        state[node] = 1
        for following in sorted(graph.get(node, ())):
            if found := visit(following, [*path, node]):
                return found
        state[node] = 2
        return []

    return next((found for node in sorted(graph) if (found := visit(node, []))), [])


def grouped(names: Iterable[str], inside: str) -> dict[str, set[str]]:
    """The graph of what lies directly in a package: files, and packages each as one node."""
    depth = inside.count(".") + 1 if inside else 0

    def node(name: str) -> str:
        return ".".join(name.split(".")[: depth + 1])

    graph: dict[str, set[str]] = {}
    for name in names:
        if (inside and not name.startswith(f"{inside}.")) or node(name) == inside:
            continue
        for other in GRAPH[name]:
            within = not inside or other.startswith(f"{inside}.")
            if within and node(other) != node(name) and node(other) != inside:
                graph.setdefault(node(name), set()).add(node(other))
    return graph


def test_no_file_leads_back_to_itself() -> None:
    assert not circle(GRAPH)


PACKAGES = sorted({name for name, path in FILES.items() if path.name == "__init__.py"})


@pytest.mark.parametrize("inside", [PACKAGE, *PACKAGES])
def test_no_package_leads_back_to_itself(inside: str) -> None:
    assert not circle(grouped(FILES, inside)), inside


def test_rooms_know_nothing_of_those_above() -> None:
    for name, others in GRAPH.items():
        room = room_of(name)
        above = ROOMS[: ROOMS.index(room)]
        assert not [other for other in others if room_of(other) in above], name


@pytest.mark.parametrize("room", [*ROOMS, "benchmarks", "tests"])
def test_no_folder_is_a_hall_and_no_file_a_book(room: str) -> None:
    files = [path for path in (ROOT / room).rglob("*.py") if path.name != "__init__.py"]
    for folder in {path.parent for path in files}:
        assert len([path for path in files if path.parent == folder]) <= MOST, folder
    for path in files:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST, path
