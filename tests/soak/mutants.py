"""Do the tests notice faults? Mutants of the strategies and of the worlds' protocols.

    .venv-soak/bin/python tests/soak/mutants.py --count 200 --minutes 60 --out FILE

Draws mutants by seed: one operator, constant or condition changed in a function of the
strategies or of the worlds (by the operators of cosmic-ray). Each is put into a copy of
the tree, and looked for in two steps:

    schedules   up to --seeds random schedules of the strategies that reach the module
    tests       of what survives: the test files that name the module

What both leave alive is listed, to be read: some mutants change nothing that can be
seen (a bound that is never reached, the order of equal things). FILE holds all results;
a run goes on where the last one stopped. This program needs cosmic-ray only; the tests
run by --python (.venv/bin/python).
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("mpilm/strategies", "mpilm/world", "mpilm/world/virtual")
COPIED = ("mpilm", "tests", "pyproject.toml", "setup.py")
# nothing of them runs in virtual time
LEFT_OUT = {"mpilm/strategies/__init__.py", "mpilm/world/__init__.py"}
SWAPS = {
    "Binary": "Add_Sub Sub_Add Mul_Add Mul_Div Div_Mul FloorDiv_Mul Mod_Add Pow_Mul",
    "Comparison": "Eq_NotEq NotEq_Eq Lt_LtE LtE_Lt Lt_Gt Gt_GtE GtE_Gt Is_IsNot",
    "Unary": "Delete_USub Delete_Not",
}
OPERATORS = [
    *(
        f"core/Replace{kind}Operator_{swap}"
        for kind, swaps in SWAPS.items()
        for swap in swaps.split()
    ),
    "core/AddNot",
    "core/ReplaceTrueWithFalse",
    "core/ReplaceFalseWithTrue",
    "core/ReplaceAndWithOr",
    "core/ReplaceOrWithAnd",
    "core/ReplaceBreakWithContinue",
    "core/ReplaceContinueWithBreak",
    "core/NumberReplacer",
    "core/ZeroIterationForLoop",
]
LIMIT_S = {"schedules": 180.0, "tests": 600.0}  # a mutant that hangs is noticed too


@dataclass(frozen=True)
class Mutant:
    """One change: the operator's so-many-th place in a module, and its line."""

    module: str
    operator: str
    occurrence: int
    line: int

    @property
    def name(self) -> str:
        """Its key in the results."""
        return f"{self.module}:{self.line} {self.operator} {self.occurrence}"


