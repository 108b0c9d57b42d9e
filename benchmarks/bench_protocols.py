"""What do the relatives send, and how long would a run take? Protocols, virtual time.

    python benchmarks/bench_protocols.py --out benchmarks/results/protocols.json

An LSTM language model of 50 million parameters (E = H = 650, two layers, V = 33,278) on
4 and 16 ranks with one rank a machine, 0.1 s a step, on two of the machines that ship:
1 and 25 Gbit/s. All seconds are predicted, none is measured; the gradients are those of
a quadratic, so nothing is said about perplexity.

Fixed beforehand: strategies in blocks have a `period` of 30; all else is the default.
The protocol's learner has no moments: `des_loc` with AdamW sends 1.5 times what stands
here (1 + 1/3 + 1/6). Each row is one run of the same --steps, four blocks.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from harness import parser, report

from mpilm.config import resolve
from mpilm.learner.flat import Layout
from mpilm.simulate.machines import find_machine
from mpilm.simulate.simulation import simulate_protocol
from mpilm.strategies import find_strategy

PERIOD, STEP_S = 30, 0.1
STRATEGIES = (
    "allreduce",
    "dpsgd",
    "gossip_pga",
    "sgp",
    "sparta",
    "model_averaging",
    "des_loc",
    "bmuf",
    "eager_diloco",
    "noloco",
    "sparse_loco",
)
LAYOUT = Layout.of(
    [
        ("embed", (33_278, 650), "words"),
        ("lstm", (4, 4, 650, 650), "lstm"),
        ("softmax", (33_278, 651), "softmax"),
    ]
)


def row_of(
    name: str, ranks: int, machines: tuple[str, ...], steps: int
) -> dict[str, Any]:
    """Return a row of the table: bytes, and seconds on each machine."""
    kind = find_strategy(name)
    blocks = hasattr(kind.Config(), "period") and name != "gossip_pga"
    settings = {"period": PERIOD} if blocks else {}
    config = resolve({"strategy": {"name": name, **settings}})
    row: dict[str, Any] = {"ranks": ranks, "strategy": name}
    for machine in machines:
        found = dataclasses.replace(find_machine(machine).machine, step_s=STEP_S)
        on_it = dataclasses.replace(config, machine=found)
        outcome = simulate_protocol(on_it, LAYOUT, ranks, steps)
        models = outcome.bytes_sent / (4 * LAYOUT.size * ranks * steps)
        row["models sent/step"] = round(models, 4)
        row[f"s/step, {machine}"] = round(outcome.seconds / steps, 3)
    return row


def main() -> None:
    arguments = parser(__doc__, warmup=0, loops=1)
    arguments.add_argument("--steps", type=int, default=4 * PERIOD, help="of a rank")
    args = arguments.parse_args()
    if args.smoke:
        args.steps = 6
    for ranks in (2,) if args.smoke else (4, 16):
        rows = [
            row_of(name, ranks, ("ethernet_1g", "cloud_25g"), args.steps)
            for name in STRATEGIES
        ]
        report("protocols", f"Bytes and predicted time, {ranks} ranks", rows, args)


if __name__ == "__main__":
    main()
