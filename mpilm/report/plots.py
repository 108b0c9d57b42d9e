"""The pictures of a report. One that would show nothing is "" and left out."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from mpilm.doctor.findings import amount
from mpilm.report.bars import Bar, bar_chart, column_chart
from mpilm.report.charts import (
    GREY,
    Axis,
    Line,
    Look,
    line_chart,
    percent,
    short_number,
)
from mpilm.report.groups import COLOURS, IDLE, Pair, look, looks, pairs_of, series_of
from mpilm.report.reader import RankRow, Run, Vector

Points = tuple[Vector, Vector]
FEW = 12  # points of a line that are marked one by one
WITHOUT_FAULTS = "#56b4e9"
LOST = "#d55e00"


def by_clock(runs: list[Run]) -> list[tuple[str, list[int]]]:
    """Return names of the clocks there are, and the runs that go by each.

    Measured and virtual seconds never share an axis.
    """
    found: dict[str, list[int]] = {}
    for index, run in enumerate(runs):
        name = "virtual seconds" if run.simulated else "seconds"
        found.setdefault(name, []).append(index)
    return list(found.items())


def curves(
    runs: list[Run],
    chosen: list[int],
    points: Callable[[Run], Points],
    title: str,
    *,
    x: Axis,
    y: Axis,
    levels: list[float] | None = None,
) -> str:
    """Return a chart with a line for each of the chosen runs; "" if all are dots."""
    styles, lines = looks(runs), []
    for index in chosen:
        at, values = points(runs[index])
        known = np.isfinite(at) & np.isfinite(values)
        lines.append(
            Line(
                at[known],
                values[known],
                styles[index],
                runs[index].name,
                index,
                marks=int(known.sum()) <= FEW,
            )
        )
    if all(len(line.x) < 2 for line in lines):
        return ""
    return line_chart(title, lines, x=x, y=y, levels=levels or [])


def loss(runs: list[Run]) -> list[str]:
    """Draw the training loss, and the perplexity on valid where it was measured.

    Of models of somebody's own their loss on valid instead.
    """
    floors = {run.number("perplexity_floor") for run in runs}
    floors = {floor for floor in floors if math.isfinite(floor) and floor > 0.0}
    everyone = list(range(len(runs)))
    made = []

    def loss_at(name: str) -> Callable[[Run], Points]:
        def points(run: Run) -> Points:
            curve = run.curve()
            empty = np.array([])
            return (getattr(curve, name), curve.loss) if curve else (empty, empty)

        return points

    samples = Axis("samples of all ranks")
    title = "training loss, nats"
    y, levels = Axis(), [math.log(floor) for floor in floors]
    made.append(
        curves(runs, everyone, loss_at("samples"), title, x=samples, y=y, levels=levels)
    )
    for clock, chosen in by_clock(runs):
        by = loss_at("seconds")
        made.append(curves(runs, chosen, by, title, x=Axis(clock), y=y, levels=levels))

    def by_samples(run: Run) -> Points:
        return run.valid()[0], run.valid()[2]

    def by_seconds(run: Run) -> Points:
        return run.valid()[1], run.valid()[2]

    for measure in ("perplexity", "loss"):
        judged = [n for n in everyone if runs[n].measure == measure]
        is_loss = measure == "loss"
        title, y = f"{measure} on valid", Axis() if is_loss else Axis(log=10)
        levels = [] if is_loss else list(floors)
        if judged:
            made.append(
                curves(runs, judged, by_samples, title, x=samples, y=y, levels=levels)
            )
        for clock, chosen in by_clock(runs):
            if both := [n for n in chosen if n in judged]:
                x = Axis(clock)
                made.append(
                    curves(runs, both, by_seconds, title, x=x, y=y, levels=levels)
                )
    return made


def scaling(runs: list[Run]) -> list[str]:
    """Draw speed and efficiency against ranks, measured and simulated apart.

    Only where something ran on several numbers of ranks; then all runs are there.
    """
    made = []
    for clock, chosen in by_clock(runs):
        found = series_of([runs[index] for index in chosen])
        if all(len(series.points) < 2 for series in found):
            continue
        simulated = clock != "seconds"
        numbers = sorted({number for series in found for number in series.points})
        x = Axis("ranks", log=2, ticks=tuple(map(float, numbers)))
        speeds, shares = [], []
        for place, series in enumerate(found):
            at, efficiency = series.efficiency()
            ranks, values = np.array(at, float), [series.points[n] for n in at]
            means = np.array([float(np.mean(v)) for v in values])
            ends = [np.array([float(f(v)) for v in values]) for f in (min, max)]
            style, ideal = look(place), means / np.array(efficiency)
            if len(at) > 1 or simulated:
                dotted = Look(GREY, "1 3")
                speeds.append(Line(ranks, ideal, dotted))
            speeds.append(
                Line(
                    ranks,
                    means,
                    style,
                    series.name,
                    marks=True,
                    low=ends[0],
                    high=ends[1],
                )
            )
            if len(at) > 1 or simulated:
                part = np.array(efficiency)
                low, high = (end / ideal for end in ends)
                shares.append(
                    Line(
                        ranks, part, style, series.name, marks=True, low=low, high=high
                    )
                )
        kind = "simulated " if simulated else ""
        made.append(
            line_chart(f"{kind}samples/s; dotted: ideal", speeds, x=x, y=Axis(log=10))
        )
        of = "that never wait" if simulated else "as on the fewest"
        title = f"{kind}samples/s of a rank, of ranks {of}"
        made.append(
            line_chart(
                title, shares, x=x, y=Axis(show=percent, zero=True), levels=[1.0]
            )
        )
    return made


def scaling_legend(runs: list[Run]) -> list[tuple[str, Look, int]]:
    """Return name, look and largest number of repetitions of each series."""
    found = []
    for _, chosen in by_clock(runs):
        several = series_of([runs[index] for index in chosen])
        if any(len(series.points) > 1 for series in several):
            found += [
                (series.name, look(place), max(map(len, series.points.values())))
                for place, series in enumerate(several)
            ]
    return found


def stragglers(runs: list[Run]) -> list[str]:
    """Draw speed with declared faults beside the same without."""
    made = []
    for clock, chosen in by_clock(runs):
        own = [runs[index] for index in chosen]
        groups = [(pair.name, pair_bars(pair, chosen)) for pair in pairs_of(own)]
        title = "samples/s without faults, and with"
        if clock != "seconds":
            title = f"simulated {title}"
        made.append(bar_chart(title, groups, Axis()))
    return made


def pair_bars(pair: Pair, numbers: list[int]) -> list[Bar]:
    """Return the bars of runs without faults and with, the best one as the measure."""
    best = max(speed for _, speed in pair.without)
    bars = [
        Bar(speed, WITHOUT_FAULTS, f"{short_number(speed)}/s", numbers[index])
        for index, speed in pair.without
    ]
    for index, speed, declared in pair.slowed:
        note = f"{short_number(speed)}/s, {speed / best:.0%}: {declared}"
        bars.append(Bar(speed, LOST, note, numbers[index]))
    return bars


def communication(runs: list[Run]) -> list[str]:
    """Draw how long ranks waited, what they sent, and where the models were."""
    made = []
    for clock, chosen in by_clock(runs):
        several = [index for index in chosen if runs[index].ranks > 1]
        title = "share of time waiting for communication"
        y = Axis(show=percent, zero=True)
        made.append(
            curves(runs, several, lambda run: run.waiting(), title, x=Axis(clock), y=y)
        )
    styles = looks(runs)
    bars = []
    for index, run in enumerate(runs):
        each = run.number("bytes_sent") / max(run.number("samples"), 1.0)
        if run.ranks > 1 and math.isfinite(each):
            bar = Bar(each, styles[index].colour, amount(each), index)
            bars.append((run.name, [bar]))
    made.append(bar_chart("sent by all ranks for a sample", bars, Axis()))
    drawn = [i for i, run in enumerate(runs) if run.ranks > 1 and has_distance(run)]
    samples = Axis("samples of all ranks")
    title = "distance of a rank's model to the mean model"
    distance = curves(
        runs,
        drawn,
        lambda run: (run.consensus()[0], run.consensus()[2]),
        title,
        x=samples,
        y=Axis(zero=True),
    )
    return [*made, distance]


def has_distance(run: Run) -> bool:
    """Return whether its models were ever seen apart."""
    values = run.consensus()[2]
    return len(values) > 0 and float(np.nanmax(values)) > 0.0


def staleness(runs: list[Run]) -> list[str]:
    """Draw how late updates came, a chart for each run that knows."""
    made = []
    styles = looks(runs)
    for index, run in enumerate(runs):
        counts = run.staleness()
        if counts is None:
            continue
        last = int(np.flatnonzero(counts)[-1])
        shares = counts[: last + 1] / counts.sum()
        names = {len(counts) - 1: f"{len(counts) - 1}+"}
        x = Axis(
            "foreign mixes between reading and updating",
            show=lambda value, names=names: names.get(int(value), f"{value:g}"),  # type: ignore[misc]
        )
        columns = [[(float(share), styles[index].colour)] for share in shares]
        title = f"{run.name}: share of updates"
        made.append(column_chart(title, columns, x=x, y=Axis(show=percent, zero=True)))
    return made


def ranks(run: Run, index: int, rows: list[RankRow]) -> list[str]:
    """Draw each rank's throughput, time and score."""
    colour = COLOURS[index % len(COLOURS)]
    x = Axis("rank")
    speeds = [[(row.samples_per_s, colour)] for row in rows]
    times = [[(1.0 - row.waiting, colour), (row.waiting, IDLE)] for row in rows]
    made = [column_chart("samples/s", speeds, x=x, y=Axis(zero=True))]
    if any(row.waiting > 0.0 for row in rows):
        title = "time: computing; grey: waiting"
        made.append(column_chart(title, times, x=x, y=Axis(show=percent, zero=True)))
    if len(rows) > 1:
        scores = [[(row.relative, colour)] for row in rows]
        title = "speed of computing, of the fastest rank's"
        made.append(column_chart(title, scores, x=x, y=Axis(zero=True)))
    return made
