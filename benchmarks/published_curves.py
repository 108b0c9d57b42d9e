"""What the simulator makes of the speeds that two papers report.

    python benchmarks/published_curves.py --out benchmarks/results/published.json

Su and Chen (arXiv 1507.01239), K20 and FDR InfiniBand: their own file gives total and
communication time on 1 to 32 GPUs. The parts of the machine come from 2, 4 and 8 GPUs
by least squares; 16 and 32 are predicted. Assumed: times are minutes per epoch (which
moves no speed-up), and every epoch has a part that more GPUs do not shorten: their
column "total less communication", times the number of GPUs, is a straight line.

IBM (arXiv 2002.01119), V100 and EDR InfiniBand: 2.28 h on 64 GPUs, 1.98 h on 128.
Assumed: all minibatches together hold 8,192 sub-sequences of 21 frames on both, 16
epochs, 43.2 million parameters, an EDR port for four GPUs; half a minibatch takes half
the time; every step averages over all ranks and computing hides it (`delay_by_one`).
The step is fitted at 64 GPUs; 128 are predicted.

Last, what the other strategies would have given on the same machines; simulated.
`async_sgd` on 32 ranks at most: its K^2 messages a step take minutes beyond that.
"""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any

import numpy as np
from harness import parser, report

from mpilm.config import resolve
from mpilm.learner.flat import Layout
from mpilm.simulate.machines import find_machine
from mpilm.simulate.simulation import Outcome, simulate_protocol
from mpilm.world.machine import Machine

# GPUs -> (total, of which communication), their file time.dat
SU_CHEN = {
    1: (254.5, 0.0),
    2: (183.4, 19.9),
    4: (96.0, 12.9),
    8: (51.0, 7.62),
    16: (27.3, 4.31),
    32: (15.24, 2.31),
}
FITTED = (2, 4, 8)
SU_CHEN_FRAMES = 97_200_000  # of an epoch: 270 h
SU_CHEN_BATCH, SU_CHEN_PERIOD = 1024, 10
IBM_HOURS = {64: 2.28, 128: 1.98}
IBM_STEPS = 66_130  # 16 epochs of 1975 h in sub-sequences of 21 frames, by 8,192
IBM_BATCH, IBM_UNROLL = 8192, 21
STRATEGIES: dict[str, dict[str, Any]] = {
    "allreduce": {},
    "model_averaging": {"period": 10},
    "bmuf": {"period": 10},
    "gossip_bmuf": {"period": 10},
    "dpsgd": {},
    "delay_by_one": {},
    "adpsgd": {},
    "async_sgd": {},
}


def su_chen_layout() -> Layout:
    """Return the parameters of their DNN: 440, 6 x 2048, 8806."""
    sizes = [440, *[2048] * 6, 8806]
    parts = []
    for n, (inputs, outputs) in enumerate(pairwise(sizes)):
        parts.append((f"{n}.weight", (outputs, inputs), f"layer{n}"))
        parts.append((f"{n}.bias", (outputs,), f"layer{n}"))
    return Layout.of(parts)


def ibm_layout() -> Layout:
    """Return the parameters of the BLSTM of jobs/configs/adpsgd_blstm.toml."""
    parts = []
    for n in range(6):
        inputs = 260 if n == 0 else 1024
        for way in ("forward", "backward"):
            shape = (4 * 512, inputs + 512 + 2)
            parts.append((f"lstm{n}.{way}", shape, f"lstm{n}"))
    parts.append(("bottleneck", (1024 + 1, 256), "bottleneck"))
    parts.append(("output", (256 + 1, 32_000), "output"))
    return Layout.of(parts)


def simulated(
    layout: Layout, machine: Machine, ranks: int, steps: int, name: str, **settings: Any
) -> Outcome:
    """Return what a strategy comes to; a step counts as one sample."""
    document = {
        "machine": dataclasses.asdict(machine),
        "strategy": {"name": name, **settings},
        "train": {"batch": 1, "unroll": 1},
    }
    return simulate_protocol(resolve(document), layout, ranks, steps)


