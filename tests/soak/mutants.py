"""Do the tests notice faults? Mutants of the strategies and of the worlds' protocols.

    .venv-soak/bin/python -m tests.soak.mutants --count 200 --minutes 60 --out FILE

Draws mutants by seed: one operator, constant or condition changed in a function of the
strategies or of the worlds (by the operators of cosmic-ray). Each is put into a copy of
the tree, and looked for in steps, each only for what the one before left alive:

    schedules   up to --seeds random schedules of the strategies that reach the module
    tests       the test files of its name, of those of the strategies that need it,
                what imports it or speaks of these strategies; tests/virtual and those
                of deaths and joins for the worlds
    battery     of these strategies
    others      all other tests of the strategies but for the long ones

What all leave alive is listed, to be read: some mutants change nothing that can be
seen (a bound that is never reached, the order of equal things). A step that does not
end within its limit decides nothing: the mutant is listed as undecided, not as killed
(a schedule that lasts is ended after some CPU time, a test by pytest's timeout). A test
kills a mutant only if it passes without it, and fails with it twice. FILE holds all
results; a run goes on where the last one stopped. This program needs cosmic-ray only;
the tests run by --python (.venv/bin/python).
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("mpilm/strategies", "mpilm/world", "mpilm/world/virtual")
COPIED = ("mpilm", "tests", "docs", "jobs", "examples", "benchmarks", "tools")
COPIED += ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "mkdocs.yml", "Makefile")
COPIED += ("constraints.txt", "pyproject.toml", "setup.py")
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
STEPS = ("schedules", "tests", "battery", "others")
LIMIT_S = 1800.0  # of a step; what hangs in it has limits of its own
NO_TESTS = 5  # pytest's exit code where none is left to run
MEMBERS = ("tests/strategies/test_deaths.py", "tests/strategies/test_joins.py")
BATTERY = "tests/strategies/test_battery.py"


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


def strategies_of(module: str) -> list[str]:
    """Return the strategies that need a module; of what all of them need, none."""
    from tests.soak.reaching import reached

    files = sorted((ROOT / "mpilm/strategies").glob("*.py"))
    files = [file for file in files if is_strategy(file.read_text(), file.stem)]
    found = [f.stem for f in files if module in reached(str(f.relative_to(ROOT)))]
    if found != ["hierarchical"]:  # which reaches what can be inside it
        found = [name for name in found if name != "hierarchical"]
    return [] if len(found) >= len(files) - 1 else found


def is_strategy(source: str, name: str) -> bool:
    """Return whether a module holds the strategy of its name."""
    return f'    name = "{name}"\n' in source


def tests_of(module: str, tree: Path) -> list[str]:
    """Return the test files of a module, those of its own name first."""
    dotted = module.removesuffix(".py").replace("/", ".")
    package, _, stem = dotted.rpartition(".")
    package, dotted = re.escape(package), re.escape(dotted)
    imports = re.compile(
        rf"(from|import) {dotted}\b|from {package} import [^\n]*\b{stem}\b"
    )
    names = strategies_of(module)

    def is_own(file: Path) -> bool:
        text = file.read_text()
        if file.name in {f"test_{name}.py" for name in (stem, *names)}:
            return True
        is_about = any(f'"{name}"' in text for name in names)
        return is_about or imports.search(text) is not None

    left_out = {"test_schedules.py", Path(BATTERY).name}
    files = [*tree.glob("tests/unit/test_*.py")]
    files += tree.glob("tests/strategies/test_*.py")
    own = [file for file in files if file.name not in left_out and is_own(file)]
    own.sort(key=lambda file: (file.name != f"test_{stem}.py", file.name))
    found = [str(file.relative_to(tree)) for file in own]
    if not module.startswith("mpilm/world"):
        return found
    return ["tests/virtual", *found, *(name for name in MEMBERS if name not in found)]


class Tree:
    """A copy of what is tried, in which one mutant at a time is."""

    def __init__(self, folder: Path, python: str) -> None:
        self.folder, self.python = folder, python
        # they go by the clock
        self.left_out = ["tests/virtual/test_speed.py", "tests/unit/test_signalled.py"]
        for part in COPIED:
            copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
            copy(ROOT / part, folder / part)

    def run(self, *command: str) -> tuple[bool | None, str]:
        """Return whether a command ends with 0, and what it says.

        None: it did not end in time. Nothing is compiled into files: a mutant as long
        as the original, written in the same second, would pass for it.
        """
        own, said = self.folder / "tmp", self.folder / "said"
        own.mkdir(exist_ok=True)
        environment = {
            **os.environ,
            "PYTHONPATH": str(self.folder),
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
            "TMPDIR": str(own),
        }
        with (
            said.open("w") as file,
            subprocess.Popen(
                [self.python, *command],
                cwd=self.folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            ) as process,
        ):
            try:
                has_passed: bool | None = process.wait(LIMIT_S) in (0, NO_TESTS)
            except subprocess.TimeoutExpired:
                has_passed = None
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        for left in (own, self.folder / ".hypothesis"):
            shutil.rmtree(left, ignore_errors=True)
        return has_passed, said.read_text(errors="replace")

    def test(self, *words: str, long: bool = True) -> tuple[bool | None, str]:
        """Return whether tests pass, and the first that does not."""
        command = ["-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--tb=no"]
        command += ["-m", "long or not long" if long else "not long"]
        command += [word for name in self.left_out for word in ("--deselect", name)]
        has_passed, said = self.run(*command, *words)
        found = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - |$)", said, re.MULTILINE)
        return has_passed, found[1] if found else ""

    def survives(self, mutant: Mutant, seeds: int) -> tuple[str, str]:
        """Return who kills a mutant, and how: a step, "" (nobody) or "undecided"."""
        from cosmic_ray.mutating import mutate_code
        from cosmic_ray.plugins import get_operator

        file = self.folder / mutant.module
        original = file.read_text()
        operator = get_operator(mutant.operator)()
        changed = mutate_code(original, operator, mutant.occurrence)
        assert changed is not None
        assert changed != original
        files = tests_of(mutant.module, self.folder)
        names = strategies_of(mutant.module)
        reaching = ("-m", "tests.soak.reaching", mutant.module, str(seeds))
        steps: dict[str, Any] = {
            "schedules": lambda: self.run(*reaching),
            "tests": lambda: self.test(*files) if files else (True, ""),
            "battery": lambda: self.test(
                BATTERY, *(["-k", " or ".join(names)] if names else [])
            ),
            "others": lambda: self.test("tests/strategies", long=False),
        }
        for who, step in steps.items():
            while True:
                with replaced(file, changed):
                    has_passed, said = step()
                if has_passed is None:
                    return "undecided", who
                if has_passed:
                    break
                how = said.strip().rpartition("\n")[2]
                if who != "schedules" and (not how or how in self.left_out):
                    return "undecided", how
                if who == "schedules" or self.is_of(file, changed, how):
                    return who, how[:200]
                self.left_out.append(how)
        return "", ""

    def is_of(self, file: Path, changed: str, name: str) -> bool:
        """Return whether a test fails with a mutant, again, and not without it."""
        if not self.test(name)[0]:
            return False
        with replaced(file, changed):
            return self.test(name)[0] is False


@contextmanager
def replaced(file: Path, text: str) -> Iterator[None]:
    """Let a file hold another text within the block."""
    original = file.read_text()
    file.write_text(text)
    try:
        yield
    finally:
        file.write_text(original)


def page(found: list[dict[str, Any]]) -> str:
    """Return a table by folder, and the lines of what was not killed."""
    from tests.soak.keeping import table

    rows = []
    for folder in (*FOLDERS, ""):
        own = [r for r in found if folder in ("", folder_of(r["mutant"]))]
        by = Counter(row["killed by"] for row in own)
        num_killed = sum(by[who] for who in STEPS)
        share = f"{num_killed / max(1, len(own)):.1%}"
        counts = [by[who] for who in (*STEPS, "", "undecided")]
        rows.append([folder or "all", len(own), num_killed, share, *counts])
    head = ["folder", "mutants", "killed", "of them", *STEPS, "alive", "undecided"]
    lines = [table(head, rows), ""]
    for row in found:
        if row["killed by"] not in STEPS:
            what = row["killed by"] or "alive"
            lines.append(f"{what}: {row['mutant']}\n    {row['source']}")
    return "\n".join(lines)


def folder_of(name: str) -> str:
    """Return the folder of a mutant's module."""
    return name.partition(":")[0].rpartition("/")[0]


