"""What does natural gradient add to a step of SGD?

    python benchmarks/bench_ng.py                       a deep network, one thread
    python benchmarks/bench_ng.py --model lstm_lm       an LSTM language model
    python benchmarks/bench_ng.py --hidden 2048 --layers 6 --device cuda

Trained in turns in one process, on the same minibatch, from the same first model:

    sgd         the Learner with plain SGD
    ng_sgd      the Learner with NgSgd, nnet3's max-change
    ng_sgd, 1   the same with an update of the estimates in every step

A round is 4 steps, one period of updates. The losses of the first step are compared
before anything is timed. Beside wall time stands the CPU time of this process, which a
loaded machine distorts much less. The load is over the last minute, at the end.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from harness import measure, parser, report
from torch import Tensor, nn

from mpilm.data.batch import Batch
from mpilm.learner.learner import Learner
from mpilm.models.lstm_lm import LstmLm
from mpilm.optim.configs import NgSgdConfig
from mpilm.optim.ng_sgd import NgSgd, precondition_

MOST_RATIO = 1.3  # the goal: issue C, "Speed"

LR = 0.01  # any: it does not change what a step costs
NUM_STEPS = 4  # of a round
NUM_FIRST = 12  # steps before the period of updates holds


class Frames(NamedTuple):
    """One minibatch."""

    inputs: Tensor
    targets: Tensor
    num_samples: int


class OneBatch:
    """The same minibatch again and again."""

    def __init__(self, batch: Any, device: str) -> None:
        arrays = {
            "inputs": batch.inputs.to(device),
            "targets": batch.targets.to(device),
        }
        self.batch = batch._replace(**arrays)

    def next(self) -> Any:
        """Return it."""
        return self.batch


def frames(args: argparse.Namespace) -> Frames:
    """Return random frames and classes."""
    torch.manual_seed(1)
    x = torch.randn(args.batch, args.inputs)
    return Frames(x, torch.randint(args.outputs, (args.batch,)), args.batch)


def words(args: argparse.Namespace) -> Batch:
    """Return random words, as frequent as Zipf has it: p proportional to 1 / rank."""
    torch.manual_seed(1)
    frequency_V = 1.0 / torch.arange(1, args.vocab + 1)
    num_words = (args.unroll + 1) * args.streams
    text = torch.multinomial(frequency_V, num_words, replacement=True)
    text_TB = text.view(args.unroll + 1, args.streams)
    inputs, targets = text_TB[:-1].contiguous(), text_TB[1:].contiguous()
    return Batch(inputs, targets, start=False, num_samples=targets.numel())


def dnn(args: argparse.Namespace) -> nn.Module:
    """Return a feed-forward network with ReLU."""
    parts: list[nn.Module] = []
    sizes = [args.inputs, *[args.hidden] * args.layers]
    for before, after in pairwise(sizes):
        parts += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*parts, nn.Linear(sizes[-1], args.outputs))


def lstm_lm(args: argparse.Namespace) -> nn.Module:
    """Return an LSTM language model, embedding as wide as the LSTM."""
    sizes = {"embed": args.hidden, "hidden": args.hidden, "layers": args.layers}
    return LstmLm(args.vocab, **sizes)


def make_learner(args: argparse.Namespace, period: int | None) -> Learner:
    """Return a learner with NG-SGD, or with plain SGD where `period` is None."""
    torch.manual_seed(0)
    is_lm = args.model == "lstm_lm"
    model = lstm_lm(args) if is_lm else dnn(args)
    batches = OneBatch(words(args) if is_lm else frames(args), args.device)
    optimizer: Any = partial(torch.optim.SGD, lr=LR, fused=True)
    if period is not None:
        config = NgSgdConfig(lr=LR, update_period=period)
        maps = precondition_(model, config)
        optimizer = partial(NgSgd, maps=maps, config=config)

    def loss(model: nn.Module, batch: Frames) -> Tensor:
        return F.cross_entropy(model(batch.inputs), batch.targets)

    own = None if is_lm else loss
    return Learner(model, batches, optimizer, loss=own, device=args.device)


def steps(learner: Learner, cpu_s: list[float]) -> Callable[[], None]:
    """Return a call of one round that lasts until the device is done.

    It adds the round's CPU time to `cpu_s`.
    """

    def call() -> None:
        start_s = time.process_time()
        for _ in range(NUM_STEPS):
            learner.gradient()
            learner.update()
        if learner.device.type == "cuda":
            torch.cuda.synchronize()
        cpu_s.append(time.process_time() - start_s)

    return call


def main() -> None:
    """Run it."""
    arguments = parser(__doc__.splitlines()[0], warmup=1, loops=10)
    arguments.add_argument("--model", choices=("dnn", "lstm_lm"), default="dnn")
    arguments.add_argument("--layers", type=int, help="hidden layers; 4, lstm_lm: 1")
    arguments.add_argument("--hidden", type=int, help="of each; 1024, lstm_lm: 256")
    arguments.add_argument("--inputs", type=int, default=440, help="spliced features")
    arguments.add_argument("--outputs", type=int, default=2000, help="states")
    arguments.add_argument("--batch", type=int, default=1024, help="frames")
    arguments.add_argument("--vocab", type=int, default=10_000, help="words")
    arguments.add_argument("--unroll", type=int, default=35, help="steps of the LSTM")
    arguments.add_argument("--streams", type=int, default=20, help="sequences")
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--device", default="cpu")
    args = arguments.parse_args()
    is_lm = args.model == "lstm_lm"
    args.layers = args.layers or (1 if is_lm else 4)
    args.hidden = args.hidden or (256 if is_lm else 1024)
    if args.smoke:
        args.warmup, args.loops = 0, 1
        args.layers, args.hidden, args.outputs, args.batch = 2, 32, 20, 64
        args.vocab, args.unroll, args.streams = 50, 5, 4
    torch.set_num_threads(args.threads)
    learners = {
        "sgd": make_learner(args, None),
        "ng_sgd": make_learner(args, 4),
        "ng_sgd, 1": make_learner(args, 1),
    }
    losses = [float(learner.gradient()) for learner in learners.values()]
    if max(losses) - min(losses) > 1e-4 * losses[0]:
        raise SystemExit(f"first losses differ: {losses}")
    for name in ("ng_sgd", "ng_sgd, 1"):
        for _ in range(0 if args.smoke else NUM_FIRST):
            learners[name].gradient()
            learners[name].update()
    cpu: dict[str, list[float]] = {name: [] for name in learners}
    variants = {name: steps(learner, cpu[name]) for name, learner in learners.items()}
    timings = measure(variants, warmup=args.warmup, loops=args.loops)
    cpu_s = {name: median(rounds[args.warmup :]) for name, rounds in cpu.items()}
    plain_s = timings["sgd"].median_s
    rows = [
        {
            "variant": name,
            "median (ms/step)": 1e3 * timing.median_s / NUM_STEPS,
            "min": 1e3 * timing.min_s / NUM_STEPS,
            "max": 1e3 * timing.max_s / NUM_STEPS,
            "of sgd": timing.median_s / plain_s,
            "CPU (ms/step)": 1e3 * cpu_s[name] / NUM_STEPS,
            "CPU of sgd": cpu_s[name] / cpu_s["sgd"],
            "goal": MOST_RATIO if name == "ng_sgd" else "",
            "load": os.getloadavg()[0],
        }
        for name, timing in timings.items()
    ]
    size = f"{args.unroll} x {args.streams}" if is_lm else args.batch
    title = f"{args.model} {args.layers} x {args.hidden}, minibatch {size}"
    report("ng-lstm" if is_lm else "ng", f"{title}, {args.device}", rows, args)


if __name__ == "__main__":
    main()
