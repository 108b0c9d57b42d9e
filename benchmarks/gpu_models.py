"""The sections of gpu.py on one rank's step: how fast it is, and that it resumes."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from bench_ng import make_learner as ng_learner
from bench_single import PlainLoop, agree, make_batches, model_flops
from bench_single import make_learner as single_learner
from bench_vocabulary import make_learner as vocabulary_learner
from gpu_common import Add, Step, empty_cache, goal, stepping, turns
from torch import Tensor

from mpilm.data.batch import Batch
from mpilm.learner.learner import Learner
from mpilm.models.lstm_lm import LstmLm
from mpilm.models.sampled_softmax import SampledSoftmax

UNLOOKED = "gradients not looked at"
# goals of issue E and of docs/natural_gradient.md
LEAST_SINGLE, LEAST_SAMPLED, MOST_NG = 1.0, 3.0, 1.3


def products(args: Any) -> dict[str, Step]:
    """Return kind -> one large matrix product."""
    side = 64 if args.smoke else 8192
    steps: dict[str, Step] = {}
    for kind, dtype, tf32 in (
        ("float32", torch.float32, False),
        ("TF32", torch.float32, True),
        ("bfloat16", torch.bfloat16, False),
    ):
        a, b = torch.randn(2, side, side, device=args.device).to(dtype)

        def step(a: Tensor = a, b: Tensor = b, tf32: bool = tf32) -> None:
            torch.backends.cuda.matmul.allow_tf32 = tf32
            torch.mm(a, b)
            torch.backends.cuda.matmul.allow_tf32 = False

        steps[kind] = step
    return steps


def allow_tf32(*, matmul: bool, cudnn: bool) -> None:
    """Let products, and cuDNN's LSTM, round their factors to TF32."""
    torch.backends.cuda.matmul.allow_tf32 = matmul
    torch.backends.cudnn.allow_tf32 = cudnn


def peaks(args: Any) -> dict[str, float]:
    """Return kind -> operations per second of a large product."""
    side = 64 if args.smoke else 8192
    timings = turns(products(args), args, 5)
    return {kind: 2 * side**3 / timing.min_s for kind, timing in timings.items()}


def peak(args: Any, add: Add) -> None:
    """Matrix products of 8192 x 8192."""
    for kind, flops in peaks(args).items():
        add(kind=kind, **{"TFLOP/s": flops / 1e12})


def unlooked(learner: Any) -> Any:
    """Let a learner take every gradient for finite, so that it waits for no kernel."""
    learner.checked.passes = lambda gradients: True
    return learner


def single(args: Any, add: Add) -> None:
    """The learner against a plain loop; their losses are compared first."""
    sizes = {
        "V=33,278 H=650 B=20": (33_278, 650, 2, 20),
        "V=10,000 H=1024 B=256": (10_000, 1024, 2, 256),
        "V=10,000 H=128 B=20, one layer": (10_000, 128, 1, 20),
    }
    top = peaks(args)
    for name, (vocab, hidden, layers, batch) in sizes.items():
        own = {"vocab": vocab, "embed": hidden, "hidden": hidden, "layers": layers}
        own |= {"batch": batch, "unroll": 35, "dropout": 0.0, "device": args.device}
        if args.smoke:
            own |= {"vocab": 60, "embed": 8, "hidden": 8, "batch": 2, "unroll": 3}
        model = argparse.Namespace(**own)
        torch.manual_seed(1)
        plain = PlainLoop(model, make_batches(model))
        learner = single_learner(model, plain.model)
        unseen = unlooked(single_learner(model, plain.model))
        allow_tf32(matmul=False, cudnn=False)
        agree(plain, learner)
        for tf32 in (False, True):
            allow_tf32(matmul=tf32, cudnn=tf32)
            steps = {"plain": plain.step, "mpilm": stepping(learner)}
            steps[f"mpilm, {UNLOOKED}"] = stepping(unseen)
            timings = turns(steps, args, 10, loops=9)
            allow_tf32(matmul=False, cudnn=True)  # torch's defaults
            for variant, timing in timings.items():
                rate = model.unroll * model.batch / timing.median_s
                flops = rate * model_flops(model)
                ratio = timings["plain"].median_s / timing.median_s
                is_goal = variant == "mpilm" and not tf32
                ours = goal(ratio, LEAST_SINGLE) if is_goal else {}
                add(
                    model=name,
                    products="TF32" if tf32 else "float32",
                    variant=variant,
                    **{
                        "ms": 1e3 * timing.median_s,
                        "min ms": 1e3 * timing.min_s,
                        "tokens/s": round(rate),
                        "x plain": ratio,
                        "of peak": flops / top["TF32" if tf32 else "float32"],
                        "goal": ours.get("goal", ""),
                        "met": ours.get("met", ""),
                    },
                )


def sampled(args: Any, add: Add) -> None:
    """A step at the vocabulary of WikiText-103."""
    for batch in (20, 128):
        own = {"vocab": 267_735, "embed": 512, "hidden": 512, "layers": 2}
        own |= {"batch": batch, "unroll": 35, "dropout": 0.0, "device": args.device}
        if args.smoke:
            own |= {"vocab": 3000, "embed": 8, "hidden": 8, "batch": 2, "unroll": 3}
        model = argparse.Namespace(**own)
        torch.manual_seed(1)
        steps: dict[str, Step] = {"plain": PlainLoop(model, make_batches(model)).step}
        for name in ("full", "sampled"):
            learner = vocabulary_learner(model, sampled=name == "sampled")
            steps[name] = stepping(learner)
        unseen = unlooked(vocabulary_learner(model, sampled=True))
        steps[f"sampled, {UNLOOKED}"] = stepping(unseen)
        timings = turns(steps, args, 5)
        for variant, timing in timings.items():
            ratio = timings["plain"].median_s / timing.median_s
            ours = goal(ratio, LEAST_SAMPLED) if variant == "sampled" else {}
            columns = {"B": batch, "ms": 1e3 * timing.median_s, "x plain": ratio}
            columns |= {"goal": ours.get("goal", ""), "met": ours.get("met", "")}
            add(variant=variant, **columns)
        del steps, learner, unseen
        empty_cache(args)


