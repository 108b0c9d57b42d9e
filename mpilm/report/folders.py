"""Run folders, found and read for a report."""

from __future__ import annotations

import json
from pathlib import Path

from mpilm.config import read_toml, tomllib
from mpilm.errors import CheckpointError
from mpilm.report.reader import Run
from mpilm.storage.files import printable, reason, text_of
from mpilm.storage.runlog import read_run
from mpilm.train.changes import read_changes
from mpilm.train.folder import RunFolder

SIMULATION = "simulate.json"


def read(path: Path, name: str) -> Run:
    """Return the run in a folder.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    folder = RunFolder(path).require()
    at = folder.config
    try:
        toml = read_toml(at)
        config = tomllib.loads(toml)
        summary, at = {}, folder.summary
        if at.exists():
            summary = json.loads(text_of(at))
    except OSError as error:
        raise CheckpointError(f"{at}: cannot read: {reason(error)}") from None
    except ValueError as error:
        kind = "TOML" if at == folder.config else "JSON"
        raise CheckpointError(f"{at}: cut off? It is not {kind}: {error}") from None
    changes = read_changes(folder.changes)
    run = Run(name, path, summary, config, toml, read_run(path), changes)
    run.simulated |= (path.parent / SIMULATION).exists()  # one that is under way
    return run


def read_all(paths: list[Path]) -> tuple[list[Run], list[str]]:
    """Return the runs of folders, and a line for each that cannot be read.

    A folder may be a run, one made by `mpilm simulate`, or hold any number of both.

    Raises:
        CheckpointError: there is no run that can be read.
    """
    found: list[Path] = []
    for path in paths:
        found += runs_inside(path)
    runs: list[Run] = []
    problems: list[str] = []
    for path, name in zip(found, short_names(found), strict=True):
        try:
            runs += [read(path, name)] if is_run(path) else read_protocol(path, name)
        except CheckpointError as error:
            problems.append(str(error))
    if not runs:
        raise CheckpointError(problems[0] if problems else "no runs to draw")
    return runs, problems


def is_run(path: Path) -> bool:
    """Return whether it is not the folder of a simulation."""
    return not (path / SIMULATION).exists() or (path / "config.toml").exists()


def runs_inside(path: Path, depth: int = 2) -> list[Path]:
    """Return the run folders in a folder of several; itself, if it is none.

    A simulation of protocols alone has no run folders: it stands for itself.
    """
    if (path / "config.toml").exists() or depth == 0:
        return [path]
    if (path / SIMULATION).exists():
        inside = [c.parent for c in sorted(path.glob("ranks-*/config.toml"))]
        return inside or [path]
    marks = ("config.toml", SIMULATION)
    inside = [
        found
        for child in (sorted(path.iterdir()) if path.is_dir() else [])
        if any(any(child.glob(up + mark)) for mark in marks for up in ("", "*/"))
        for found in runs_inside(child, depth - 1)
    ]
    return inside or [path]


def read_protocol(path: Path, name: str) -> list[Run]:
    """Return what `mpilm simulate --protocol-only` found, a run per number of ranks.

    Raises:
        CheckpointError: it cannot be read.
    """
    where = path / SIMULATION
    try:
        document = json.loads(text_of(where))
        config, outcomes = document["config"], document["outcomes"]
        runs = []
        for outcome in outcomes:
            summary = {
                **outcome,
                "simulated": True,
                "train_seconds": outcome["seconds"],
                "idle": outcome["communication"],
            }
            one = Run(f"{name}/ranks-{outcome['ranks']:04d}", path, summary, config)
            runs.append(one)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{where}: corrupt: {error}") from None
    return runs


def short_names(paths: list[Path]) -> list[str]:
    """Return the shortest ends of paths that tell them apart.

    >>> short_names([Path("runs/a/x"), Path("runs/b/x")]), short_names([Path("r/a")])
    (['a/x', 'b/x'], ['a'])
    """
    for length in range(1, 9):
        names = [printable("/".join(path.resolve().parts[-length:])) for path in paths]
        if len(set(names)) == len({path.resolve() for path in paths}):
            break
    return names
