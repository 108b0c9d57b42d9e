"""The pictures of a report, as SVG text that stands inside the page."""

from __future__ import annotations

import io
import math
import re
from typing import TYPE_CHECKING, Any

import numpy as np

from mpilm.errors import DataError
from mpilm.report.reader import Run, Vector

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# M. Okabe and K. Ito, "Color Universal Design", 2008: told apart by everybody
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
DASHES = ("-", "--", ":")
MANY = 40  # bars; with more of them, no number stands under each
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a8f98",
    "axes.labelcolor": "#3b4048",
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e8eb",
    "xtick.color": "#5a606a",
    "ytick.color": "#5a606a",
    "legend.frameon": False,
    "lines.linewidth": 1.7,
    "svg.fonttype": "path",
    "svg.hashsalt": "mpilm",  # the same runs, the same page
}


def figure(rows: int, columns: int, width: float, height: float) -> tuple[Figure, Any]:
    """Return a new figure and its axes, (rows, columns).

    Raises:
        DataError: matplotlib is missing.
    """
    try:
        import matplotlib
    except ImportError:
        raise DataError("no matplotlib here: pip install 'mpilm[report]'") from None
    matplotlib.use("svg")
    matplotlib.rcParams.update(STYLE)
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained")
    return made, made.subplots(rows, columns, squeeze=False)


def as_svg(made: Figure) -> str:
    """Return the figure as an <svg> element."""
    text = io.StringIO()
    made.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    # as wide as the page allows
    return re.sub(r'(<svg [^>]*?)width="[^"]*" height="[^"]*"', r"\1", svg, count=1)


def line_style(index: int) -> dict[str, Any]:
    """Return how the lines of a run look, the same in all pictures."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": DASHES[index // len(COLOURS) % len(DASHES)],
    }


def thousands(axes: Axes) -> None:
    """Write large numbers of the horizontal axis as 200k or 1.5M."""
    from matplotlib.ticker import EngFormatter

    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def legend(made: Figure, axes: Axes, runs: list[Run]) -> None:
    """Put one legend above all axes, if there is more than one run."""
    handles, labels = axes.get_legend_handles_labels()
    if len(runs) > 1 and handles:
        columns = min(len(handles), 4)
        made.legend(handles, labels, loc="outside upper left", ncols=columns)


def loss(runs: list[Run]) -> str:
    """Draw loss and perplexity against samples and against seconds."""
    made, axes = figure(2, 2, 10.5, 6.4)
    for index, run in enumerate(runs):
        look = line_style(index)
        curve = run.curve()
        samples, seconds, values = run.valid()
        if curve is not None:
            axes[0, 0].plot(curve.samples, curve.loss, label=run.name, **look)
            axes[0, 1].plot(curve.seconds, curve.loss, label=run.name, **look)
        points = {"marker": "o", "markersize": 4.5, **look}
        axes[1, 0].plot(samples, values, label=run.name, **points)
        axes[1, 1].plot(seconds, values, label=run.name, **points)
    floors = {run.number("perplexity_floor") for run in runs}
    floors = {floor for floor in floors if math.isfinite(floor)}
    for row, what in enumerate(("training loss (nats)", "valid perplexity")):
        axes[row, 0].set_ylabel(what)
        axes[row, 0].set_xlabel("samples of all ranks")
        axes[row, 1].set_xlabel(seconds_label(runs))
        thousands(axes[row, 0])
        for one in axes[row]:
            for floor in floors:
                level = math.log(floor) if row == 0 else floor
                one.axhline(level, color="#8a8f98", lw=1, ls=(0, (1, 2)))
    for one in axes[1]:
        one.set_yscale("log")
        plain_ticks(one)
    legend(made, axes[1, 0], runs)
    return as_svg(made)


def plain_ticks(axes: Axes) -> None:
    """Write the numbers of a logarithmic vertical axis in full."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    low, high = axes.get_ylim()
    narrow = high < 20 * low
    subs = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 7.0) if narrow else (1.0,)
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def seconds_label(runs: list[Run]) -> str:
    """Return what the seconds of these runs are."""
    if all(run.simulated for run in runs):
        return "virtual seconds"
    return "seconds (some virtual)" if any(run.simulated for run in runs) else "seconds"


