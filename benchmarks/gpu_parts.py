"""The sections of gpu.py on parts of a step: the full softmax, the optimiser."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from gpu_common import Add, Step, empty_cache, turns
from torch import Tensor, nn
from torch.nn import functional as F

from mpilm.models.softmax import linear_cross_entropy


def softmax(args: Any, add: Add) -> None:
    """Loss and gradients of the full softmax: time, memory, difference to plain."""
    try:
        cut = import_module("cut_cross_entropy").linear_cross_entropy
    except ImportError:
        cut = None
    for vocab, num in ((33_278, 4096), (267_735, 4096)):
        V, N, H = (300, 40, 16) if args.smoke else (vocab, num, 512)
        torch.manual_seed(1)
        x = torch.randn(N, H, device=args.device)
        W = 0.05 * torch.randn(V, H, device=args.device)
        b = torch.zeros(V, device=args.device)
        y = torch.randint(V, (N,), device=args.device)

        def plain(x: Tensor, W: Tensor, b: Tensor, y: Tensor = y) -> Tensor:
            return F.cross_entropy(F.linear(x, W, b), y)

        def ours(x: Tensor, W: Tensor, b: Tensor, y: Tensor = y) -> Tensor:
            return linear_cross_entropy(x, W, b, y)

        def apples(x: Tensor, W: Tensor, b: Tensor, y: Tensor = y) -> Tensor:
            kind = torch.bfloat16
            return cut(x.to(kind), W.to(kind), y, bias=b.to(kind))

        losses = {
            "plain": (plain, False),
            "mpilm": (ours, False),
            "plain, autocast": (plain, True),
            "mpilm, autocast": (ours, True),
        }
        if cut is not None:
            losses["cut-cross-entropy, bfloat16"] = (apples, False)
        right: list[Tensor] = []
        steps: dict[str, Step] = {}
        about: dict[str, Any] = {}
        for name, (loss, autocast) in losses.items():

            def step(loss: Any = loss, autocast: bool = autocast) -> list[Tensor]:
                own = [t.detach().requires_grad_() for t in (x, W, b)]  # noqa: B023
                with torch.autocast(args.device, torch.bfloat16, enabled=autocast):
                    value = loss(*own)
                return list(torch.autograd.grad(value, own))

            try:
                grads, used = with_memory(step, args)
            except RuntimeError as error:  # out of memory, or cut's own limits
                add(V=V, N=N, variant=name, error=str(error).splitlines()[0])
                continue
            right = right or grads
            error = max(
                float((g - r).abs().max() / r.abs().max())
                for g, r in zip(grads, right, strict=True)
                if r.abs().max() > 0
            )
            about[name], steps[name] = (used, error), step
            del grads
        del right
        for name, timing in turns(steps, args, 5).items():
            used, error = about[name]
            columns = {"ms": 1e3 * timing.median_s, "peak MB": used / 1e6}
            add(V=V, N=N, variant=name, **columns, **{"off plain": error})
        del steps
        empty_cache(args)
    if cut is None:
        add(note="cut-cross-entropy is not installed: not compared")


def with_memory(step: Callable[[], Any], args: Any) -> tuple[Any, int]:
    """Return what a step returns, and the bytes it took on the card beside what was."""
    if args.device != "cuda":
        return step(), 0
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    found = step()
    return found, torch.cuda.max_memory_allocated() - before


def optimiser(args: Any, add: Add) -> None:
    """One vector against the parameters one by one."""
    size, num = (1000, 3) if args.smoke else (5_000_000, 12)
    kinds: dict[str, Any] = {
        "sgd": lambda p, **how: torch.optim.SGD(p, lr=0.1, momentum=0.9, **how),
        "adamw": lambda p, **how: torch.optim.AdamW(p, lr=1e-3, **how),
    }
    for kind, make in kinds.items():
        steps: dict[str, Step] = {}
        for name, lengths, how in (
            ("one vector, fused (mpilm)", [size * num], {"fused": True}),
            ("parameters, fused", [size] * num, {"fused": True}),
            ("parameters, foreach", [size] * num, {"foreach": True}),
            ("parameters, a loop", [size] * num, {"foreach": False}),
        ):
            parameters = [
                nn.Parameter(torch.ones(n, device=args.device)) for n in lengths
            ]
            for parameter in parameters:
                parameter.grad = torch.ones_like(parameter)
            steps[name] = make(parameters, **how).step
        for name, timing in turns(steps, args, 10).items():
            add(optimiser=kind, variant=name, ms=1e3 * timing.median_s)
