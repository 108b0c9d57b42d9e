"""Every test of the project, one suite after another, with one verdict at the end.

    python tests/all.py                   all suites
    python tests/all.py unit openmpi-2    some of them

pytest alone runs what needs no MPI and is not marked `long`; here nothing is left out,
and the files of tests/mpi also run under mpirun at several numbers of ranks, on Open
MPI (.venv), MPICH (.venv-mpich) and, where it can be had, Intel MPI (.venv-impi).
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
REPORTS = ROOT / "build" / "tests"
PYTEST = ("-m", "pytest", "-q", "--color=no", "--durations=5")
EVERY = ("-m", "long or not long")  # plain pytest leaves out what is marked `long`
# A rank that waits inside MPI gets no alarm: a thread ends it. Without -x a rank that
# failed would go on, to messages that the others do not expect.
UNDER_MPI = ("-m", "mpi4py", *PYTEST, "-x", "--with-mpi", "--timeout-method=thread")
MPIRUN = {
    "openmpi": (".venv/bin/mpirun", "--oversubscribe", "--bind-to", "none"),
    "mpich": (".venv-mpich/bin/mpirun",),
    "impi": (".venv-impi/bin/mpirun",),
}
LAUNCHERS = {"mpi_launch", "launch"}  # tests that start mpirun themselves
# Tests that start mpirun or SLURM depend on how busy the machine is: they get a second
# try. pytest's last line says so: "1 rerun".
SECOND_TRY = ("--reruns=1", "-rR")
# What needs no MPI runs on all cores, the tests of one file on one of them.
PARALLEL = ("--numprocesses=auto", "--maxprocesses=8", "--dist=loadfile")


@dataclass(frozen=True)
class Suite:
    """A command that writes a JUnit report; killed after `limit_s` seconds."""

    name: str
    command: tuple[str, ...]
    limit_s: int


def plain(name: str, *arguments: str, limit_s: int = 600) -> Suite:
    """Return a suite that needs no mpirun of ours."""
    return Suite(name, (".venv/bin/python", *PYTEST, *EVERY, *arguments), limit_s)


def under(library: str, ranks: int) -> Suite:
    """Return tests/mpi on an MPI library; on those that spin, the ones marked `mpich`.

    At 8 ranks those of the strategies that need no torch: few machines have 8 cores.
    """
    mpirun = MPIRUN[library]
    python = str(Path(mpirun[0]).with_name("python"))
    command = (*mpirun, "-n", str(ranks), python, *UNDER_MPI)
    if library != "openmpi":
        command += ("tests/mpi", "-m", "mpich")
    elif ranks == 8:
        command += ("tests/mpi/test_strategies.py", "-m", "eight")
    else:
        command += ("tests/mpi", *EVERY)
    return Suite(f"{library}-{ranks}", command, 300)


def has_intel() -> bool:
    """Return whether Intel MPI is here; there is none but for x86-64."""
    return (ROOT / MPIRUN["impi"][0]).exists()


def suites() -> list[Suite]:
    """Return all suites; a new folder of tests/ belongs to the first one."""
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir()}
    quick = sorted(folders - LAUNCHERS - {"mpi", "cluster", "__pycache__"})
    launchers = sorted(folders & LAUNCHERS)
    return [
        plain(
            "unit",
            *PARALLEL,
            *("--doctest-modules", "mpilm"),
            *(f"tests/{f}" for f in quick),
            limit_s=1800,
        ),
        *(under("openmpi", ranks) for ranks in (1, 2, 3, 4, 8)),
        *(under("mpich", ranks) for ranks in (1, 2, 3)),
        *(under("impi", ranks) for ranks in (2, 3) if has_intel()),
        plain("launch", *SECOND_TRY, *(f"tests/{f}" for f in launchers), limit_s=2400),
        plain("cluster", *SECOND_TRY, "tests/cluster", limit_s=1200),
    ]


def run(suite: Suite) -> dict[str, int]:
    """Run a suite; return how many tests passed, failed and were skipped."""
    report = REPORTS / f"{suite.name}.xml"
    report.unlink(missing_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if os.getuid() == 0:
        environment["OMPI_ALLOW_RUN_AS_ROOT"] = "1"
        environment["OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"] = "1"
    if suite.name.startswith("impi"):  # its mpirun looks for itself there
        environment["I_MPI_ROOT"] = str(ROOT / ".venv-impi")
        environment["PATH"] = f"{ROOT / '.venv-impi/bin'}:{environment['PATH']}"
    command = ("timeout", "-k", "10", str(suite.limit_s), *suite.command)
    began_s = time.monotonic()
    print(f"\n== {suite.name}: {' '.join(suite.command)}", flush=True)
    code = subprocess.call(
        (*command, f"--junitxml={report}"),
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
    )
    seconds = time.monotonic() - began_s
    counts = read(report)
    if code != 0 and counts["failed"] == 0:
        counts["failed"] = 1  # killed, crashed, or it never came to a test
    print(f"== {suite.name}: exit code {code}, {seconds:.0f} s", flush=True)
    return counts


def read(report: Path) -> dict[str, int]:
    """Return the counts of a JUnit report; zeros if there is none.

    A test that got a second try stands there twice: the last one counts.
    """
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    try:
        cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    except (OSError, ElementTree.ParseError):
        return counts
    last = {(case.get("classname"), case.get("name")): case for case in cases}
    for case in last.values():
        outcomes = {child.tag for child in case}
        if outcomes & {"failure", "error"}:
            counts["failed"] += 1
        else:
            counts["skipped" if "skipped" in outcomes else "passed"] += 1
    return counts


def main(names: list[str]) -> int:
    """Run the suites called `names`, or all of them; return the exit code."""
    known = {suite.name: suite for suite in suites()}
    if unknown := set(names) - set(known):
        print(f"no suite {', '.join(unknown)}; there are {', '.join(known)}")
        return 2
    REPORTS.mkdir(parents=True, exist_ok=True)
    results = {name: run(known[name]) for name in names or known}
    print("" if has_intel() else "\nno .venv-impi: nothing was run on Intel MPI")
    for name, counts in results.items():
        print(f"{name:<12}" + "  ".join(f"{n} {what}" for what, n in counts.items()))
    passed, failed, skipped = (
        sum(counts[what] for counts in results.values())
        for what in ("passed", "failed", "skipped")
    )
    verdict = f"{passed} passed, {failed} failed"
    print(f"{skipped} skipped\n{verdict}", flush=True)
    (REPORTS / "verdict.txt").write_text(f"{verdict}\n")
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