def communication(runs: list[Run]) -> str:
    """Draw how much of their time ranks waited, and where the models were."""
    drawn = [run for run in runs if run.ranks > 1 and len(run.consensus()[2])]
    made, axes = figure(1, 2 if drawn else 1, 10.5, 3.3)
    for index, run in enumerate(runs):
        look = line_style(index)
        curve = run.curve()
        if curve is not None:
            axes[0, 0].plot(curve.seconds, curve.waiting, label=run.name, **look)
        if any(run is one for one in drawn):
            samples, _, values = run.consensus()
            axes[0, 1].plot(samples, values, marker="o", markersize=4.5, **look)
    axes[0, 0].set_title("share of time waiting for communication")
    axes[0, 0].set_xlabel(seconds_label(runs))
    axes[0, 0].set_ylim(bottom=0.0)
    axes[0, 0].yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    if drawn:
        axes[0, 1].set_title("distance of a rank's model to the mean model")
        axes[0, 1].set_xlabel("samples of all ranks")
        axes[0, 1].set_ylim(bottom=0.0)
        thousands(axes[0, 1])
    legend(made, axes[0, 0], runs)
    return as_svg(made)


def ranks(run: Run, index: int) -> str:
    """Draw each rank's throughput, time and score."""
    rows = run.rank_rows()
    if not rows:
        return ""
    made, axes = figure(1, 3, 10.5, 2.6)
    numbers = np.array([row.rank for row in rows])
    colour = COLOURS[index % len(COLOURS)]
    waiting = np.array([row.waiting for row in rows])
    speed, time, score = axes[0]
    speed.bar(numbers, [row.samples_per_s for row in rows], color=colour)
    speed.set_title("samples/s")
    time.bar(numbers, 1.0 - waiting, color=colour, label="computing")
    time.bar(numbers, waiting, bottom=1.0 - waiting, color="#c9ced6", label="waiting")
    time.set_title("time: computing, waiting (grey)")
    time.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    score.bar(numbers - 0.2, [r.relative for r in rows], 0.38, color=colour)
    score.bar(numbers + 0.2, [r.individual for r in rows], 0.38, color="#c9ced6")
    score.set_title("speed: of fastest, of own best (grey)")
    score.set_ylim(0.0, 1.05)
    for one in axes[0]:
        one.grid(visible=False, axis="x")
        one.set_xlabel("rank")
        if len(rows) <= MANY:
            one.set_xticks(numbers[:: 1 + len(rows) // 10])
    return as_svg(made)


def staleness(runs: list[Run]) -> str:
    """Draw how late updates came; "" if no run knows."""
    known = [(i, run, run.staleness()) for i, run in enumerate(runs)]
    drawn = [(i, run, counts) for i, run, counts in known if counts is not None]
    if not drawn:
        return ""
    made, axes = figure(1, 1, 10.5, 2.9)
    (bars,) = axes[0]
    width = 0.8 / len(drawn)
    bins = max(len(counts) for *_, counts in drawn)
    for place, (index, run, counts) in enumerate(drawn):
        at = np.arange(len(counts)) - 0.4 + width * (place + 0.5)
        share: Vector = counts / counts.sum()
        colour = COLOURS[index % len(COLOURS)]
        bars.bar(at, share, width, color=colour, label=run.name)
    names = [str(number) for number in range(bins)]
    bars.set_xticks(range(bins), [*names[:-1], f"{bins - 1}+"])
    bars.grid(visible=False, axis="x")
    bars.set_xlabel("foreign mixes between reading a model and updating it")
    bars.set_ylabel("share of updates")
    bars.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    if len(drawn) > 1:
        bars.legend()
    return as_svg(made)


def scaling(runs: list[Run]) -> str:
    """Draw speed against ranks; "" unless a strategy ran on several numbers of them."""
    series: dict[tuple[str, bool], dict[int, float]] = {}
    for run in runs:
        speed = run.number("samples_per_s")
        if math.isfinite(speed):
            series.setdefault((run.strategy, run.simulated), {})[run.ranks] = speed
    series = {key: points for key, points in series.items() if len(points) > 1}
    if not series:
        return ""
    made, axes = figure(1, 2, 10.5, 3.3)
    speed_axes, efficiency = axes[0]
    for index, ((name, simulated), points) in enumerate(series.items()):
        numbers = sorted(points)
        values = np.array([points[number] for number in numbers])
        first = values[0] / numbers[0]
        label = f"{name} (simulated)" if simulated else name
        look = {"marker": "o", "markersize": 4.5, **line_style(index)}
        speed_axes.plot(numbers, values, label=label, **look)
        ideal = first * np.array(numbers)
        speed_axes.plot(numbers, ideal, color="#8a8f98", lw=1, ls=(0, (1, 2)))
        efficiency.plot(numbers, values / ideal, label=label, **look)
    for one in axes[0]:
        one.set_xscale("log", base=2)
        one.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        one.set_xlabel("ranks")
    speed_axes.set_yscale("log")
    speed_axes.set_title("samples/s (dotted: linear)")
    efficiency.set_title("samples/s of a rank, relative to the fewest ranks")
    efficiency.set_ylim(0.0, 1.05 * max(1.0, efficiency.get_ylim()[1]))
    efficiency.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    speed_axes.legend()
    return as_svg(made)
