"""What does each option of an LSTM language model cost in a step?

    python benchmarks/bench_lm_options.py --out benchmarks/results/lm_options.json

CPU seconds of one process, one thread, of the LSTM layers alone, forwards and back
(two layers, T x B = 35 x 20), in turns: `nn.LSTM` as it is without options, and with
each of them. The softmax and the optimiser are the same whatever is chosen.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from harness import parser, report
from torch import nn

from mpilm.models.base import computing
from mpilm.models.lstm_layers import LstmLayers

STEPS, SEQUENCES, LAYERS = 35, 20, 2


def variants(hidden: int) -> dict[str, Callable[[], Any]]:
    """Return what is timed, by name."""
    x = torch.randn(STEPS, SEQUENCES, hidden)
    cpu = torch.device("cpu")
    options: dict[str, dict[str, Any]] = {
        "layer by layer": {},
        "locked, p = 0.3": {"locked": True, "dropout": 0.3},
        "weight_dropout = 0.5": {"weight_dropout": 0.5},
        "layer_norm": {"layer_norm": True},
        "projected = H/2": {"projected": hidden // 2},
    }
    modules = {"nn.LSTM": nn.LSTM(hidden, hidden, LAYERS)}
    modules |= {  # type: ignore[dict-item]
        name: LstmLayers(hidden, hidden, LAYERS, **given)
        for name, given in options.items()
    }

    def stepping(module: nn.Module, compute: Any = "float32") -> Callable[[], Any]:
        def step() -> None:
            with computing(compute, hidden, cpu):
                y, _ = module(x, None)
            y.float().square().sum().backward()
            module.zero_grad()

        return step

    found = {name: stepping(module) for name, module in modules.items()}
    return {**found, "nn.LSTM, bfloat16": stepping(modules["nn.LSTM"], "bfloat16")}


def main() -> None:
    arguments = parser(__doc__, warmup=1, loops=9)
    args = arguments.parse_args()
    sizes: tuple[int, ...] = (128, 200, 512, 1024)
    if args.smoke:
        sizes, args.loops = (8,), 1
    torch.set_num_threads(1)
    rows = []
    for hidden in sizes:
        torch.manual_seed(1)
        calls = variants(hidden)
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for index in range(args.warmup + args.loops):
            for name, call in calls.items():
                start_s = time.process_time()
                call()
                if index >= args.warmup:
                    seconds[name].append(time.process_time() - start_s)
        plain = median(seconds["nn.LSTM"])
        for name, each in seconds.items():
            row = {"H": hidden, "variant": name, "step (ms CPU)": 1e3 * median(each)}
            rows.append({**row, "x nn.LSTM": median(each) / plain})
    report("lm_options", "LSTM layers, forwards and back", rows, args)


if __name__ == "__main__":
    main()
