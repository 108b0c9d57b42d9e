"""Where does a small step on a GPU spend its time: host or kernels?

    python benchmarks/gpu_profile.py                            on a machine with a card
    mpirun -n 2 python benchmarks/gpu_profile.py --steps        steps one by one
    ... --device cpu --smoke                                    only see that it runs

Beside gpu.py, which says how long a step takes: the kernels of a step, how many and how
long, and what the host did; with --steps the milliseconds of single steps of a few
strategies, those with an exchange among them. What was seen on an H200:
results/gpu-profile.txt (before the step had fewer kernels), results/gpu-steps.txt.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from bench_ng import make_learner as ng_learner
from bench_single import PlainLoop, make_batches
from bench_single import make_learner as single_learner
from bench_vocabulary import make_learner as vocabulary_learner
from gpu_common import stepping
from torch.profiler import ProfilerActivity, profile

COUNTED = 5
SIZES = {
    "V=10,000 H=128 B=20": (10_000, 128, 1, 20),
    "V=33,278 H=650 B=20": (33_278, 650, 2, 20),
    "V=10,000 H=1024 B=256": (10_000, 1024, 2, 256),
}
STRATEGIES = ("local", "gossip_bmuf", "model_averaging", "noloco", "allreduce")


def finish(device: str) -> None:
    """Let the card finish."""
    if device == "cuda":
        torch.cuda.synchronize()


def show(name: str, step: Callable[[], Any], device: str) -> None:
    """Print what a step is made of."""
    for _ in range(2 * COUNTED):
        step()
    finish(device)
    began_s = time.perf_counter()
    for _ in range(COUNTED):
        step()
    finish(device)
    took_ms = 1e3 * (time.perf_counter() - began_s) / COUNTED
    kinds = [ProfilerActivity.CPU]
    kinds += [ProfilerActivity.CUDA] if device == "cuda" else []
    with profile(activities=kinds) as found:
        for _ in range(COUNTED):
            step()
        finish(device)
    events = found.key_averages()
    on_host = torch.autograd.DeviceType.CPU
    kernels = [e for e in events if e.device_type != on_host]
    calls = [e for e in events if e.device_type == on_host]
    num = sum(event.count for event in kernels) / COUNTED
    total_ms = sum(event.self_device_time_total for event in kernels) / COUNTED / 1e3
    print(f"\n{name}: {took_ms:.3f} ms, kernels {total_ms:.3f} ms, {num:.0f} of them")
    for event in sorted(kernels, key=lambda e: -e.self_device_time_total)[:10]:
        took = event.self_device_time_total / COUNTED
        print(f"  card {took:9.1f} us x{event.count / COUNTED:6.1f}  {event.key[:80]}")
    for event in sorted(calls, key=lambda e: -e.self_cpu_time_total)[:20]:
        took = event.self_cpu_time_total / COUNTED
        print(f"  host {took:9.1f} us x{event.count / COUNTED:6.1f}  {event.key[:80]}")


def profiles(args: argparse.Namespace) -> None:
    """Plain loop and learner, a sampled step, SGD and NG-SGD."""
    for name, (vocab, hidden, layers, batch) in SIZES.items():
        own = {"vocab": vocab, "embed": hidden, "hidden": hidden, "layers": layers}
        own |= {"batch": batch, "unroll": 35, "dropout": 0.0, "device": args.device}
        if args.smoke:
            own |= {"vocab": 60, "embed": 8, "hidden": 8, "batch": 2, "unroll": 3}
        model = argparse.Namespace(**own)
        plain = PlainLoop(model, make_batches(model))
        learner = single_learner(model, plain.model)
        show(f"plain {name}", plain.step, args.device)
        show(f"mpilm {name}", stepping(learner), args.device)
    own = {"vocab": 267_735, "embed": 512, "hidden": 512, "layers": 2, "batch": 20}
    own |= {"unroll": 35, "dropout": 0.0, "device": args.device}
    if args.smoke:
        own |= {"vocab": 3000, "embed": 8, "hidden": 8, "batch": 2, "unroll": 3}
    sampled = vocabulary_learner(argparse.Namespace(**own), sampled=True)
    show("sampled V=267,735 B=20", stepping(sampled), args.device)
    own = {"model": "dnn", "layers": 6, "hidden": 2048, "inputs": 440}
    own |= {"outputs": 6000, "batch": 1024, "device": args.device}
    if args.smoke:
        own |= {"layers": 2, "hidden": 32, "outputs": 20, "batch": 64}
    for name, period in (("sgd", None), ("ng_sgd", 4)):
        learner = ng_learner(argparse.Namespace(**own), period)
        show(name, stepping(learner), args.device)


def steps(args: argparse.Namespace) -> None:
    """Milliseconds of single steps, by rank 0."""
    from gpu_ranks import make_learner

    from mpilm.strategies import strategy
    from mpilm.world.mpi import MpiWorld, abort_on_error

    with MpiWorld() as world, abort_on_error(world):
        device = world.device(args.device)
        for name in STRATEGIES:
            learner = make_learner(args, world, device)
            chosen = strategy(name, world)
            chosen.start(learner)
            for _ in range(22):  # two rounds
                chosen.step(learner)
            finish(args.device)
            world.comm.Barrier()
            took = []
            for _ in range(40):
                began_s = time.perf_counter()
                chosen.step(learner)
                took.append(f"{1e3 * (time.perf_counter() - began_s):.1f}")
            chosen.finish(learner)
            world.comm.Barrier()
            if world.rank == 0:
                print(name, *took, flush=True)


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", action="store_true", help="single steps, of ranks")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--smoke", action="store_true", help="only see that it runs")
    args = parser.parse_args()
    torch.backends.cudnn.allow_tf32 = False
    (steps if args.steps else profiles)(args)


if __name__ == "__main__":
    main()
