"""How much faster is a training step with a sampled softmax and rows? Does V matter?

    python benchmarks/bench_vocabulary.py --out benchmarks/results/vocabulary.json

One rank, one thread, plain SGD with clipping; words are drawn evenly from the whole
vocabulary, the worst case for rows. Trained in turns in one process:

    plain    nn.Embedding, nn.LSTM, nn.Linear, F.cross_entropy, clip_grad_norm_ and
             torch.optim.SGD, as anybody writes them (bench_single.py)
    full     ours, full softmax
    sampled  ours, sampled softmax, model.sparse = true

Times are CPU seconds of this process, which other programs on the machine disturb less
than the wall clock; both are in the JSON, with the load. Bytes are what torch's
allocator handed out in a step. Memory is resident, of a process of its own, less what
it had before the model was made; "peak" is while it was made, too.
"""

from __future__ import annotations

import argparse
import gc
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from bench_single import CLIP, LR, PlainLoop, make_batches
from harness import parser, report
from torch import nn

from mpilm.learner.learner import Learner
from mpilm.models.lstm_lm import LstmLm
from mpilm.models.sampled_softmax import SampledSoftmax
from mpilm.models.softmax import Softmax
from mpilm.optim.build import clip_before_step

# V, E = H, least plain / sampled: the goals of issue E
SIZES = [(33_278, 200, 8.0), (267_735, 512, 30.0)]
SAME_V = 1.05  # largest ratio of V = 267,735 to V = 33,278, in time and bytes
LARGEST_MEMORY = 1.15  # resident over parameters and activations
FREQUENT, RANDOM, LAYERS = 400, 1000, 2  # with the targets some 2,050 words

Step = Callable[[], Any]


def sizes(args: argparse.Namespace, vocab: int, hidden: int) -> argparse.Namespace:
    """Return arguments as bench_single.py takes them."""
    own = {"vocab": vocab, "embed": hidden, "hidden": hidden, "layers": LAYERS}
    return argparse.Namespace(**{**vars(args), **own, "dropout": 0.0, "device": "cpu"})


def make_learner(args: argparse.Namespace, *, sampled: bool) -> Learner:
    """Return a learner of our own."""

    def softmax(num_inputs: int, num_words: int) -> Softmax:
        if not sampled:
            return Softmax(num_inputs, num_words)
        return SampledSoftmax(
            num_inputs,
            num_words,
            num_frequent=min(FREQUENT, num_words),
            num_random=min(RANDOM, num_words),
            sparse=True,
        )

    def optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        sgd = torch.optim.SGD(parameters, lr=LR, fused=True)
        sgd.register_step_pre_hook(clip_before_step(CLIP))
        return sgd

    model = LstmLm(
        args.vocab,
        embed=args.embed,
        hidden=args.hidden,
        layers=args.layers,
        softmax=softmax,
        sparse=sampled,
    )
    return Learner(
        model,
        make_batches(args),
        optimizer,
        device=args.device,
        flat=True,
        sparse=sampled,
    )


def stepping(learner: Learner) -> Step:
    """Return one step of a learner."""

    def step() -> None:
        learner.gradient()
        learner.update()

    return step


def timed(steps: dict[str, Step], args: argparse.Namespace) -> dict[str, Any]:
    """Return (CPU, wall) medians in seconds of each variant, taken in turns."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for index in range(args.warmup + args.loops):
        for name, step in steps.items():
            cpu_s, wall_s = time.process_time(), time.perf_counter()
            step()
            cpu_s = time.process_time() - cpu_s
            wall_s = time.perf_counter() - wall_s
            if index >= args.warmup:
                found[name].append((cpu_s, wall_s))
    return {
        name: tuple(map(median, zip(*each, strict=True)))
        for name, each in found.items()
    }


def allocated_bytes(step: Step) -> int:
    """Return what the allocator hands out in a step, all together."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    given = [e.nbytes() for e in events if e.name() == "[memory]" and e.nbytes() > 0]
    if not given:
        raise SystemExit("this torch's profiler has no [memory] events")
    return sum(given)


def compare(args: argparse.Namespace, goals: list[str]) -> None:
    """Report plain, full and sampled at each size."""
    rows = []
    for vocab, hidden, goal in args.sizes:
        own = sizes(args, vocab, hidden)
        torch.manual_seed(1)
        steps: dict[str, Step] = {
            "plain": PlainLoop(own, make_batches(own)).step,
            "full": stepping(make_learner(own, sampled=False)),
            "sampled": stepping(make_learner(own, sampled=True)),
        }
        times = timed(steps, args)
        plain = times["plain"][0]
        for name, (cpu_s, wall_s) in times.items():
            row = {
                "V": vocab,
                "H": hidden,
                "variant": name,
                "step (ms CPU)": 1e3 * cpu_s,
            }
            rows.append({**row, "wall (ms)": 1e3 * wall_s, "x plain": plain / cpu_s})
        ratio = plain / times["sampled"][0]
        verdict = "met" if ratio >= goal else "MISSED"
        goals.append(f"goal {verdict}: V={vocab} sampled {ratio:.1f} x plain >= {goal}")
        del steps
        gc.collect()
    report("vocabulary", title(args, "A training step"), rows, args)


