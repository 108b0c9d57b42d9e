"""What does an LSTM layer cost whose gate derivatives can be had?

    python benchmarks/bench_lstm.py --hidden 256

Forward and backward of one layer in turns in one process:

    nn.LSTM            torch's fused layer, which keeps the derivatives for itself
    nn.LSTM, plain     the same without oneDNN (CPU only)
    lstm.py            mpilm.models.lstm
    identity           nn.LSTM on the gates' inputs with an identity for W_ih: the
                       gradient of its input is the gates' derivative

The gradients of the weights are compared before anything is timed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F
from harness import measure, parser, report
from torch import Tensor, nn

from mpilm.models.lstm import lstm_layer


def without_onednn(call: Callable[[], list[Tensor]]) -> list[Tensor]:
    """Return what `call` does, without oneDNN."""
    torch.backends.mkldnn.enabled = False
    try:
        return call()
    finally:
        torch.backends.mkldnn.enabled = True


def main() -> None:
    """Run it."""
    arguments = parser(__doc__.splitlines()[0], warmup=3, loops=25)
    arguments.add_argument("--hidden", type=int, default=256, help="cells and inputs")
    arguments.add_argument("--unroll", type=int, default=35, help="steps")
    arguments.add_argument("--streams", type=int, default=20, help="sequences")
    arguments.add_argument("--device", default="cpu")
    args = arguments.parse_args()
    if args.smoke:
        args.warmup, args.loops, args.hidden, args.unroll = 0, 1, 16, 5
    torch.set_num_threads(1)
    torch.manual_seed(0)
    T, B, H = args.unroll, args.streams, args.hidden
    lstm = nn.LSTM(H, H).to(args.device)
    weights = tuple(lstm.parameters())
    x = torch.randn(T, B, H, device=args.device, requires_grad=True)
    zero, dy = x.new_zeros(1, B, H), torch.randn_like(x)
    gates = nn.LSTM(4 * H, H).to(args.device)
    with torch.no_grad():
        gates.weight_ih_l0.copy_(torch.eye(4 * H))
        gates.weight_hh_l0.copy_(lstm.weight_hh_l0)
        gates.bias_ih_l0.zero_()
        gates.bias_hh_l0.zero_()

    def fused() -> list[Tensor]:
        return list(torch.autograd.grad(lstm(x, (zero, zero))[0], [x, *weights], dy))

    def ours() -> list[Tensor]:
        y, _ = lstm_layer(x, (zero[0], zero[0]), weights)
        return list(torch.autograd.grad(y, [x, *weights], dy))

    def identity() -> list[Tensor]:
        w_ih, _, b_ih, b_hh = weights
        z = F.linear(x, w_ih, b_ih + b_hh)
        y, _ = gates(z, (zero, zero))
        dz, dx = torch.autograd.grad(y, [z, x], dy)
        dz_N = dz.flatten(0, 1)
        before = torch.cat([zero, y[:-1]]).flatten(0, 1)
        db = dz_N.sum(0)
        return [dx, dz_N.t() @ x.flatten(0, 1), dz_N.t() @ before, db, db]

    calls = {"nn.LSTM": fused, "lstm.py": ours, "identity": identity}
    if args.device == "cpu":
        calls["nn.LSTM, plain"] = lambda: without_onednn(fused)
    expected = fused()
    for name, call in calls.items():
        for a, b in zip(call(), expected, strict=True):
            if (a - b).norm() > 1e-5 * b.norm():
                raise SystemExit(f"{name}: other gradients")
    cpu: dict[str, list[float]] = {name: [] for name in calls}

    def timed(name: str, call: Callable[[], list[Tensor]]) -> Callable[[], None]:
        def round_() -> None:
            start_s = time.process_time()
            call()
            if args.device != "cpu":
                torch.cuda.synchronize()
            cpu[name].append(time.process_time() - start_s)

        return round_

    variants = {name: timed(name, call) for name, call in calls.items()}
    timings = measure(variants, warmup=args.warmup, loops=args.loops)
    rows = [
        {
            "variant": name,
            "median (ms)": 1e3 * timing.median_s,
            "min": 1e3 * timing.min_s,
            "of nn.LSTM": timing.median_s / timings["nn.LSTM"].median_s,
            "CPU (ms)": 1e3 * median(cpu[name][args.warmup :]),
            "load": os.getloadavg()[0],
        }
        for name, timing in timings.items()
    ]
    title = f"LSTM layer, H = {H}, T = {T}, B = {B}, {args.device}"
    report("lstm", title, rows, args)


if __name__ == "__main__":
    main()