def fitted() -> tuple[float, float, float]:
    """Return step_s, bandwidth_Bps and the fixed seconds of an epoch, from FITTED."""
    nbytes = 4 * su_chen_layout().size
    speeds, computing = [], []
    for k in FITTED:
        total_s, comm_s = (60.0 * minutes for minutes in SU_CHEN[k])
        averages = SU_CHEN_FRAMES / k / SU_CHEN_BATCH / SU_CHEN_PERIOD
        speeds.append(2 * (k - 1) / k * nbytes * averages / comm_s)
        computing.append(k * (total_s - comm_s))
    fixed_s, gpu_s = np.polyfit(FITTED, computing, 1)  # K t = gpu_s + K fixed_s
    step_s = gpu_s * SU_CHEN_BATCH / SU_CHEN_FRAMES
    return float(step_s), float(np.mean(speeds)), float(fixed_s)


def su_chen(steps: int) -> list[dict[str, Any]]:
    """Return their speed-ups, published and simulated."""
    step_s, bandwidth_Bps, fixed_s = fitted()
    machine = find_machine("k20_fdr").machine
    print(
        f"from 2, 4 and 8 GPUs: step {step_s:.4f} s, {bandwidth_Bps / 1e9:.3f} GB/s,"
        f" {fixed_s:.0f} s of an epoch fixed; in k20_fdr: {machine.step_s} s,"
        f" {machine.bandwidth_Bps / 1e9:.3f} GB/s"
    )
    rows = []
    for k, (minutes, _) in list(SU_CHEN.items())[1:]:
        settings = {"period": SU_CHEN_PERIOD}
        found = simulated(
            su_chen_layout(), machine, k, steps, "model_averaging", **settings
        )
        epoch_s = SU_CHEN_FRAMES / SU_CHEN_BATCH / found.samples_per_s + fixed_s
        published = SU_CHEN[1][0] / minutes
        speedup = 60.0 * SU_CHEN[1][0] / epoch_s
        rows.append(
            {
                "GPUs": k,
                "published speed-up": published,
                "simulated": speedup,
                "error (%)": 100 * (speedup / published - 1),
                "": "fitted" if k in FITTED else "predicted",
            }
        )
    return rows


def ibm(steps: int) -> list[dict[str, Any]]:
    """Return the hours on 64 and 128 GPUs, published and simulated."""
    machine = find_machine("v100_edr").machine
    rows = []
    for k, hours in IBM_HOURS.items():
        part = dataclasses.replace(machine, step_s=machine.step_s * 64 / k)
        found = simulated(ibm_layout(), part, k, steps, "delay_by_one")
        took = IBM_STEPS * k / found.samples_per_s / 3600
        rows.append(
            {
                "GPUs": k,
                "published (h)": hours,
                "simulated (h)": took,
                "error (%)": 100 * (took / hours - 1),
                "": "fitted" if k == 64 else "predicted",
            }
        )
    return rows


def others(steps: int, most: int) -> list[dict[str, Any]]:
    """Return the efficiency of the strategies on both machines, at most `most` ranks.

    "half": of the minibatch, and so of the step.
    """
    rows = []
    cases = {
        "k20_fdr": (su_chen_layout(), (8, 32), 1.0),
        "v100_edr": (ibm_layout(), (64, 128), 1.0),
        "v100_edr, half": (ibm_layout(), (128,), 0.5),
    }
    for name, settings in STRATEGIES.items():
        row: dict[str, Any] = {"strategy": name}
        for title, (layout, numbers, part) in cases.items():
            machine = find_machine(title.split(",")[0]).machine
            machine = dataclasses.replace(machine, step_s=part * machine.step_s)
            for k in (min(k, most) for k in numbers):
                if name == "async_sgd" and k > 32:
                    row[f"{title}: {k}"] = "-"
                    continue
                found = simulated(layout, machine, k, steps, name, **settings)
                row[f"{title}: {k}"] = round(found.efficiency, 3)
        rows.append(row)
    return rows


def main() -> None:
    arguments = parser(__doc__, warmup=0, loops=1)
    arguments.add_argument("--steps", type=int, default=20, help="of a rank")
    args = arguments.parse_args()
    if args.smoke:
        args.steps = 10
    title = "Su and Chen: model_averaging, period 10, on k20_fdr"
    report("published", title, su_chen(args.steps), args)
    report("published", "IBM: delay_by_one on v100_edr", ibm(args.steps), args)
    title = "Efficiency: samples/s over those of ranks that never wait"
    rows = others(args.steps, most=4 if args.smoke else 1 << 20)
    report("published", title, rows, args)


if __name__ == "__main__":
    main()
