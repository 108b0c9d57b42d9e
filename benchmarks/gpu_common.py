"""What the sections of gpu.py share: rows, goals, timing in turns."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_single import finished
from harness import Timing, measure

from mpilm.learner.learner import Learner

Step = Callable[[], Any]
Add = Callable[..., None]


class Rows:
    """Writes rows as they come: what a section that is ended has found stays."""

    def __init__(self, path: Path, *, speaks: bool = True) -> None:
        self.path, self.speaks = path, speaks

    def __call__(self, **row: Any) -> None:
        if not self.speaks:
            return
        print(row, flush=True)
        with self.path.open("a") as file:
            file.write(json.dumps(row, default=str) + "\n")


def goal(value: float, least: float | None = None, most: float | None = None) -> Any:
    """Return the columns of a row that say whether a goal is met."""
    if least is not None:
        return {"goal": f">= {least}", "met": value >= least}
    return {"goal": f"<= {most}", "met": value <= most}


def turns(steps: dict[str, Step], args: Any, num: int, loops: int = 5) -> Any:
    """Return name -> Timing of `num` steps, taken in turns, kernels included."""
    if args.smoke:
        num, loops = 1, 1
    calls = {k: finished(args.device, step, num) for k, step in steps.items()}
    timings = measure(calls, warmup=1 if args.smoke else 2, loops=loops)
    return {
        name: Timing(tuple(s / num for s in timing.rounds_s))
        for name, timing in timings.items()
    }


def stepping(learner: Learner) -> Step:
    """Return one step of a learner."""

    def step() -> None:
        learner.gradient()
        learner.update()

    return step


def empty_cache(args: Any) -> None:
    """Give the card back what is free."""
    if args.device == "cuda":
        torch.cuda.empty_cache()
