"""The rooms of mpilm/ stand one above the other, as CONTRIBUTING.md lists them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROOMS = re.findall(r"^    (\w+) {3,}\w", (ROOT / "CONTRIBUTING.md").read_text(), re.M)


def imported(path: Path) -> Iterator[str]:
    """Yield the modules of mpilm that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield node.module or ""
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)


def test_every_folder_is_a_room_and_no_other() -> None:
    folders = {path.parent.name for path in ROOT.glob("mpilm/*/__init__.py")}
    assert set(ROOMS) == folders
    assert len(ROOMS) == len(folders)


def test_nothing_is_imported_from_a_room_above() -> None:
    upwards = set()
    for floor, room in enumerate(ROOMS):
        for path in (ROOT / "mpilm" / room).rglob("*.py"):
            for module in imported(path):
                other = module.split(".")[1] if module.startswith("mpilm.") else ""
                if other in ROOMS[:floor]:
                    upwards.add(f"{path.relative_to(ROOT)} imports {module}")
    assert upwards == set()
