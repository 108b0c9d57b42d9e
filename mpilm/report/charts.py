"""Charts as SVG text, each drawn for the width of a desk and for that of a phone.

A chart is a function of its size in CSS pixels. The page holds it twice, and shows the
one that fits: letters are as large on a phone as on a desk. Nothing here knows of runs
but their number, by which the page's script finds a run's lines (`data-run`).
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]

WIDE, NARROW = (560, 270), (340, 250)  # CSS pixels; of 1280 and of 390 pixels
LEFT, RIGHT, TOP, BOTTOM = 54, 12, 30, 38  # margins around the axes
GREY = "#8a8f98"
LETTER = 6.3  # pixels, about: of the 11 pixel font

Draw = Callable[[int, int], str]


def short_number(value: float) -> str:
    """Return a number in a few letters.

    >>> [short_number(v) for v in (0, 0.25, 12.5, 200_000, 1.5e6, 2e9, 1e-5)]
    ['0', '0.25', '12.5', '200k', '1.5M', '2G', '1e-05']
    """
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            divisor = 1e3 if letter == "k" else limit
            return f"{value / divisor:.4g}{letter}"
    return f"{value:.4g}"


@dataclass(frozen=True)
class Look:
    """How something is drawn: colour, and pattern of dashes ("" is a solid line)."""

    colour: str
    dashes: str = ""

    @property
    def stroke(self) -> str:
        """The attributes of an SVG line."""
        dashes = f' stroke-dasharray="{self.dashes}"' if self.dashes else ""
        return f'stroke="{self.colour}"{dashes}'


@dataclass(frozen=True)
class Line:
    """Points that are joined.

    x, y   (N,) each
    run    its number; -1: of no run
    marks  draw every point, too
    low, high  (N,) ends of error bars, or None
    """

    x: Vector
    y: Vector
    look: Look
    name: str = ""
    run: int = -1
    marks: bool = False
    low: Vector | None = None
    high: Vector | None = None


@dataclass(frozen=True)
class Axis:
    """One axis.

    log    0 for linear, else the base of the logarithm
    show   how a number is written
    zero   it begins at 0
    ticks  where numbers stand, if that is given
    """

    name: str = ""
    log: int = 0
    show: Callable[[float], str] = short_number
    zero: bool = False
    ticks: tuple[float, ...] = ()


class Scale:
    """From values to pixels.

    >>> Scale(Axis(), 0.0, 10.0, 100, 200)(5.0)
    150.0
    """

    def __init__(self, axis: Axis, low: float, high: float, at: float, to: float):
        self.axis = axis
        if axis.zero:
            low = min(low, 0.0)
        if axis.log:
            low = max(low, 1e-300)
            high = max(high, low)
            low, high = (low / 1.1, high * 1.1) if high < 1.01 * low else (low, high)
        elif high <= low:
            low, high = low - (abs(low) or 1.0) * 0.1, high + (abs(high) or 1.0) * 0.1
        self.low, self.high, self.at, self.to = low, high, at, to

    def __call__(self, value: float) -> float:
        """Return the pixel of a value."""
        low, high = self.low, self.high
        if self.axis.log:
            value, low, high = (math.log(max(v, 1e-300)) for v in (value, low, high))
        return self.at + (value - low) / (high - low) * (self.to - self.at)

    def ticks(self) -> list[float]:
        """Return where numbers stand."""
        room = abs(self.to - self.at)
        most = max(2, int(room / (62 if self.to > self.at else 34)))
        if self.axis.ticks:
            chosen = list(self.axis.ticks)
            return chosen[:: 1 + (len(chosen) - 1) // most]
        find = log_ticks if self.axis.log else linear_ticks
        return find(self.low, self.high, most)


def linear_ticks(low: float, high: float, most: int) -> list[float]:
    """Return round numbers from `low` to `high`, about `most` of them.

    >>> linear_ticks(0.0, 1.0, 5)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    step = 10.0 ** math.floor(math.log10((high - low) / most))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (m * step) <= most + 0.5)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def log_ticks(low: float, high: float, most: int) -> list[float]:
    """Return round numbers from `low` to `high` for a logarithmic axis.

    >>> log_ticks(8.0, 1200.0, 4), log_ticks(85.0, 95.0, 4)
    ([10.0, 100.0, 1000.0], [85.0, 90.0, 95.0])
    """
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for mantissas in ((1, 1.5, 2, 3, 4, 5, 7), (1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
        found = [m * 10.0**d for d in decades for m in mantissas]
        found = [value for value in found if low <= value <= high]
        if len(found) <= most:
            break
    else:
        found = found[:: 1 + (len(found) - 1) // most]
    return found if len(found) > 2 else linear_ticks(low, high, most)


def percent(value: float) -> str:
    """Return a share.

    >>> percent(0.2)
    '20%'
    """
    return f"{100 * value:.3g}%"


def chart(title: str, draw: Draw) -> str:
    """Return a figure that fits a desk and a phone.

    Args:
        draw: returns what is inside the <svg> of a width and a height; the height may
            be changed by returning it in front, see `sized`.
    """
    shown = []
    for name, size in (("wide", WIDE), ("narrow", NARROW)):
        inside = draw(*size)
        height = size[1]
        if inside.startswith("height="):
            first, _, inside = inside.partition(";")
            height = int(first.removeprefix("height="))
        label = html.escape(title, quote=True)
        shown.append(
            f'<svg class="{name}" viewBox="0 0 {size[0]} {height}" role="img"'
            f' aria-label="{label}">{inside}</svg>'
        )
    caption = f"<figcaption>{html.escape(title)}</figcaption>"
    return f'<figure class="chart">{caption}{"".join(shown)}</figure>'


def sized(height: float, inside: str) -> str:
    """Return the inside of a chart that needs another height."""
    return f"height={math.ceil(height)};{inside}"


def words_at(
    x: float, y: float, words: str, anchor: str = "start", more: str = ""
) -> str:
    """Return a line of text."""
    place = f'x="{x:.1f}" y="{y:.1f}"'
    how = f' text-anchor="{anchor}"' if anchor != "start" else ""
    return f"<text {place}{how}{more}>{html.escape(words)}</text>"


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    x: Axis,
    y: Axis,
    levels: Sequence[float] = (),
) -> str:
    """Return a chart of lines; "" without one finite point.

    Args:
        levels: heights of dotted lines across; one far below the lines is left out.
    """
    lines = [shown for line in lines if len((shown := finite(line, x, y)).x)]
    if not lines:
        return ""
    xs = np.concatenate([line.x for line in lines])
    ends = [v for line in lines for v in (line.y, line.low, line.high) if v is not None]
    ys = np.concatenate(ends)
    levels = [level for level in levels if is_near(level, ys, y)]
    ys = np.concatenate([ys, np.array(levels)])

    def draw(width: int, height: int) -> str:
        across = Scale(x, xs.min(), xs.max(), LEFT, width - RIGHT)
        pad = 0.0 if y.log else 0.04 * float(ys.max() - ys.min())
        low = float(ys.min()) - (0.0 if y.zero else pad)
        up = Scale(y, low, float(ys.max()) + pad, height - BOTTOM, TOP - 14)
        parts = [axes(across, up, width, height)]
        for level in levels:
            at = f'y1="{up(level):.1f}" y2="{up(level):.1f}"'
            parts.append(f'<line class="level" x1="{LEFT}" x2="{width - RIGHT}" {at}/>')
        parts += [drawn_line(line, across, up) for line in lines]
        return "".join(parts)

    return chart(title, draw)


def is_near(level: float, ys: Vector, axis: Axis) -> bool:
    """Return whether a level leaves the lines at least half of the height."""
    low, high = float(ys.min()), float(ys.max())
    if axis.log:
        low, high, level = (math.log(max(v, 1e-300)) for v in (low, high, level))
    return low - level <= high - low or axis.zero


def finite(line: Line, x: Axis, y: Axis) -> Line:
    """Return the line without the points that cannot be drawn."""
    known = np.isfinite(line.x) & np.isfinite(line.y)
    known &= (line.x > 0) | (x.log == 0)
    known &= (line.y > 0) | (y.log == 0)
    ends = [None if v is None else v[known] for v in (line.low, line.high)]
    found = Line(line.x[known], line.y[known], line.look, line.name, line.run)
    return Line(found.x, found.y, line.look, line.name, line.run, line.marks, *ends)


def axes(across: Scale, up: Scale, width: int, height: int) -> str:
    """Return grid, numbers and names of both axes."""
    parts, foot = [], height - BOTTOM
    for value in up.ticks():
        at = up(value)
        if TOP - 16 <= at <= foot + 0.5:
            place = f'x1="{LEFT}" x2="{width - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"'
            parts.append(f'<line class="grid" {place}/>')
            parts.append(words_at(LEFT - 6, at + 4, up.axis.show(value), "end"))
    for value in across.ticks():
        at = across(value)
        if LEFT - 0.5 <= at <= width - RIGHT + 0.5:
            place = f'x1="{at:.1f}" x2="{at:.1f}" y1="{foot}" y2="{foot + 4}"'
            parts.append(f'<line class="axis" {place}/>')
            half = len(across.axis.show(value)) * LETTER / 2
            at = min(at, width - half)
            parts.append(words_at(at, foot + 16, across.axis.show(value), "middle"))
    parts.append(
        f'<line class="axis" x1="{LEFT}" x2="{width - RIGHT}" y1="{foot}" y2="{foot}"/>'
    )
    middle = (LEFT + width - RIGHT) / 2
    name = ' class="name"'
    parts.append(words_at(middle, height - 5, across.axis.name, "middle", name))
    return "".join(parts)


def drawn_line(line: Line, across: Scale, up: Scale) -> str:
    """Return a line with its marks and error bars."""
    points = [
        (across(x), up(y))
        for x, y in zip(line.x.tolist(), line.y.tolist(), strict=True)
    ]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    parts = []
    if len(points) > 1:
        parts.append(f'<polyline points="{path}" {line.look.stroke}/>')
    if line.low is not None and line.high is not None:
        for (x, _), low, high in zip(points, line.low, line.high, strict=True):
            if high > low:
                parts.append(
                    f'<line class="bar" x1="{x:.1f}" x2="{x:.1f}" y1="{up(low):.1f}"'
                    f' y2="{up(high):.1f}" stroke="{line.look.colour}"/>'
                )
    if line.marks or len(points) == 1:
        colour = line.look.colour
        parts += [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.2" fill="{colour}"/>'
            for x, y in points
        ]
    run = f' data-run="{line.run}"' if line.run >= 0 else ""
    about = f"<title>{html.escape(line.name)}</title>" if line.name else ""
    return f"<g{run}>{about}{''.join(parts)}</g>"
