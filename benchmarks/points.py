"""What benchmarks that train share: points stored as they come, one rule for a rate.

A point is a run: what was asked for and what it came to, as JSON holds it. It is found
by what was asked for, so a stopped benchmark goes on where it was, and a table or a
verdict is computed from the file alone.
"""

from __future__ import annotations

import io
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mpilm.config import resolve
from mpilm.data.text import prepare_text
from mpilm.errors import MpilmError
from mpilm.simulate.simulation import co_simulate
from mpilm.storage.runlog import read_run
from mpilm.world.faults import Faults
from mpilm.world.machine import Machine

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("MPILM_DATA", ROOT.parent / "shared/data"))
WIKITEXT = DATA / "wikitext2-sample"
Point = dict[str, Any]


class Points:
    """Every point so far; measures what is not there.

    Args:
        points: what the file has.
        ends: when nothing more is begun, by time.monotonic().

    points  all that is known, in the order of measuring
    """

    def __init__(self, points: list[Point], ends: float) -> None:
        self.points, self.ends = points, ends

    def found(self, key: Mapping[str, Any]) -> Point | None:
        """Return the point of which all this was asked, if it is there.

        >>> Points([{"lr": 1.0, "loss": 2.0}], 0.0).found({"lr": 1.0})
        {'lr': 1.0, 'loss': 2.0}
        """
        for point in self.points:
            if all(name in point and point[name] == key[name] for name in key):
                return point
        return None

    def get(self, run: Callable[..., Point], **key: Any) -> Point:
        """Return the point of `key`: as it is stored, or what `run` comes to.

        Raises:
            TimeoutError: it is not there, and there is no more time.
        """
        found = self.found(key)
        if found is not None:
            return found
        if time.monotonic() > self.ends:
            raise TimeoutError
        began_s = time.process_time()
        point = {**key, **run(**key)}
        point["CPU s"] = round(time.process_time() - began_s, 1)
        print(point, flush=True)
        self.points.append(point)
        self.save()
        return point

    def save(self) -> None:
        """Write all points to the file; here there is none."""


def write_json(path: Path, document: Any) -> None:
    """Write a file that is there as a whole or not at all."""
    scratch = path.with_suffix(".part")
    scratch.write_text(json.dumps(document, indent=1, default=str) + "\n")
    scratch.replace(path)


def best_rate(
    first: float, quality: Callable[[float], float], *, beyond: int = 0
) -> float:
    """Return the rate from which neither half nor double is better.

    Args:
        beyond: how many rates that are no better are passed over on the way to one
            that is.

    >>> best_rate(0.01, lambda lr: abs(lr - 0.035))
    0.04
    >>> loss = {1.0: 4.0, 2.0: 5.0, 4.0: 3.0}
    >>> [best_rate(1.0, lambda lr: loss.get(lr, 9.0), beyond=n) for n in (0, 1)]
    [1.0, 4.0]
    """
    best = first
    for factor in (2.0, 0.5):
        rate, misses = first, 0
        while misses <= beyond:
            rate *= factor
            if quality(rate) < quality(best):
                best, misses = rate, 0
            else:
                misses += 1
        if best != first:
            break
    return best


def train_virtually(
    document: Mapping[str, Any],
    ranks: int,
    machine: Machine | None = None,
    faults: Faults | None = None,
    *,
    windows: int = 0,
) -> Point:
    """Train with real gradients in virtual time; return what it came to.

    A run that diverges has infinite measures, and `error` says how.

    Args:
        windows: into how many the training losses of all ranks are put.

    Returns:
        valid, test  perplexity; of a model of frames cross-entropy in nats, and of its
                     test split also `wrong`, the share of wrong guesses
        ema          test of the moving average, if there is one
        sent         models sent by a rank
        seconds      of training, virtual
        loss         the last training loss, nats
        curve        [virtual seconds, valid] of each evaluation, if there are several;
                     else [virtual seconds, perplexity] of each window
    """
    config = resolve(document)
    config = replace(
        config, machine=machine or config.machine, faults=faults or config.faults
    )
    with tempfile.TemporaryDirectory() as name:
        folder, silent = Path(name), io.StringIO()
        try:
            with redirect_stdout(silent), redirect_stderr(silent):
                outcome = co_simulate(config, folder, ranks)
        except MpilmError as error:
            inf = math.inf
            return {"valid": inf, "test": inf, "sent": math.nan, "seconds": math.nan,
                    "error": str(error).replace(f"{folder}/", "")}  # fmt: skip
        summary = json.loads((folder / "summary.json").read_text())
        measure = "perplexity" if "valid_perplexity" in summary else "loss"
        parameters = summary["parameters"]
        point = {
            "valid": summary[f"valid_{measure}"],
            "test": summary[f"test_{measure}"],
            "sent": outcome.bytes_sent / (4 * parameters * ranks),
            "seconds": outcome.seconds,
            "loss": outcome.loss,
        }
        if f"ema_test_{measure}" in summary:
            point["ema"] = summary[f"ema_test_{measure}"]
        if "test_frame_error" in summary:
            point["wrong"] = summary["test_frame_error"]
            judged = [name for name in ("valid", "test", "ema") if name in point]
            point |= {name: math.log(point[name]) for name in judged}
        if config.train.valid_every:
            end = [point["seconds"], point["valid"]]
            point["curve"] = [*curve_of(folder, measure), end]
        elif windows:
            point["curve"] = training_curve(folder, windows)
        return point


def curve_of(folder: Path, measure: str) -> list[list[float]]:
    """Return [virtual seconds, valid] of each evaluation of a run but the last."""
    rows = read_run(folder)[0].rows
    curve: list[list[float]] = []
    before = math.nan
    for second, value in zip(rows["seconds"], rows[f"valid_{measure}"], strict=True):
        if math.isfinite(value) and value != before:
            curve.append([float(second), float(value)])
            before = value
    return curve


def training_curve(folder: Path, windows: int) -> list[list[float]]:
    """Return [virtual seconds, perplexity] of the logged losses of all ranks.

    In the order of time they are cut into `windows` of equally many; each stands at the
    mean of their times. In the first pass over the data no rank has seen what its loss
    is of.
    """
    losses: list[tuple[float, float]] = []
    for rank in read_run(folder).values():
        seconds, values = rank.rows["seconds"], rank.rows["loss"]
        losses += zip(map(float, seconds), map(float, values), strict=True)
    parts = np.array_split(np.array(sorted(losses)), windows)
    means = (part.mean(0) for part in parts)
    return [[float(second), math.exp(min(loss, 700.0))] for second, loss in means]


def wikitext_sample(out: Path, *, vocab: int, valid: int, test: int) -> Path:
    """Prepare the WikiText-2 sample; return the corpus `out`.

    Its valid split is trained on; from its test split come the first `valid` tokens to
    choose rates by, and the next `test` for what is reported.
    """
    splits: list[list[str]] = [[], []]
    taken = 0
    with (WIKITEXT / "wiki.test-a.tokens").open(encoding="utf-8") as lines:
        for line in lines:
            if taken < valid + test:
                splits[taken >= valid].append(line)
                taken += len(line.split()) + 1
    with tempfile.TemporaryDirectory() as name:
        held_out = [Path(name) / "valid", Path(name) / "test"]
        for path, split in zip(held_out, splits, strict=True):
            path.write_text("".join(split), encoding="utf-8")
        train = (WIKITEXT / "wiki.valid.tokens",)
        prepare_text(train, held_out[:1], held_out[1:], out, vocab=vocab)
    return out