def main() -> None:
    """Try mutants until the time is up."""
    from tests.soak.keeping import memory, read_book, step_aside, write_book

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
    step_aside()
    book = read_book(args.out, {"benchmark": "mutants", "seed": args.seed})
    found = book.setdefault("mutants", [])
    done = {row["mutant"] for row in found}
    end_s = time.monotonic() + 60.0 * args.minutes
    ahead: SimpleQueue[Mutant] = SimpleQueue()
    for mutant in drawn(args.count, args.seed):
        if mutant.name not in done:
            ahead.put(mutant)
    lock = threading.Lock()

    def note(mutant: Mutant, who: str, how: str) -> None:
        """Write down who has noticed a mutant, and how."""
        line = (ROOT / mutant.module).read_text().splitlines()[mutant.line - 1]
        row = {"mutant": mutant.name, "source": line.strip(), "killed by": who}
        with lock:
            found.append(row | {"how": how})
            write_book(args.out, book)
            print(f"{who or 'ALIVE':<10} {mutant.name}  {how}", flush=True)

    def work() -> None:
        """Try mutants in a tree of one's own until the time is up."""
        with tempfile.TemporaryDirectory(dir=memory(), prefix="mutants.") as folder:
            tree = Tree(Path(folder), args.python)
            while time.monotonic() < end_s:
                try:
                    mutant = ahead.get_nowait()
                except Empty:
                    return
                note(mutant, *tree.survives(mutant, args.seeds))

    with ThreadPoolExecutor(args.jobs) as pool:
        for worker in [pool.submit(work) for _ in range(args.jobs)]:
            worker.result()
    print(page(found))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))  # as a script, too
    main()
