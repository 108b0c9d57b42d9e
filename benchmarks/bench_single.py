"""Is one rank's training step as fast as a plain PyTorch loop of the same model?

    python benchmarks/bench_single.py
    python benchmarks/bench_single.py --device cuda --batch 256 --hidden 1024 ...

Trained in turns in one process, on the same minibatches, from the same first model:

    plain       nn.Embedding, nn.LSTM, nn.Linear, F.cross_entropy, clip_grad_norm_ and
                torch.optim.SGD, as anybody writes them
    mpilm       the Learner with LstmLm and SGD
    mpilm, MKL  the same with torch's own matrix product in the softmax
    mpilm, oneDNN  the same with oneDNN's

The losses of the first steps are compared before anything is timed. Peak share: the
operations of the model's matrix products over those of a 2048^3 product (the
quicker of torch's and oneDNN's) in the same run.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from harness import Timing, measure, parser, report
from torch import Tensor, nn

from mpilm.data.streams import Streams
from mpilm.learner.learner import Learner
from mpilm.models import softmax
from mpilm.models.lstm_lm import LstmLm
from mpilm.optim.build import clip_before_step

LEAST_RATIO = 1.0  # the goal: issue A, "Speed"

LR, CLIP = 1.0, 0.25  # any: they do not change what a step costs
WINDOWS = 50  # of text, before it begins again
SIDE = 2048  # of the product that gives the peak

Step = Callable[[], Any]


class PlainLm(nn.Module):
    """The model as anybody writes it: logits of all rows, then the loss."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        between = args.dropout if args.layers > 1 else 0.0
        self.embedding = nn.Embedding(args.vocab, args.embed)
        self.lstm = nn.LSTM(args.embed, args.hidden, args.layers, dropout=between)
        self.softmax = nn.Linear(args.hidden, args.vocab)
        self.dropout = nn.Dropout(args.dropout)

    def forward(
        self, inputs_TB: Tensor, state: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        x, state = self.lstm(self.dropout(self.embedding(inputs_TB)), state)
        return self.softmax(self.dropout(x)), state


class PlainLoop:
    """The training loop as anybody writes it."""

    def __init__(self, args: argparse.Namespace, batches: Streams) -> None:
        self.model = PlainLm(args).to(args.device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=LR)
        self.device, self.batches = args.device, batches
        self.state: tuple[Tensor, Tensor] | None = None

    def step(self) -> Tensor:
        """Train on one minibatch; return its loss."""
        batch = self.batches.next()
        inputs = torch.from_numpy(batch.inputs).to(self.device)
        targets = torch.from_numpy(batch.targets).to(self.device)
        if batch.start or self.state is None:
            state = None
        else:
            state = (self.state[0].detach(), self.state[1].detach())
        logits, self.state = self.model(inputs, state)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        return loss.detach()


def make_batches(args: argparse.Namespace) -> Streams:
    """Return random text, the same each time."""
    num_tokens = WINDOWS * args.batch * args.unroll + 1
    tokens = np.random.default_rng(1).integers(0, args.vocab, num_tokens)
    return Streams(tokens.astype(np.uint32), args.batch, args.unroll)


def make_learner(args: argparse.Namespace, model: PlainLm) -> Learner:
    """Return a learner that begins with the weights of `model`."""

    def optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        sgd = torch.optim.SGD(parameters, lr=LR, fused=True)
        sgd.register_step_pre_hook(clip_before_step(CLIP))
        return sgd

    ours = LstmLm(
        args.vocab,
        embed=args.embed,
        hidden=args.hidden,
        layers=args.layers,
        dropout=args.dropout,
    )
    ours.load_state_dict(model.state_dict())
    return Learner(ours, make_batches(args), optimizer, device=args.device)


def agree(plain: PlainLoop, learner: Learner, num_steps: int = 3) -> None:
    """Exit unless both train alike, to rounding (without dropout)."""
    for step in range(num_steps):
        expected, got = float(plain.step()), float(learner.gradient())
        learner.update()
        if abs(got - expected) > 1e-3 * abs(expected):
            raise SystemExit(f"losses differ at step {step}: {expected} and {got}")


def finished(device: str, step: Step, num_steps: int) -> Step:
    """Return a call of `num_steps` steps that lasts until the device is done."""

    def call() -> None:
        for _ in range(num_steps):
            step()
        if device != "cpu":
            torch.cuda.synchronize()

    return call


def training(learner: Learner, product: Any) -> Step:
    """Return the learner's step with `product` as the softmax's matrix product."""

    def step() -> None:
        softmax.PRODUCT = product
        learner.gradient()
        learner.update()

    return step


def peak_flops(device: str) -> float:
    """Return floating point operations per second of a large product."""
    a, b = torch.randn(2, SIDE, SIDE, device=device)
    quickest = measure(
        {
            "torch": finished(device, lambda: a @ b, 1),
            "mpilm": finished(device, lambda: softmax.times_transposed(a, b), 1),
        },
        warmup=2,
        loops=5,
    )
    return 2 * SIDE**3 / min(timing.min_s for timing in quickest.values())


def model_flops(args: argparse.Namespace) -> int:
    """Return operations per token of the matrix products, forward and backward."""
    inputs = [args.embed] + [args.hidden] * (args.layers - 1)
    lstm = sum(4 * args.hidden * (size + args.hidden) for size in inputs)
    return 6 * (lstm + args.hidden * args.vocab)


def rows(args: argparse.Namespace, timings: dict[str, Timing]) -> list[dict[str, Any]]:
    """Return a row per variant."""
    num_tokens = args.unroll * args.batch * args.steps
    peak = peak_flops(args.device)
    return [
        {
            "variant": name,
            "min (ms)": 1e3 * timing.min_s / args.steps,
            "median (ms)": 1e3 * timing.median_s / args.steps,
            "max (ms)": 1e3 * timing.max_s / args.steps,
            "tokens/s": round(num_tokens / timing.median_s),
            "x plain": timings["plain"].median_s / timing.median_s,
            "of peak": num_tokens / timing.median_s * model_flops(args) / peak,
            "peak (GFLOP/s)": round(peak / 1e9),
        }
        for name, timing in timings.items()
    ]


def main() -> None:
    arguments = parser(__doc__, warmup=3, loops=30)
    arguments.add_argument("--steps", type=int, default=5, help="steps in a round")
    arguments.add_argument("--vocab", type=int, default=10_000)
    arguments.add_argument("--embed", type=int, default=128)
    arguments.add_argument("--hidden", type=int, default=128)
    arguments.add_argument("--layers", type=int, default=1)
    arguments.add_argument("--dropout", type=float, default=0.0)
    arguments.add_argument("--unroll", type=int, default=35, help="T, time steps")
    arguments.add_argument("--batch", type=int, default=20, help="B, sequences")
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--device", default="cpu")
    args = arguments.parse_args()
    if args.smoke:
        args.warmup, args.loops, args.steps = 1, 2, 1
        args.vocab, args.embed, args.hidden, args.unroll, args.batch = 50, 8, 8, 3, 2
    torch.set_num_threads(args.threads)
    torch.manual_seed(1)
    plain = PlainLoop(args, make_batches(args))
    learner = make_learner(args, plain.model)
    if args.dropout == 0.0:
        agree(plain, learner)
    chosen, onednn = softmax.PRODUCT, softmax.ONEDNN_LINEAR
    steps = {"plain": plain.step, "mpilm": training(learner, chosen)}
    if args.device == "cpu" and onednn is not None:
        steps["mpilm, MKL"] = training(learner, None)
        steps["mpilm, oneDNN"] = training(learner, onednn)
    timings = measure(
        {name: finished(args.device, step, args.steps) for name, step in steps.items()},
        warmup=args.warmup,
        loops=args.loops,
    )
    softmax.PRODUCT = chosen
    title = (
        f"Training step on one rank: V={args.vocab} E={args.embed} H={args.hidden}"
        f" L={args.layers} T={args.unroll} B={args.batch}, {args.device},"
        f" {args.threads} threads"
    )
    found = rows(args, timings)
    report("single", title, found, args)
    verdict = "met" if found[1]["x plain"] >= LEAST_RATIO else "MISSED"
    print(f"goal {verdict}: mpilm >= {LEAST_RATIO} x plain")


if __name__ == "__main__":
    main()
