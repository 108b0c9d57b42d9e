"""What memory does a rank need, phase by phase, beside the vectors that it must have?

    python benchmarks/bench_memory.py --out benchmarks/results/memory.json

The model of jobs/configs/wt103_lstm.toml (V = 267,735, E = H = 512, tied, sampled,
rows) on a random language, trained for some steps by each strategy on --ranks real
ranks, validated, saved and resumed as `mpilm train` does. Every rank notes its largest
resident memory in each phase (VmHWM, set back at the phase's beginning by way of
/proc/self/clear_refs), less what it had before its model was made.

    start       model, theta, strategy: until the first step
    steps       steps with their exchanges
    validation  the final model on the valid split, full softmax
    consensus   how far the ranks are from their mean
    checkpoint  saving
    end         the last validation and checkpoint, and the summary
    resume      from the checkpoint to the next step, in a process of its own

"over needed": over theta, what a checkpoint holds of strategy and optimiser besides,
and the most that the allocator had handed out at a time in a gradient. Goal: at most
1.15 in every phase but the start.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from bench_vocabulary import make_learner, resident, stepping
from fleets import ENVIRONMENT
from harness import parser, report

from mpilm.config import read_config
from mpilm.data import synthetic
from mpilm.train.loop import Trainer
from mpilm.world.mpi import MpiWorld, abort_on_error

PRESET = Path(__file__).parents[1] / "jobs" / "configs" / "wt103_lstm.toml"
VOCAB, HIDDEN, HELD_OUT = 267_735, 512, 2049
GOAL = 1.15
STRATEGIES = ["local", "model_averaging", "gossip_bmuf"]
PHASES = ("start", "steps", "validation", "consensus", "checkpoint", "end", "resume")


def reset_peak() -> None:
    """Let VmHWM begin anew at what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


class Measured(Trainer):
    """A trainer that notes the peaks of its phases."""

    def set_up(self, *, resume: bool) -> None:
        gc.collect()
        self.peaks: dict[str, int] = {}
        self.libraries = resident("VmRSS")
        reset_peak()
        self.phase = "resume" if resume else "start"
        super().set_up(resume=resume)
        self.note("steps")
        step = self.strategy.step
        self.largest = self.between = 0

        def noted(learner: Any) -> Any:
            loss = step(learner)
            self.between = max(self.between, resident("VmRSS") - self.libraries)
            return loss

        self.strategy.step = noted  # type: ignore[method-assign]

    def note(self, after: str) -> None:
        """End a phase, and begin the next."""
        found = resident("VmHWM") - self.libraries
        self.peaks[self.phase] = max(found, self.peaks.get(self.phase, 0))
        self.phase = after
        reset_peak()

    @contextmanager
    def within(self, phase: str) -> Iterator[None]:
        """Count a block as a phase of its own."""
        outer = self.phase
        self.note("end" if outer == "end" else phase)
        yield
        self.note(outer)

    def judge(self) -> None:
        with self.within("validation"):
            super().judge()

    def validate(self) -> None:
        with self.within("consensus"):
            super().validate()

    def save(self, *, beside: bool = False) -> None:
        with self.within("checkpoint"):
            super().save(beside=beside)

    def conclude(self) -> None:
        self.note("end")
        super().conclude()
        self.note("over")


def train(args: argparse.Namespace) -> None:
    """Be one rank: train, and answer with the peaks of all."""
    with MpiWorld() as world, abort_on_error(world):
        changes = [
            f"data.corpus={args.folder / 'corpus.h5'}",
            f"strategy.name={args.child}",
            *("train.test=false", "train.worst_rank=false", "data.source=shards"),
            f"train.samples={(2 if args.resume else 1) * args.samples * world.size}",
            f"train.valid_every={args.samples * world.size // 2}",
            f"checkpoint.every={args.samples * world.size // 2}",
            "schedule.warmup_samples=0",
            *(f"model.{key}={args.hidden}" for key in ("embed", "hidden")),
            *args.set,
        ]
        if args.vocab < VOCAB:
            changes += [f"model.sampled_{key}=500" for key in ("frequent", "random")]
        config = read_config(PRESET, changes)
        warm = argparse.Namespace(vocab=3000, embed=8, hidden=8, layers=2)
        vars(warm).update(dropout=0.0, unroll=35, batch=20, device="cpu")
        stepping(make_learner(warm, sampled=True))()  # torch's libraries
        trainer = Measured(config, world, args.folder / args.child, resume=args.resume)
        trainer.train()
        theta = 4 * trainer.learner.layout.size
        kept = {**trainer.strategy.state(), **trainer.learner.moments()}
        kept_bytes = sum(getattr(value, "nbytes", 0) for value in kept.values())
        found = {
            "peaks": trainer.peaks,
            "held": trainer.between,
            "theta": theta,
            "kept": kept_bytes,
            "activations": activations(trainer.learner.gradient),
        }
        each = world.comm.allgather(found)
        if world.rank == 0:
            args.result.write_text(json.dumps(each))


