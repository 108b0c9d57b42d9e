"""The folder of a sweep: what was asked for, how its points stand, their results.

OUT/sweep.json     what was asked for, and each point's state
OUT/NAME/          the run folder, or that of the simulation
OUT/log/NAME.log   what its command said
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpilm.commands.points import SUBMITTED, Point, Spec
from mpilm.commands.queued import Submitted
from mpilm.convert import convert
from mpilm.errors import CheckpointError, ConfigError
from mpilm.storage.files import reason, write_json
from mpilm.storage.owner import NAME as OWNER

NAME = "sweep.json"
STATES = ("done", "runs", "queued", "waiting", "stopped", "failed")


@dataclass
class State:
    """How a point stands.

    state   waiting, runs, queued (with a scheduler), done, stopped or failed
    why     it failed, or still waits in the queue: a line
    took_s  seconds that its command took
    """

    state: str = "waiting"
    why: str = ""
    took_s: float = 0.0


@dataclass
class Sweep:
    """A sweep's folder: what was asked for, and the states by name."""

    out: Path
    spec: Spec
    points: list[Point]
    states: dict[str, State]
    digest: str

    @classmethod
    def read(cls, out: Path) -> Sweep:
        """Return a sweep that was begun.

        Raises:
            CheckpointError: there is none that can be read.
        """
        path = out / NAME
        try:
            found = json.loads(path.read_bytes())
            spec = convert(Spec, found["spec"], "spec")
            states = {n: convert(State, s, "state") for n, s in found["states"].items()}
            points = [convert(Point, point, "point") for point in found["points"]]
            states = {point.name: State() for point in points} | states
            return cls(out, spec, points, states, found["config"])
        except OSError as error:
            problem = f"no run and no sweep here: {reason(error)}"
            raise CheckpointError(f"{path}: {problem}") from None
        except (ValueError, KeyError, TypeError, AttributeError, ConfigError):
            raise CheckpointError(f"{path}: is no record of a sweep") from None

    def write(self) -> None:
        """Note it in the folder.

        Raises:
            CheckpointError: that cannot be written.
        """
        value = {
            "spec": dataclasses.asdict(self.spec),
            "config": self.digest,
            "points": [dataclasses.asdict(point) for point in self.points],
            "states": {name: dataclasses.asdict(s) for name, s in self.states.items()},
        }
        write_json(self.out / NAME, value, indent=1)

    def log(self, point: Point) -> Path:
        """Return where a point's command writes."""
        return self.out / "log" / f"{point.name}.log"

    def look(self) -> None:
        """Bring the states of what a scheduler has up to date.

        Raises:
            WorldError: the scheduler does not answer.
        """
        for point in self.points:
            state = self.states[point.name]
            if state.state not in ("queued", "runs") or self.spec.run not in SUBMITTED:
                continue
            run = self.out / point.name
            job = Submitted.read(run)
            if (run / "summary.json").exists():
                state.state, state.why = "done", ""
            elif job is None or not job.is_queued():
                logs = [*run.glob("job-*.log"), *run.glob("*.OU")]
                newest = max(logs, key=lambda path: path.stat().st_mtime, default=None)
                state.state = "failed"
                state.why = last_line(newest) or "the job ended without a summary"
            else:
                is_running = (run / OWNER).exists()
                state.state = "runs" if is_running else "queued"
                state.why = "" if is_running else job.waits_for()


def last_line(log: Path | None) -> str:
    """Return the line of a log that says what went wrong: the last of mpilm's own."""
    try:
        text = log.read_text(errors="replace") if log else ""
    except OSError:
        return ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    own = [line for line in lines if line.startswith("mpilm: ")]
    own = [line for line in own if not line.startswith("mpilm: note: ")]
    return (own or lines or [""])[-1].removeprefix("mpilm: ")


def outcome(found: Sweep, point: Point) -> dict[str, Any]:
    """Return what a point came to; empty: nothing yet, or nothing that can be read."""
    folder = found.out / point.name
    try:
        if (folder / "simulate.json").exists():
            outcomes = json.loads((folder / "simulate.json").read_bytes())["outcomes"]
            return dict(outcomes[0])
        summary = json.loads((folder / "summary.json").read_bytes())
        return {
            "samples": summary["samples"],
            "seconds": summary["train_seconds"],
            "samples_per_s": summary["samples_per_s"],
            "loss": summary["train_loss"],
            "perplexity": summary["valid_perplexity"],
            "bytes_sent": summary["bytes_sent"],
        }
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return {}


def point_table(found: Sweep, predicted: Sweep | None = None) -> Iterator[str]:
    """Yield a line for each point, and one that counts them.

    Args:
        predicted: a simulated sweep; its points stand beside those of the same name.
    """
    width = max(len(point.name) for point in found.points)
    head = f"{'point':<{width}}  {'state':<8}{'samples/s':>12}"
    head += f"{'predicted':>12}{'off by':>8}" if predicted else ""
    yield f"{head}{'valid ppl':>11}  why"
    for point in found.points:
        state = found.states[point.name]
        result = outcome(found, point) if state.state == "done" else {}
        speed, perplexity = result.get("samples_per_s"), result.get("perplexity")
        row = f"{point.name:<{width}}  {state.state:<8}"
        row += f"{speed:>12,.0f}" if speed else f"{'-':>12}"
        if predicted:
            other = outcome(predicted, point).get("samples_per_s")
            row += f"{other:>12,.0f}" if other else f"{'-':>12}"
            row += f"{other / speed - 1:>+8.0%}" if speed and other else f"{'-':>8}"
        row += f"{perplexity:>11.2f}" if perplexity else f"{'-':>11}"
        yield f"{row}  {state.why}".rstrip()
    counts = Counter(state.state for state in found.states.values())
    yield ", ".join(f"{counts[name]} {name}" for name in STATES if counts[name])


def write_table(found: Sweep, path: Path, predicted: Sweep | None = None) -> None:
    """Write a row for each point, and what it came to.

    Args:
        predicted: a simulated sweep; its samples/s stand in the last column.

    Raises:
        ConfigError: that cannot be written.
    """
    import csv

    keys = ["samples", "seconds", "samples_per_s", "efficiency", "communication"]
    keys += ["bytes_sent", "loss", "perplexity"]
    head = ["point", "state", "ranks", "machine", "settings", *keys, "why"]
    head += ["predicted_samples_per_s"] if predicted else []
    try:
        with open(path, "w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            writer.writerow(head)
            for point in found.points:
                state = found.states[point.name]
                result = outcome(found, point) if state.state == "done" else {}
                row = [point.name, state.state, point.ranks, point.machine]
                row += [" ".join(point.settings)]
                row += [result.get(key, "") for key in keys]
                row += [state.why]
                if predicted:
                    row += [outcome(predicted, point).get("samples_per_s", "")]
                writer.writerow(row)
    except OSError as error:
        raise ConfigError(f"{path}: cannot write: {reason(error)}") from None
