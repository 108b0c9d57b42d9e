"""How efficient is each strategy on 128 V100, as mpilm/machines/v100_edr.toml has them?

    python benchmarks/bench_v100.py
    python benchmarks/bench_v100.py --out benchmarks/results/v100.json

Simulated: 128 virtual ranks, the step of the file (124 ms for a minibatch of each GPU),
messages of 43.2 million parameters (173 MB), the BLSTM of Cui et al. Efficiency is the
declared step over the simulated one. Without jitter it is what messages cost; with 10%
jitter ranks also wait for the slowest draw. Without hiding, an exchange of 173 MB each
way takes 56 ms at the file's 3.1 GB/s: 45% of a step.
"""

from __future__ import annotations

from dataclasses import replace
from statistics import mean
from typing import Any

from fleets import VARIANTS, simulate
from harness import parser, report

from mpilm.simulate.machines import find_machine

MODEL_PARAMETERS = 43_200_000  # published_curves.py: `ibm_layout`
CHOSEN: dict[str, tuple[str, dict[str, Any]]] = {
    "local": VARIANTS["local"],
    "allreduce": VARIANTS["allreduce"],
    "bmuf": VARIANTS["bmuf"],
    "gossip_bmuf": VARIANTS["gossip_bmuf"],
    "gossip_bmuf, delay 2": ("gossip_bmuf", {"delay": 2}),
    "dpsgd": VARIANTS["dpsgd"],
    "delay_by_one": VARIANTS["delay_by_one"],
    "adpsgd": VARIANTS["adpsgd, random_ring"],
}


def main() -> None:
    arguments = parser(__doc__, warmup=0, loops=1)
    arguments.add_argument("--ranks", type=int, nargs="+", default=[16, 64, 128])
    arguments.add_argument("--steps", type=int, default=40)
    args = arguments.parse_args()
    if args.smoke:
        args.ranks, args.steps = [4], 10
    VARIANTS.update(CHOSEN)
    machine = find_machine("v100_edr").machine
    rows = []
    for name in CHOSEN:
        row: dict[str, Any] = {"strategy": name}
        for ranks in args.ranks:
            for jitter in (0.0, 0.1):
                runs = simulate(
                    name,
                    ranks,
                    machine=replace(machine, jitter=jitter),
                    parameters=1000,
                    model_parameters=MODEL_PARAMETERS,
                    steps=args.steps,
                )
                rate = mean(machine.step_s / done.step_s for done in runs)
                row[f"{ranks} ranks, jitter {jitter:.0%}"] = rate
        rows.append(row)
    report("v100", "Efficiency on 128 V100, simulated", rows, args)


if __name__ == "__main__":
    main()
