"""The rooms of mpilm/ stand one above the other, as CONTRIBUTING.md lists them.

An import counts wherever it stands: inside a function, under TYPE_CHECKING, or as the
name "mpilm.x.y" or "mpilm.x.y:z" that somebody loads later.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROOMS = re.findall(r"^    (\w+) {3,}\w", (ROOT / "CONTRIBUTING.md").read_text(), re.M)
# its names are loaded when somebody asks for them, and the version is below all rooms
FRONT_DOOR = "mpilm"


@cache
def files() -> dict[str, Path]:
    """Return module -> its file."""
    found = {}
    for path in ROOT.glob("mpilm/**/*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(source: str) -> Iterator[str]:
    """Yield the modules of mpilm that a program names."""
    names: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.Constant) and re.fullmatch(
            r"mpilm(\.\w+)+(:\w+)?", str(node.value)
        ):
            names.append(str(node.value).partition(":")[0])
    for name in names:
        module = name if name in files() else name.rpartition(".")[0]
        if module in files() and module != FRONT_DOOR:
            yield module


@cache
def arrows() -> dict[str, set[str]]:
    """Return module -> the modules that it imports."""
    return {
        module: set(imported(path.read_text()))
        for module, path in files().items()
        if module != FRONT_DOOR
    }


def circles(arrows: dict[str, set[str]]) -> set[str]:
    """Return the modules that import themselves through others."""

    def reached(module: str) -> set[str]:
        found: set[str] = set()
        todo = [module]
        while todo:
            new = arrows[todo.pop()] - found
            found |= new
            todo += new
        return found

    return {module for module in arrows if module in reached(module)}


def test_every_folder_is_a_room_and_no_other() -> None:
    folders = {path.parent.name for path in ROOT.glob("mpilm/*/__init__.py")}
    single = {path.stem for path in ROOT.glob("mpilm/*.py")} - {"__init__", "__main__"}
    assert set(ROOMS) == folders | single
    assert len(ROOMS) == len(folders) + len(single)


def test_nothing_is_imported_from_a_room_above() -> None:
    upwards = set()
    for module, others in arrows().items():
        room = module.split(".")[1]
        for other in others:
            if room in ROOMS and other.split(".")[1] in ROOMS[: ROOMS.index(room)]:
                upwards.add(f"{module} imports {other}")
    assert upwards == set()


def test_a_public_name_has_one_meaning() -> None:
    """But for those that mean the same: an interface and what keeps it, a command
    and what it calls."""
    alike = {"Learner", "decode", "more_help"}
    found: dict[str, list[str]] = {}
    for module, path in files().items():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                found.setdefault(node.name, []).append(module)
    public = {name: where for name, where in found.items() if name[0] != "_"}
    twice = {name: where for name, where in public.items() if len(where) > 1}
    assert {name: where for name, where in twice.items() if name not in alike} == {}
    assert twice.keys() == alike


def test_the_command_line_names_functions_to_load() -> None:
    """They are `cli`'s arrows to the room below."""
    assert "mpilm.commands.train" in arrows()["mpilm.cli"]


def test_no_two_files_import_each_other() -> None:
    assert circles(arrows()) == set()


def test_a_circle_is_found_wherever_the_import_stands() -> None:
    for source in (
        "def f():\n    from mpilm.train import loop",
        "if TYPE_CHECKING:\n    from mpilm.train.loop import Trainer",
        "import mpilm.train.loop",
        'import_module("mpilm.train.loop")',
        'TABLE = {"train": "mpilm.train.loop:Trainer"}',
    ):
        back = arrows() | {"mpilm.train.summary": set(imported(source))}
        assert circles(back) >= {"mpilm.train.loop", "mpilm.train.summary"}


def test_the_worlds_know_only_what_they_share() -> None:
    for module, others in arrows().items():
        if not module.startswith("mpilm.world."):
            continue
        inner = {"mpi", "virtual"} - {module.split(".")[2]}
        wrong = [o for o in others if {*o.split(".")[2:3]} & inner]
        assert wrong == [], module
