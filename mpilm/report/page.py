"""The HTML page of a report: one file, readable without a network and in print."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Sequence

from mpilm import __version__
from mpilm.doctor.findings import amount
from mpilm.report import plots
from mpilm.report.charts import Look
from mpilm.report.groups import differing, flat, looks, shown
from mpilm.report.reader import PARTS, SLOW, RankRow, Run
from mpilm.report.skin import SCRIPT, STYLE
from mpilm.report.timeline import timeline

MOST_RANKS = 16  # with more ranks, the table shows so many: the slowest
MOST_OPEN = 3  # runs whose ranks are shown unfolded

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
COLUMNS: tuple[tuple[str, str, Show, str], ...] = (
    ("ranks", "ranks", whole, ""),
    ("samples/s", "samples_per_s", whole, "max"),
    ("of ranks that never wait", "efficiency", share, ""),
    ("waiting", "idle", share, ""),
    ("valid perplexity", "valid_perplexity", "{:.2f}".format, "min"),
    ("test perplexity", "test_perplexity", "{:.2f}".format, "min"),
    ("valid loss", "valid_loss", "{:.4f}".format, "min"),
    ("test loss", "test_loss", "{:.4f}".format, "min"),
    ("valid error", "valid_error", share, "min"),
    ("test error", "test_error", share, "min"),
    ("valid frame error", "valid_frame_error", share, "min"),
    ("test frame error", "test_frame_error", share, "min"),
    ("training time", "train_seconds", time, ""),
    ("time with evaluation", "seconds", time, ""),
    ("samples", "samples", whole, ""),
    ("minibatches of a rank", "steps", whole, ""),
    ("training loss, nats", "train_loss", "{:.4f}".format, ""),
    ("valid perplexity, EMA", "ema_valid_perplexity", "{:.2f}".format, "min"),
    ("test perplexity, EMA", "ema_test_perplexity", "{:.2f}".format, "min"),
    ("valid loss, EMA", "ema_valid_loss", "{:.4f}".format, "min"),
    ("test loss, EMA", "ema_test_loss", "{:.4f}".format, "min"),
    ("valid loss, worst rank", "worst_rank_valid_loss", "{:.4f}".format, "min"),
    ("test loss, worst rank", "worst_rank_test_loss", "{:.4f}".format, "min"),
    ("valid, worst rank", "worst_rank_valid_perplexity", "{:.2f}".format, "min"),
    ("test, worst rank", "worst_rank_test_perplexity", "{:.2f}".format, "min"),
    ("overlap", "overlap", share, ""),
    ("sent by all ranks", "bytes_sent", amount, ""),
    ("messages", "messages", whole, ""),
    ("mixes", "mixes", whole, ""),
    ("consensus distance", "consensus_distance", "{:.3g}".format, ""),
    ("the same, of the norm", "consensus_distance_relative", share, ""),
    ("spectral gap", "spectral_gap", "{:.3f}".format, ""),
    ("floor of the language", "perplexity_floor", "{:.2f}".format, ""),
    ("parameters", "parameters", whole, ""),
)


def page(runs: list[Run], title: str, problems: Sequence[str] = ()) -> str:
    """Return the page of these runs.

    Args:
        problems: why other runs are not on it.
    """
    runs = grouped(runs)
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f'<p class="lead">{lead(runs)}</p>',
        *(f'<p class="note">left out: {html.escape(p)}</p>' for p in problems),
        section("Summary", summary_table(runs), note=about_table(runs)),
        section(
            "Loss and perplexity", charts(plots.loss(runs), runs), about_loss(runs)
        ),
        section("Scaling", scaling_keys(runs), charts(plots.scaling(runs))),
        section("Stragglers", charts(plots.stragglers(runs))),
        section("Communication", charts(plots.communication(runs), runs)),
        section("Staleness", charts(plots.staleness(runs))),
        section("Ranks", *(rank_part(r, i, len(runs)) for i, r in enumerate(runs))),
    ]
    if len(runs) > 1:
        parts.append(
            section("Where the configurations differ", differing_settings(runs))
        )
    parts.append(section("Configuration", *(configuration(run) for run in runs)))
    body = "\n".join(filter(None, parts))
    return (
        "<!doctype html>\n"
        '<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><main>\n{body}\n</main><script>{SCRIPT}</script></body></html>\n"
    )


def grouped(runs: list[Run]) -> list[Run]:
    """Return the runs, those of a strategy together, by number of ranks.

    What was simulated stands below what was measured.
    """
    first: dict[str, int] = {}
    for run in runs:
        first.setdefault(run.strategy, len(first))
    return sorted(runs, key=lambda r: (first[r.strategy], r.simulated, r.ranks))


def lead(runs: list[Run]) -> str:
    """Return what stands under the title."""
    known = [run.summary["versions"] for run in runs if "versions" in run.summary]
    versions = known[0] if known else {}
    made = ", ".join(
        f"{name} {versions[name]}" for name in ("torch", "python") if name in versions
    )
    names = ", ".join(dict.fromkeys(run.strategy for run in runs))
    text = f"{len(runs)} run{'s' if len(runs) > 1 else ''} of {names}"
    return html.escape(f"{text}. mpilm {__version__}{', ' + made if made else ''}.")


def section(title: str, *parts: str, note: str = "") -> str:
    """Return a section; "" if nothing is in it."""
    body = "\n".join(filter(None, parts))
    if body and note:
        body += f'<p class="note">{html.escape(note)}</p>'
    return f"<section><h2>{html.escape(title)}</h2>\n{body}</section>" if body else ""


def charts(drawn: Sequence[str], runs: list[Run] | None = None) -> str:
    """Return charts side by side, or one a row; with a key if `runs` are several."""
    made = [chart for chart in drawn if chart]
    if not made:
        return ""
    key = ""
    if runs is not None and len(runs) > 1:
        items = zip(runs, looks(runs), strict=True)
        key = keys(
            f'<li data-run="{i}">{swatch(look)}{html.escape(run.name)}</li>'
            for i, (run, look) in enumerate(items)
            if any(f'data-run="{i}"' in chart for chart in made)
        )
    return f'{key}<div class="charts">{"".join(made)}</div>'


def keys(items: Iterable[str]) -> str:
    """Return what lines stand for."""
    return f'<ul class="keys">{"".join(items)}</ul>'


def swatch(look: Look) -> str:
    """Return a piece of a line."""
    return (
        '<svg class="key" viewBox="0 0 30 10" aria-hidden="true"><line x1="0" x2="30"'
        f' y1="5" y2="5" stroke-width="3" {look.stroke}/></svg>'
    )


def scaling_keys(runs: list[Run]) -> str:
    """Return what the lines of the scaling charts stand for."""
    items = []
    for name, look, most in plots.scaling_legend(runs):
        runs_of = f" (up to {most} runs a point: mean, least, most)" if most > 1 else ""
        items.append(f"<li>{swatch(look)}{html.escape(name)}{runs_of}</li>")
    return keys(items) if items else ""


def about_loss(runs: list[Run]) -> str:
    """Return how to read the curves, if there are any."""
    if not any(plots.loss(runs)):
        return ""
    text = "The loss is that of the minibatches, a running mean over all ranks."
    if any(run.summary.get("perplexity_floor") for run in runs):
        text += " Dotted: no model can get below."
    if any(run.simulated for run in runs):
        text += " Virtual seconds are those of the declared machine."
    if len(set(map(corpus_of, runs))) > 1:
        text += " The runs are of different corpora: their losses are not comparable."
    return f'<p class="note">{html.escape(text)}</p>'


def corpus_of(run: Run) -> str:
    """Return the corpus of a run."""
    return str(run.config.get("data", {}).get("corpus"))


def about_table(runs: list[Run]) -> str:
    """Return how to use the table."""
    if len(runs) < 2:
        return ""
    text = "A click on a heading sorts, on the first one brings the groups back; a"
    text += " click on a run picks it out in the charts."
    if len({run.simulated for run in runs}) > 1:
        text += " Measured and simulated speeds are not compared."
    return text


def label(run: Run, look: Look | None = None, *, tagged: bool = True) -> str:
    """Return a run's name, with its line; tagged: simulated runs are marked."""
    tag = '<span class="tag">simulated</span>' if run.simulated and tagged else ""
    if not run.summary:
        tag += '<span class="tag">not complete</span>'
    return f"{swatch(look) if look else ''}{html.escape(run.name)}{tag}"


