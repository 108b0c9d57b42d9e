"""`mpilm report`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import tyro

from mpilm.errors import ConfigError
from mpilm.storage.files import new_output, require_apart


def report(
    runs: tyro.conf.Positional[tuple[Path, ...]],
    /,
    *,
    out: Path,
    title: str = "",
    trace: Path | None = None,
    csv: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None,
    tensorboard: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None,
) -> int:
    """Draw runs on one HTML page that needs no network.

    Runs that cannot be read are named and left out.

    Args:
        runs: run folders, also of runs that are under way; folders of simulate; folders
            of these
        out: HTML file to write
        title: of the page; the names of the runs if not given
        trace: write the events of one run for chrome://tracing or ui.perfetto.dev, too
        csv: write runs.csv, ranks.csv and log.csv there, too
        tensorboard: write event files there, too; `wandb sync` reads them as well
    """
    from mpilm.report.export import write_csv, write_tensorboard
    from mpilm.report.folders import SIMULATION, read_all
    from mpilm.report.page import page
    from mpilm.simulate.machines import shipped_as
    from mpilm.storage.runlog import chrome_trace
    from mpilm.train.folder import RunFolder
    from mpilm.train.screen import count

    if not runs:
        raise ConfigError("name one run folder or more")
    found, problems = read_all(list(runs))
    for run in found:
        run.machine = shipped_as(run.config.get("machine", {}))
    read = [path for run in found for path in RunFolder(run.path).files()]
    read += [path / SIMULATION for path in {*runs, *(run.path for run in found)}]
    written = [out, *([trace] if trace else [])]
    if csv is not None:
        written += [csv / f"{name}.csv" for name in ("runs", "ranks", "log")]
    require_apart(written, read)
    if trace is not None and (len(found) != 1 or not found[0].logs):
        raise ConfigError(f"--trace: is of one run, not of {len(found)}")
    names = " and ".join(run.name for run in found[:3])
    if len(found) > 3:
        names = f"{found[0].name} and {len(found) - 1} more runs"
    for problem in problems:
        print(f"mpilm: left out: {problem}", file=sys.stderr)
    text = page(found, title or names, problems)
    with new_output(out) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")
    print(f"{out}: {count(len(found), 'run')}, {len(text) / 1e3:,.0f} kB")
    if trace is not None:
        print(f"{trace}: {chrome_trace(found[0].path, trace):,} events")
    if csv is not None:
        print(f"{csv}: {', '.join(path.name for path in write_csv(found, csv))}")
    if tensorboard is not None:
        paths = write_tensorboard(found, tensorboard)
        print(f"{tensorboard}: {count(len(paths), 'event file')}")
    return 0
