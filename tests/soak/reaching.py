"""Random schedules that reach a module, until one fails.

    python -m tests.soak.reaching mpilm/strategies/bmuf.py 1000

Ends with 0 if all seeds pass; a seed that takes too much CPU time has failed.
mutants.py calls it on trees with a fault in that module.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

from tests.soak.keeping import limit_cpu

ROOT = Path(__file__).resolve().parents[2]


def imports(module: str) -> set[str]:
    """Return the files of mpilm that a file of mpilm imports."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / module).read_text())):
        if not isinstance(node, ast.ImportFrom) or not node.module:
            continue
        parts = [node.module, *(f"{node.module}.{name.name}" for name in node.names)]
        for part in parts:
            file = part.replace(".", "/") + ".py"
            if part.startswith("mpilm.") and (ROOT / file).is_file():
                found.add(file)
    return found


def reached(module: str) -> set[str]:
    """Return all files that a file needs, itself included."""
    found, ahead = {module}, [module]
    while ahead:
        more = imports(ahead.pop()) - found
        found |= more
        ahead += more
    return found


def strategies_with(module: str) -> list[str]:
    """Return the strategies whose schedules run a module.

    Those whose file needs it; of the virtual world, and of what only a base class or
    the learners use, all of them.
    """
    from mpilm.strategies import STRATEGIES

    files = {n: s.__module__.replace(".", "/") + ".py" for n, s in STRATEGIES.items()}
    own = [name for name, file in files.items() if file == module]
    return (
        own or [n for n, file in files.items() if module in reached(file)] or [*files]
    )


def main(module: str, seeds: str) -> None:
    """Run so many schedules in all, the strategies in turns."""
    from tests.strategies.schedules import run

    names = strategies_with(module)
    for number in range(int(seeds)):
        seed, which = divmod(number, len(names))
        with limit_cpu():
            run(names[which], seed)


if __name__ == "__main__":
    main(*sys.argv[1:])