def summary_table(runs: list[Run]) -> str:
    """Return the runs below each other, in groups. The best of several is bold."""
    used = []
    for name, key, show, best in COLUMNS:
        values = [run.number(key) for run in runs]
        known = [value for value in values if math.isfinite(value)]
        if not known:
            continue
        # nor are seconds of different kinds compared, or models of different data
        of = [
            run.simulated if key == "samples_per_s" else corpus_of(run) for run in runs
        ]
        fair = len(set(of)) == 1
        winner = {"min": min, "max": max}[best](known) if best and fair else math.nan
        used.append((name, values, show, winner if len(known) > 1 else math.nan))
    styles = looks(runs)
    lines, group = [], ""
    for index, run in enumerate(runs):
        name = f"{run.strategy}{', simulated' if run.simulated else ''}"
        if name != group and len(runs) > 1:
            group = name
            blank = f'<td colspan="{len(used)}"></td>'
            lines.append(f'<tr class="group"><th>{html.escape(name)}</th>{blank}</tr>')
        cells = "".join(
            cell(values[index], show, best=values[index] == winner)
            for _, values, show, winner in used
        )
        name = label(run, styles[index], tagged=len(runs) == 1)
        lines.append(f'<tr data-run="{index}"><th>{name}</th>')
        lines[-1] += f"{cells}</tr>"
    heads = [name for name, *_ in used]
    return html_table(["run", *heads], lines, sorts=True)


