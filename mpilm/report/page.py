"""The HTML page of a report: one file, without scripts, readable without a network."""

from __future__ import annotations

import html
import math
from collections.abc import Callable
from typing import Any

from mpilm import __version__
from mpilm.doctor.findings import amount
from mpilm.report import plots
from mpilm.report.reader import RankRow, Run

MOST_RANKS = 16  # with more ranks, the table shows so many: the slowest
SLOW = 0.8  # a score below this is marked; chosen, not tuned

STYLE = """
:root { color-scheme: light; --ink: #20242b; --soft: #5a606a; --line: #e1e4e8; }
* { box-sizing: border-box; }
body { margin: 0; background: #f4f5f7; color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 28px 24px 60px; }
h1 { font-size: 26px; margin: 0; } h2 { font-size: 18px; margin: 0 0 10px; }
h3 { font-size: 15px; margin: 18px 0 6px; }
.lead, .note { color: var(--soft); margin: 4px 0 18px; } .note { font-size: 13px;
  margin: 8px 0 0; }
section { background: #fff; border: 1px solid var(--line); border-radius: 8px;
  padding: 18px 20px; margin: 16px 0; overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 14px 5px 0; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; } tbody tr:last-child > * {
  border-bottom: 0; }
thead th { border-bottom: 2px solid var(--ink); vertical-align: bottom; }
tbody th { font-weight: 500; color: var(--soft); }
.best { font-weight: 700; } .slow { color: #b3261e; font-weight: 700; }
.dot { display: inline-block; width: 10px; height: 10px; border-radius: 50%;
  margin-right: 6px; }
.tag { display: inline-block; font-size: 11px; font-weight: 600; border-radius: 4px;
  padding: 0 6px; background: #fff1d6; color: #7a4b00; margin-left: 6px; }
svg { width: 100%; height: auto; display: block; }
pre { background: #f7f8fa; border-radius: 6px; padding: 12px; overflow-x: auto;
  font-size: 13px; line-height: 1.4; } summary { cursor: pointer; padding: 4px 0; }
@media print { body { background: #fff; } section { break-inside: avoid; border: 0; } }
"""

Show = Callable[[float], str]


def whole(value: float) -> str:
    """Return a number without decimals.

    >>> whole(1234567.0)
    '1,234,567'
    """
    return f"{value:,.0f}"


def time(seconds: float) -> str:
    """Return a duration.

    >>> time(7.25), time(4000.0)
    ('7.2 s', '1:06:40')
    """
    if seconds < 100.0:
        return f"{seconds:.1f} s"
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}"


def share(value: float) -> str:
    """Return a share as percent.

    >>> share(0.1234)
    '12.3%'
    """
    return f"{value:.1%}"


# what it is called, key of the summary, how it is shown, which is the best of all runs
ROWS: tuple[tuple[str, str, Show, str], ...] = (
    ("ranks", "ranks", whole, ""),
    ("parameters", "parameters", whole, ""),
    ("samples", "samples", whole, ""),
    ("minibatches of a rank", "steps", whole, ""),
    ("training time", "train_seconds", time, ""),
    ("time with evaluation", "seconds", time, ""),
    ("samples/s", "samples_per_s", whole, "max"),
    ("training loss, nats", "train_loss", "{:.4f}".format, ""),
    ("valid perplexity", "valid_perplexity", "{:.2f}".format, "min"),
    ("test perplexity", "test_perplexity", "{:.2f}".format, "min"),
    ("valid perplexity, EMA", "ema_valid_perplexity", "{:.2f}".format, "min"),
    ("test perplexity, EMA", "ema_test_perplexity", "{:.2f}".format, "min"),
    ("valid, worst rank", "worst_rank_valid_perplexity", "{:.2f}".format, "min"),
    ("test, worst rank", "worst_rank_test_perplexity", "{:.2f}".format, "min"),
    ("valid frame error", "valid_frame_error", share, "min"),
    ("test frame error", "test_frame_error", share, "min"),
    ("floor of the language", "perplexity_floor", "{:.2f}".format, ""),
    ("waiting for communication", "idle", share, ""),
    ("overlap", "overlap", share, ""),
    ("sent by all ranks", "bytes_sent", amount, ""),
    ("messages", "messages", whole, ""),
    ("mixes", "mixes", whole, ""),
    ("consensus distance", "consensus_distance", "{:.3g}".format, ""),
    ("the same, of the norm", "consensus_distance_relative", share, ""),
    ("spectral gap", "spectral_gap", "{:.3f}".format, ""),
)


def page(runs: list[Run], title: str) -> str:
    """Return the page of these runs."""
    several = len(runs) > 1
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f'<p class="lead">{lead(runs)}</p>',
        section("Summary", summary_table(runs)),
        section("Loss and perplexity", plots.loss(runs), note=about_loss(runs)),
    ]
    if drawn := plots.scaling(runs):
        parts.append(section("Scaling", drawn))
    parts.append(section("Communication", plots.communication(runs)))
    if drawn := plots.staleness(runs):
        parts.append(section("Staleness", drawn))
    parts.append(section("Ranks", *(rank_part(r, i) for i, r in enumerate(runs))))
    if several:
        parts.append(
            section("Where the configurations differ", differing_settings(runs))
        )
    parts.append(section("Configuration", *(configuration(run) for run in runs)))
    body = "\n".join(parts)
    return (
        "<!doctype html>\n"
        '<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><main>\n{body}\n</main></body></html>\n"
    )


