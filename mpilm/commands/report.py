"""`mpilm report`."""

from __future__ import annotations

from pathlib import Path

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
) -> int:
    """Draw runs side by side on one HTML page that needs no network.

    Args:
        runs: run folders, also of runs that are under way, and folders of simulate
        out: HTML file to write
        title: of the page; the names of the runs if not given
        trace: write the events of one run for chrome://tracing or ui.perfetto.dev, too
    """
    from mpilm.report.page import page
    from mpilm.report.reader import read_all
    from mpilm.storage.runlog import chrome_trace
    from mpilm.train.folder import RunFolder
    from mpilm.train.screen import count

    if not runs:
        raise ConfigError("name one run folder or more")
    found = read_all(list(runs))
    read = [path for run in found for path in RunFolder(run.path).files()]
    read += [path / "simulate.json" for path in runs]
    require_apart([out] if trace is None else [out, trace], read)
    if trace is not None and len(found) != 1:
        raise ConfigError(f"--trace: is of one run, not of {len(found)}")
    names = " and ".join(run.name for run in found[:3])
    if len(found) > 3:
        names = f"{found[0].name} and {len(found) - 1} more runs"
    text = page(found, title or names)
    with new_output(out) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")
    print(f"{out}: {count(len(found), 'run')}, {len(text) / 1e3:,.0f} kB")
    if trace is not None:
        print(f"{trace}: {chrome_trace(found[0].path, trace):,} events")
    return 0