def autocast(args: Any, add: Add) -> None:
    """A whole step in bfloat16: speed, and the loss after the same minibatches."""
    V, H, B, T = (60, 8, 2, 3) if args.smoke else (33_278, 1024, 128, 35)
    own = {"vocab": V, "batch": B, "unroll": T}
    model = argparse.Namespace(**own)
    learners: dict[str, Learner] = {}
    for name in ("float32", "LSTM in bfloat16", "autocast"):
        torch.manual_seed(1)
        kind = "bfloat16" if name == "LSTM in bfloat16" else "float32"
        lm = LstmLm(V, embed=H, hidden=H, layers=2, compute=kind)

        def loss(lm: Any, batch: Batch) -> Tensor:
            with torch.autocast(args.device, torch.bfloat16):
                return lm.loss(batch)

        learners[name] = Learner(
            lm,
            make_batches(model),
            lambda parameters: torch.optim.SGD(parameters, lr=0.5, fused=True),
            loss=loss if name == "autocast" else None,
            device=args.device,
            flat=True,
        )
    losses = {}
    for name, learner in learners.items():
        for _ in range(3 if args.smoke else 60):
            found = learner.gradient()
            learner.update()
        losses[name] = float(found)
    steps = {name: stepping(learner) for name, learner in learners.items()}
    timings = turns(steps, args, 5)
    for name, timing in timings.items():
        ratio = timings["float32"].median_s / timing.median_s
        columns = {"ms": 1e3 * timing.median_s, "x float32": ratio}
        add(variant=name, **columns, **{"loss after 60 steps": losses[name]})


def ng(args: Any, add: Add) -> None:
    """A step of NG-SGD over one of SGD, nnet3's size and period of updates."""
    own = {"model": "dnn", "layers": 6, "hidden": 2048, "inputs": 440}
    own |= {"outputs": 6000, "batch": 1024, "device": args.device}
    if args.smoke:
        own |= {"layers": 2, "hidden": 32, "outputs": 20, "batch": 64}
    sizes = argparse.Namespace(**own)
    learners = {"sgd": ng_learner(sizes, None), "ng_sgd": ng_learner(sizes, 4)}
    learners[f"sgd, {UNLOOKED}"] = unlooked(ng_learner(sizes, None))
    for _ in range(0 if args.smoke else 12):  # until the period of updates holds
        stepping(learners["ng_sgd"])()
    steps = {name: stepping(learner) for name, learner in learners.items()}
    timings = turns(steps, args, 8)
    for name, timing in timings.items():
        ratio = timing.median_s / timings["sgd"].median_s
        ours = goal(ratio, most=MOST_NG) if name == "ng_sgd" else {}
        columns = {"ms": 1e3 * timing.median_s, "of sgd": ratio}
        columns |= {"goal": ours.get("goal", ""), "met": ours.get("met", "")}
        add(variant=name, **columns)


def resume(args: Any, add: Add) -> None:
    """The same run twice, and one that goes on from the other's state."""
    V, H, B, T = (60, 8, 2, 3) if args.smoke else (10_000, 256, 32, 20)
    model = argparse.Namespace(vocab=V, batch=B, unroll=T)

    def learner(optimizer: Any, *, sparse: bool) -> Learner:
        def rows(num_inputs: int, num_words: int) -> SampledSoftmax:
            sizes = {"num_frequent": V // 10, "num_random": V // 10}
            return SampledSoftmax(num_inputs, num_words, **sizes, sparse=True)

        torch.manual_seed(1)
        extra = {"softmax": rows, "sparse": True} if sparse else {}
        lm = LstmLm(V, embed=H, hidden=H, layers=2, dropout=0.3, **extra)
        batches = make_batches(model)
        return Learner(
            lm, batches, optimizer, device=args.device, flat=True, sparse=sparse
        )

    def train(learner: Learner) -> list[float]:
        losses = []
        for _ in range(6):
            losses.append(float(learner.gradient()))
            learner.update()
        return [*losses, learner.theta.double().sum().item()]

    def sgd(parameters: Any) -> Any:
        return torch.optim.SGD(parameters, lr=0.5, momentum=0.9, fused=True)

    def adamw(parameters: Any) -> Any:
        return torch.optim.AdamW(parameters, lr=1e-3, fused=True)

    for name, optimizer in (("sgd, momentum", sgd), ("adamw", adamw)):
        for sparse in (False, True):
            first, second = (learner(optimizer, sparse=sparse) for _ in range(2))
            is_same = train(first) == train(second)
            state = first.state()
            went_on = train(first)
            third = learner(optimizer, sparse=sparse)
            third.load_state(state)
            is_resumed = train(third) == went_on
            is_equal = first.theta.equal(third.theta)
            case = f"{name}{', sampled rows' if sparse else ''}, dropout"
            columns = {"variant": case, "same run twice": is_same}
            columns |= {"resumed": is_resumed and is_equal, "goal": "to the bit"}
            add(**columns, met=is_resumed and is_equal)