def lead(runs: list[Run]) -> str:
    """Return what stands under the title."""
    known = [run.summary["versions"] for run in runs if "versions" in run.summary]
    versions = known[0] if known else {}
    made = ", ".join(
        f"{name} {versions[name]}" for name in ("torch", "python") if name in versions
    )
    names = ", ".join(sorted({run.strategy for run in runs}))
    text = f"{len(runs)} run{'s' if len(runs) > 1 else ''} of {names}"
    return html.escape(f"{text}. mpilm {__version__}{', ' + made if made else ''}.")


def section(title: str, *parts: str, note: str = "") -> str:
    """Return a section; "" if nothing is in it."""
    body = "\n".join(filter(None, parts))
    if note:
        body += f'<p class="note">{html.escape(note)}</p>'
    return f"<section><h2>{html.escape(title)}</h2>\n{body}</section>" if body else ""


def about_loss(runs: list[Run]) -> str:
    """Return how to read the curves."""
    text = "The loss is that of the minibatches, a running mean over all ranks."
    if any(run.summary.get("perplexity_floor") for run in runs):
        text += " Dotted: no model can get below."
    if any(run.simulated for run in runs):
        text += " Seconds of simulated runs are those of the declared machine."
    return text


def label(run: Run, index: int) -> str:
    """Return a run's name with its colour."""
    colour = plots.COLOURS[index % len(plots.COLOURS)]
    tag = '<span class="tag">simulated</span>' if run.simulated else ""
    if not run.summary:
        tag += '<span class="tag">not complete</span>'
    dot = f'<span class="dot" style="background:{colour}"></span>'
    return f"{dot}{html.escape(run.name)}{tag}"


def summary_table(runs: list[Run]) -> str:
    """Return the runs side by side. The best of several is bold."""
    head = "".join(f"<th>{label(run, i)}</th>" for i, run in enumerate(runs))
    strategies = "".join(f"<td>{html.escape(run.strategy)}</td>" for run in runs)
    lines = [f"<tr><th>strategy</th>{strategies}</tr>"]
    for name, key, show, best in ROWS:
        values = [run.number(key) for run in runs]
        known = [value for value in values if math.isfinite(value)]
        if not known:
            continue
        # seconds of different kinds are not compared
        fair = key != "samples_per_s" or len({run.simulated for run in runs}) == 1
        winner = {"min": min, "max": max}[best](known) if best and fair else math.nan
        cells = "".join(
            f"<td{mark(value == winner and len(known) > 1, 'best')}>"
            f"{show(value) if math.isfinite(value) else ''}</td>"
            for value in values
        )
        lines.append(f"<tr><th>{name}</th>{cells}</tr>")
    return html_table("<th></th>" + head, lines)


def html_table(head: str, lines: list[str]) -> str:
    """Return a table of lines under a line of headings."""
    body = "".join(lines)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def mark(yes: bool, name: str) -> str:
    """Return a class attribute, or nothing."""
    return f' class="{name}"' if yes else ""


def rank_part(run: Run, index: int) -> str:
    """Return picture and table of a run's ranks."""
    rows = run.rank_rows()
    if not rows:
        return f"<h3>{label(run, index)}</h3><p>Too few rows in the logs.</p>"
    shown = sorted(rows, key=lambda row: row.relative)[:MOST_RANKS]
    if len(rows) <= MOST_RANKS:
        shown = rows
    head = (
        "<th>rank</th><th>samples/s</th><th>waiting</th><th>sent</th>"
        "<th>speed of the fastest</th><th>of its own best</th>"
    )
    numbers = html_table(head, [rank_line(row) for row in shown])
    name = f"all {len(rows)} ranks" if shown is rows else f"the {len(shown)} slowest"
    return (
        f"<h3>{label(run, index)}</h3>{plots.ranks(run, index)}"
        f"<details><summary>{name} in numbers</summary>{numbers}</details>"
    )


def rank_line(row: RankRow) -> str:
    """Return a line of the table of ranks."""
    cells = [f"<td>{row.rank}</td><td>{whole(row.samples_per_s)}</td>"]
    cells.append(f"<td>{share(row.waiting)}</td>")
    sent = f"{amount(row.sent_Bps)}/s" if math.isfinite(row.sent_Bps) else ""
    cells.append(f"<td>{sent}</td>")
    for score in (row.relative, row.individual):
        cells.append(f"<td{mark(score < SLOW, 'slow')}>{score:.2f}</td>")
    return f"<tr>{''.join(cells)}</tr>"


def differing_settings(runs: list[Run]) -> str:
    """Return a table of the settings that are not the same in all runs."""

    def value_of(run: Run, name: str, key: str) -> Any:
        return run.config.get(name, {}).get(key, "")

    keys = {(s, k): None for run in runs for s in run.config for k in run.config[s]}
    lines = []
    for name, key in keys:
        values = [value_of(run, name, key) for run in runs]
        if all(value == values[0] for value in values):
            continue
        cells = "".join(f"<td>{html.escape(str(value))}</td>" for value in values)
        lines.append(f"<tr><th>{name}.{html.escape(key)}</th>{cells}</tr>")
    if not lines:
        return "<p>Nowhere.</p>"
    head = "".join(f"<th>{label(run, i)}</th>" for i, run in enumerate(runs))
    return html_table("<th></th>" + head, lines)


def configuration(run: Run) -> str:
    """Return the resolved configuration, folded; before it what was changed later."""
    text = html.escape(run.toml.strip())
    name = html.escape(str(run.path))
    changes = "".join(f"<br>changed: {html.escape(str(c))}" for c in run.changes)
    return f"<details><summary>{name}{changes}</summary><pre>{text}</pre></details>"