def mutants_of(module: str) -> list[Mutant]:
    """Return all mutants of the bodies of a module's functions.

    Not of defaults, annotations and what raises errors: bad input has its own tests.
    """
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.plugins import get_operator

    source = (ROOT / module).read_text()
    lines: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            for part in node.body:
                lines |= set(range(part.lineno, (part.end_lineno or 0) + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Raise):
            lines -= set(range(node.lineno, (node.end_lineno or 0) + 1))
    found = []
    nodes = list(ast_nodes(get_ast(source)))
    for operator in OPERATORS:
        rule = get_operator(operator)()
        places = (place for node in nodes for place in rule.mutation_positions(node))
        for occurrence, (start, *_) in enumerate(places):
            if start[0] in lines:
                found.append(Mutant(module, operator, occurrence, start[0]))
    return found


def drawn(count: int, seed: int) -> list[Mutant]:
    """Return mutants of different lines, each line as likely as any other."""
    files = (
        file for folder in FOLDERS for file in sorted((ROOT / folder).glob("*.py"))
    )
    modules = [str(file.relative_to(ROOT)) for file in files]
    by_line: dict[tuple[str, int], list[Mutant]] = {}
    for module in modules:
        for mutant in mutants_of(module) if module not in LEFT_OUT else ():
            by_line.setdefault((module, mutant.line), []).append(mutant)
    draw = random.Random(seed)
    lines = draw.sample(sorted(by_line), count)
    return [draw.choice(by_line[line]) for line in lines]


def tests_of(module: str, tree: Path) -> list[str]:
    """Return the battery and what names a module; of the virtual world, all of its."""
    if "virtual" in module:
        return ["tests/virtual"]
    word, battery = Path(module).stem, tree / "tests/strategies/test_battery.py"
    files = [
        *tree.glob("tests/strategies/test_*.py"),
        *tree.glob("tests/unit/test_*.py"),
    ]
    own = {battery, *(file for file in files if word in file.read_text())}
    return sorted(str(file.relative_to(tree)) for file in own)


def run(command: list[str], tree: Path, limit_s: float) -> bool:
    """Return whether a command ends with 0 in time."""
    with subprocess.Popen(
        command,
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        try:
            return process.wait(limit_s) == 0
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return False


def survives(mutant: Mutant, tree: Path, python: str, seeds: int) -> str:
    """Return who kills a mutant: "schedules", "tests" or "" (nobody)."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    file = tree / mutant.module
    original = file.read_text()
    changed = mutate_code(original, get_operator(mutant.operator)(), mutant.occurrence)
    assert changed is not None
    assert changed != original
    file.write_text(changed)
    pytest = [python, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    pytest += ["-m", "long or not long", "--ignore=tests/strategies/test_schedules.py"]
    commands = {
        "schedules": [python, "-m", "tests.soak.reaching", mutant.module, str(seeds)],
        "tests": [*pytest, *tests_of(mutant.module, tree)],
    }
    try:
        for who, command in commands.items():
            if not run(command, tree, LIMIT_S[who]):
                return who
    finally:
        file.write_text(original)
    return ""


def page(found: list[dict[str, object]]) -> str:
    """Return the counts, and the survivors' lines."""
    by = Counter(str(row["killed by"]) for row in found)
    killed = by["schedules"] + by["tests"]
    lines = [
        f"{len(found)} mutants: {killed} killed ({killed / max(1, len(found)):.1%}),"
        f" {by['schedules']} by schedules, {by['tests']} by tests; alive:"
    ]
    for row in found:
        if not row["killed by"]:
            lines.append(f"  {row['mutant']}\n      {row['source']}")
    return "\n".join(lines)


def main() -> None:
    """Try mutants until the time is up."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=1000, help="schedules of each")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--python", default=str(ROOT / ".venv/bin/python"))
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="at a time")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    found = json.loads(args.out.read_text())["mutants"] if args.out.exists() else []
    done = {row["mutant"] for row in found}
    end_s = time.monotonic() + 60.0 * args.minutes
    ahead: SimpleQueue[Mutant] = SimpleQueue()
    for mutant in drawn(args.count, args.seed):
        if mutant.name not in done:
            ahead.put(mutant)
    lock = threading.Lock()

    def note(mutant: Mutant, who: str) -> None:
        """Write down who has noticed a mutant."""
        line = (ROOT / mutant.module).read_text().splitlines()[mutant.line - 1]
        row = {"mutant": mutant.name, "source": line.strip(), "killed by": who}
        with lock:
            found.append(row)
            document = {"benchmark": "mutants", "seed": args.seed, "mutants": found}
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(document, indent=1) + "\n")
            print(f"{who or 'ALIVE':<10} {mutant.name}", flush=True)

    def work() -> None:
        """Try mutants in a tree of one's own until the time is up."""
        with tempfile.TemporaryDirectory(prefix="mutants.") as folder:
            tree = Path(folder)
            for part in COPIED:
                copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
                copy(ROOT / part, tree / part)
            while time.monotonic() < end_s:
                try:
                    mutant = ahead.get_nowait()
                except Empty:
                    return
                note(mutant, survives(mutant, tree, args.python, args.seeds))

    with ThreadPoolExecutor(args.jobs) as pool:
        for worker in [pool.submit(work) for _ in range(args.jobs)]:
            worker.result()
    print(page(found))


if __name__ == "__main__":
    main()