def activations(gradient: Callable[[], Any]) -> int:
    """Return the most bytes that torch has handed out at a time in a gradient."""
    from torch.profiler import ProfilerActivity, profile

    now = most = 0
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        gradient()
    for event in found.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def measured(args: argparse.Namespace, name: str, *, resume: bool) -> list[Any]:
    """Return what each rank found."""
    result = args.folder / "result.json"
    command = [
        str(Path(sys.executable).with_name("mpirun")),
        *("--oversubscribe", "--bind-to", "none", "-x", "PYTHONPATH"),
        *("-n", str(1 if name == "local" else args.ranks)),
        *(sys.executable, __file__, "--child", name, "--folder", str(args.folder)),
        *("--result", str(result), "--vocab", str(args.vocab)),
        *("--hidden", str(args.hidden), "--samples", str(args.samples)),
        *(["--resume"] if resume else []),
        *(["--set", *args.set] if args.set else []),
    ]
    environment = {**os.environ, **ENVIRONMENT}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{command}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    found: list[Any] = json.loads(result.read_text())
    return found


def main() -> None:
    """Run the benchmark."""
    arguments = parser(__doc__ or "", warmup=0, loops=1)
    arguments.add_argument("--ranks", type=int, default=2)
    arguments.add_argument("--vocab", type=int, default=VOCAB)
    arguments.add_argument("--hidden", type=int, default=HIDDEN)
    arguments.add_argument("--samples", type=int, default=14_000, help="of a rank")
    arguments.add_argument("--strategies", nargs="+", default=STRATEGIES)
    arguments.add_argument("--no-resume", action="store_true")
    arguments.add_argument("--set", nargs="*", default=[], help="section.key=value")
    arguments.add_argument("--child", default="", help=argparse.SUPPRESS)
    arguments.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    arguments.add_argument("--resume", action="store_true", help=argparse.SUPPRESS)
    args = arguments.parse_args()
    if args.child:
        train(args)
        return
    if args.smoke:
        args.vocab, args.hidden, args.strategies = 3000, 16, ["gossip_bmuf"]
    args.load = os.getloadavg()
    rows, worst = [], 0.0
    with tempfile.TemporaryDirectory(prefix="memory.") as folder:
        args.folder = Path(folder)
        synthetic.MOST_HELD_OUT = HELD_OUT
        tokens = 4 * args.samples * args.ranks
        corpus = args.folder / "corpus.h5"
        synthetic.prepare_synthetic(corpus, vocab=args.vocab, tokens=tokens)
        for name in args.strategies:
            first = measured(args, name, resume=False)
            again = [] if args.no_resume else measured(args, name, resume=True)
            for own, resumed in zip(first, again, strict=False):
                own["peaks"]["resume"] = resumed["peaks"]["resume"]
            most = {p: max(own["peaks"].get(p, 0) for own in first) for p in PHASES}
            needed = [own["theta"] + own["kept"] + own["activations"] for own in first]
            row: dict[str, Any] = {
                "strategy": name,
                "theta (MB)": first[0]["theta"] / 1e6,
                "kept (MB)": first[0]["kept"] / 1e6,
                "activations (MB)": np.mean([o["activations"] for o in first]) / 1e6,
                "between steps (MB)": max(own["held"] for own in first) / 1e6,
            }
            for phase, peak in most.items():
                row[phase] = peak / max(needed)
                worst = max(worst, row[phase] if phase != "start" else 0.0)
            rows.append(row)
            print(row, flush=True)
    args.folder = None
    report("memory", "Peak of a rank, over needed", rows, args)
    print(f"goal {'met' if worst <= GOAL else 'MISSED'}: {worst:.2f} <= {GOAL}")


if __name__ == "__main__":
    main()
