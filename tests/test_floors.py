"""The package is a house: a module imports what lies below it, never what lies above, and no circle ends in itself.

What is imported for its types only, or inside a function, counts as well: who needs a name has to know its module.
"""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import asena_tornado

# From the ground up; each is a module or a whole wing.
FLOORS = (
    "errors",
    "ioc",
    "hosting",
    "websocket",
    "web",
    "ulak",
    "transports",
    "cluster",
    "connection",
    "client",
    "schema",
    "inspector",
    "site",
    "takeover",
    "server",
    "testing",
    "pytest_plugin",
    "demo",
    "__init__",  # what users import: all of it
    "__main__",
)


def modules(root: Path) -> dict[str, ast.Module]:
    """Every module below ``root``, by its name from there: ``websocket.rooms``; a package's own is ``web.__init__``."""
    return {
        ".".join(path.relative_to(root).with_suffix("").parts): ast.parse(path.read_text(encoding="utf-8"))
        for path in sorted(root.rglob("*.py"))
    }


def imported(name: str, tree: ast.Module, package: str, known: set[str]) -> Iterator[str]:
    """The modules of the package that one of them imports anywhere, also several times."""

    def module(parts: list[str]) -> str | None:
        for found in (".".join(parts), ".".join([*parts, "__init__"])):
            if found in known:
                return found
        return None

    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first, *parts = alias.name.split(".")
                if first == package and (found := module(parts)) is not None:
                    yield found
        elif isinstance(node, ast.ImportFrom):
            parts = node.module.split(".") if node.module else []
            if node.level:
                here = name.split(".")
                parts = here[: len(here) - node.level] + parts
            elif parts[:1] == [package]:
                parts = parts[1:]
            else:
                continue
            for alias in node.names:
                # A module of that name, or a name of that module.
                found = module([*parts, alias.name]) or module(parts)
                assert found is not None, f"{name} imports {'.'.join(parts)}.{alias.name}, which is not there"
                yield found


def faults(root: Path, floors: tuple[str, ...]) -> list[str]:
    """Imports that go up, circles, and what has no floor."""
    trees = modules(root)
    uses = {name: set(imported(name, tree, root.name, set(trees))) for name, tree in trees.items()}
    floor = {name: floors.index(first) for name in trees if (first := name.split(".")[0]) in floors}
    found = [f"{name} has no floor" for name in trees if name not in floor]
    for name, used in uses.items():
        found += [
            f"{name} imports {other}, above it" for other in sorted(used) if floor.get(other, 0) > floor.get(name, 0)
        ]
    try:
        graphlib.TopologicalSorter(uses).prepare()
    except graphlib.CycleError as error:
        found.append(f"a circle: {' -> '.join(reversed(error.args[1]))}")
    return found


def test_imports_go_down_only() -> None:
    assert faults(Path(asena_tornado.__file__).parent, FLOORS) == []


HOUSE = {
    "__init__.py": "from .roof import Roof",
    "ground.py": "",
    "wing/__init__.py": "from .rooms import Room",
    "wing/rooms.py": "from ..ground import floor",
    "wing/stairs.py": "from . import rooms\nimport house.ground",
    "roof.py": "from .wing import Room\nfrom .wing.stairs import step\nfrom house.wing import rooms",
}


@pytest.mark.parametrize(
    ("path", "source", "fault"),
    [
        ("roof.py", HOUSE["roof.py"], None),
        ("ground.py", "from .roof import Roof", "ground imports roof, above it"),
        ("ground.py", "from . import roof", "ground imports roof, above it"),
        ("ground.py", "from . import Roof", "ground imports __init__, above it"),
        ("ground.py", "import house.roof", "ground imports roof, above it"),
        ("ground.py", "from house.wing.rooms import Room", "ground imports wing.rooms, above it"),
        ("ground.py", "def build():\n    from .roof import Roof", "ground imports roof, above it"),
        ("ground.py", "if TYPE_CHECKING:\n    from .wing import Room", "ground imports wing.__init__, above it"),
        ("wing/rooms.py", "if TYPE_CHECKING:\n    from .stairs import step", "a circle: wing."),
        ("wing/rooms.py", "from . import Room", "a circle: wing."),
        ("wing/rooms.py", "from .rooms import Room", "a circle: wing.rooms -> wing.rooms"),
        ("cellar.py", "", "cellar has no floor"),
    ],
)
def test_a_fault_is_found(tmp_path: Path, path: str, source: str, fault: str | None) -> None:
    for each, text in {**HOUSE, path: source}.items():
        file = tmp_path / "house" / each
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    found = faults(tmp_path / "house", ("ground", "wing", "roof", "__init__"))
    if fault is None:
        assert found == []
    else:
        assert any(each.startswith(fault) for each in found), found