def cell(value: float, show: Show, *, best: bool) -> str:
    """Return a number in a table, and what it is worth where the table is sorted."""
    if not math.isfinite(value):
        return '<td data-v=""></td>'
    return f'<td data-v="{value:.9g}"{mark(best, "best")}>{show(value)}</td>'


def html_table(heads: Sequence[str], lines: list[str], *, sorts: bool = False) -> str:
    """Return a table of lines under headings, which scrolls where it is too wide."""
    cells = "".join(
        f"<th><button>{html.escape(head)}</button></th>"
        if sorts
        else f"<th>{html.escape(head)}</th>"
        for head in heads
    )
    kind = ' class="sorts"' if sorts else ""
    table = f"<table{kind}><thead><tr>{cells}</tr></thead>"
    body = f"<tbody>{''.join(lines)}</tbody></table>"
    return f'<div class="scroll" tabindex="0">{table}{body}</div>'


def mark(yes: bool, name: str) -> str:
    """Return a class attribute, or nothing."""
    return f' class="{name}"' if yes else ""


def rank_part(run: Run, index: int, of: int) -> str:
    """Return pictures and table of a run's ranks, folded where there are many runs."""
    rows = run.rank_rows()
    drawn = charts([*(plots.ranks(run, index, rows) if rows else []), timeline(run)])
    if not drawn:
        if not run.logs:  # a protocol: nothing was written of single ranks
            return ""
        return f"<h3>{label(run)}</h3><p>Too few rows in the logs.</p>"
    most = sorted(rows, key=lambda row: row.relative)[:MOST_RANKS]
    if len(rows) <= MOST_RANKS:
        most = rows
    heads = ("rank", "samples/s", *PARTS, "waiting", "sent", "speed of the fastest")
    numbers = html_table([*heads, "of its own best"], [rank_line(row) for row in most])
    name = f"all {len(rows)} ranks" if most is rows else f"the {len(most)} slowest"
    inside = f"{drawn}<details><summary>{name} in numbers</summary>{numbers}</details>"
    if of <= MOST_OPEN:
        return f"<h3>{label(run)}</h3>{inside}"
    worst = min((row.relative for row in rows), default=1.0)
    slowest = f", slowest rank {worst:.2f}" if worst < SLOW else ""
    return f"<details><summary>{label(run)}{slowest}</summary>{inside}</details>"


def rank_line(row: RankRow) -> str:
    """Return a line of the table of ranks."""
    cells = [f"<td>{row.rank}</td><td>{whole(row.samples_per_s)}</td>"]
    parts = [getattr(row, name) for name in PARTS]
    cells += [f"<td>{'' if math.isnan(part) else share(part)}</td>" for part in parts]
    cells.append(f"<td>{share(row.waiting)}</td>")
    sent = f"{amount(row.sent_Bps)}/s" if math.isfinite(row.sent_Bps) else ""
    cells.append(f"<td>{sent}</td>")
    for score in (row.relative, row.individual):
        cells.append(f"<td{mark(score < SLOW, 'slow')}>{score:.2f}</td>")
    return f"<tr>{''.join(cells)}</tr>"


def differing_settings(runs: list[Run]) -> str:
    """Return a table of the settings that are not the same in all runs."""
    names = differing(runs)
    if not names:
        return "<p>Nowhere.</p>"
    lines = []
    for index, (run, look) in enumerate(zip(runs, looks(runs), strict=True)):
        settings = flat(run.config)
        cells = "".join(
            f'<td class="word">{html.escape(shown(settings.get(name, "")))}</td>'
            for name in names
        )
        head = f"<th>{label(run, look)}</th>"
        lines.append(f'<tr data-run="{index}">{head}{cells}</tr>')
    return html_table(["run", *names], lines, sorts=True)


def configuration(run: Run) -> str:
    """Return the resolved configuration, folded; before it what was changed later."""
    if not run.toml:
        return ""
    text = html.escape(run.toml.strip())
    name = html.escape(str(run.path))
    changes = "".join(f"<br>changed: {html.escape(str(c))}" for c in run.changes)
    return f"<details><summary>{name}{changes}</summary><pre>{text}</pre></details>"