def compare_v(args: argparse.Namespace, goals: list[str]) -> None:
    """Report the sampled step at both V, all else the same."""
    hidden = args.sizes[-1][1]
    learners = {
        vocab: make_learner(sizes(args, vocab, hidden), sampled=True)
        for vocab, _, _ in args.sizes
    }
    times = timed({str(v): stepping(each) for v, each in learners.items()}, args)
    rows = []
    for vocab, learner in learners.items():
        cpu_s, wall_s = times[str(vocab)]
        given = allocated_bytes(stepping(learner))
        softmax: Any = learner.model.get_submodule("softmax")
        targets = torch.as_tensor(
            make_batches(sizes(args, vocab, hidden)).next().targets
        )
        row = {
            "V": vocab,
            "H": hidden,
            "sample": len(softmax.sample(targets.flatten())[0]),
        }
        row |= {"step (ms CPU)": 1e3 * cpu_s, "wall (ms)": 1e3 * wall_s}
        rows.append({**row, "allocated (MB)": given / 1e6})
    for key in ("step (ms CPU)", "allocated (MB)"):
        ratio = rows[-1][key] / rows[0][key]
        verdict = "met" if ratio <= SAME_V else "MISSED"
        goals.append(f"goal {verdict}: {key} {ratio:.3f} x that of V={rows[0]['V']}")
    report("vocabulary", title(args, "The same sample, another V"), rows, args)


def resident(key: str) -> int:
    """Return VmRSS or VmHWM of this process, bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return 1024 * int(line.split()[1])
    raise SystemExit(f"no {key} in /proc/self/status")


def measure_memory(args: argparse.Namespace) -> None:
    """Print the resident memory of a sampled learner: after steps, at its peak."""
    vocab, hidden, _ = args.sizes[-1]
    own = sizes(args, vocab, hidden)
    stepping(make_learner(sizes(args, 3000, 8), sampled=True))()  # torch's libraries
    before = resident("VmRSS")
    learner = make_learner(own, sampled=True)
    for _ in range(3):
        stepping(learner)()
    peak, steady = resident("VmHWM"), resident("VmRSS")
    print(4 * learner.layout.size, steady - before, peak - before)


def memory(args: argparse.Namespace, goals: list[str]) -> None:
    """Report what a process of its own found."""
    vocab, hidden, _ = args.sizes[-1]
    command = [sys.executable, __file__, "--memory", *(["--smoke"] * args.smoke)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    parameters, steady, peak = map(int, output.split())
    row = {"V": vocab, "H": hidden, "parameters (MB)": parameters / 1e6}
    row |= {"resident (MB)": steady / 1e6, "peak (MB)": peak / 1e6}
    rows = [{**row, "resident / parameters": steady / parameters}]
    verdict = "met" if steady <= LARGEST_MEMORY * parameters else "MISSED"
    goals.append(f"goal {verdict}: resident {steady / parameters:.2f} x parameters")
    report("vocabulary", title(args, "Memory of one rank"), rows, args)


def title(args: argparse.Namespace, what: str) -> str:
    """Return the line above a table."""
    return (
        f"{what}: L={LAYERS} T={args.unroll} B={args.batch},"
        f" {FREQUENT} frequent and {RANDOM} drawn words"
    )


def main() -> None:
    arguments = parser(__doc__, warmup=1, loops=5)
    arguments.add_argument("--unroll", type=int, default=35, help="T, time steps")
    arguments.add_argument("--batch", type=int, default=20, help="B, sequences")
    arguments.add_argument("--only", type=int, help="V: only how long its steps are")
    arguments.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    args = arguments.parse_args()
    args.sizes = SIZES
    if args.smoke:
        args.sizes, args.loops = [(3000, 8, 0.0), (9000, 8, 0.0)], 1
    torch.set_num_threads(1)
    if args.memory:
        measure_memory(args)
        return
    goals: list[str] = []
    args.load = os.getloadavg()  # of the whole machine, before
    if args.only:
        args.sizes = [size for size in args.sizes if size[0] == args.only]
    else:
        memory(args, goals)
        compare_v(args, goals)
    compare(args, goals)
    print("\n".join(goals))


if __name__ == "__main__":
    main()
