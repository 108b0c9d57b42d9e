"""Does `allreduce` sum gradients of rows in the cheapest way, whatever their density?

    mpirun -n 2 python benchmarks/bench_rows.py --out benchmarks/results/rows-2.json

A table of `--vocab` rows of `--width`; each rank has a share of its rows, drawn evenly
(--same: the same ones). Summed in turns by union, by gathering, as whole tables, and as
"auto" chooses by the step before (mpilm/strategies/row_sum.py). Between summing and
the next there is a barrier; the slowest rank's time counts.

goal  what is chosen takes at most 1.05 of the better of dense and gather: by the times
      of that way, and by those of "auto", which are the same but for noise
"""

from __future__ import annotations

from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from harness import parser, report

from mpilm.learner.flat import Layout, Rows, Segment
from mpilm.strategies.row_sum import RowSum
from mpilm.world.mpi import MpiWorld, abort_on_error

GOAL = 1.05
WAYS = ("union", "gather", "dense", "auto")
DENSITIES = (0.0001, 0.001, 0.01, 0.1, 0.3, 1.0)


def drawn(args: Any, rank: int, segment: Segment, density: float) -> Rows:
    """Return the rows of a rank."""
    draw = np.random.default_rng(0 if args.same else rank)
    num = max(1, round(density * args.vocab))
    ids = np.sort(draw.choice(args.vocab, num, replace=False))
    return Rows(torch.from_numpy(ids), torch.ones(num, segment.row_width))


def measured(args: Any, world: MpiWorld, density: float) -> dict[str, Any]:
    """Return the median seconds of each way, and what "auto" chose."""
    shape = (args.vocab, args.width)
    segment = Segment("table", 0, shape, "table", is_table=True)
    layout = Layout((segment,))
    sums = {way: RowSum(world.comm, layout, way) for way in WAYS}
    rows = drawn(args, world.rank, segment, density)
    took: dict[str, list[float]] = {way: [] for way in WAYS}
    chosen = ""
    for loop in range(args.warmup + args.loops):
        turn = loop % len(WAYS)  # each comes after each other
        for way in (*WAYS[turn:], *WAYS[:turn]):
            sum_ = sums[way]
            learner: Any = SimpleNamespace(
                grad=torch.zeros(0), layout=layout, rows={"table": rows}
            )
            chosen = sum_.way() if way == "auto" else chosen
            world.comm.Barrier()
            began_s = world.now_s()
            sum_.sum_(learner)
            mine_s = world.now_s() - began_s
            if loop >= args.warmup:
                took[way].append(max(world.comm.allgather(mine_s)))
    return {**{way: median(values) for way, values in took.items()}, "chosen": chosen}


def main() -> None:
    """Run the benchmark."""
    arguments = parser(__doc__ or "", warmup=2, loops=9)
    arguments.add_argument("--vocab", type=int, default=60_000)
    arguments.add_argument("--width", type=int, default=128)
    arguments.add_argument("--same", action="store_true", help="all have the same rows")
    args = arguments.parse_args()
    if args.smoke:
        args.vocab, args.width, args.loops = 500, 4, 2
    with MpiWorld() as world, abort_on_error(world):
        rows = []
        for density in DENSITIES:
            found = measured(args, world, density)
            best = min(found["dense"], found["gather"])
            row = {"rows of a rank (%)": 100 * density}
            row |= {f"{way} (ms)": 1e3 * found[way] for way in WAYS}
            chosen = found["chosen"]
            row |= {"chosen": chosen, "chosen over best": found[chosen] / best}
            row |= {"auto over best": found["auto"] / best}
            rows.append(row)
        if world.rank == 0:
            kind = "the same rows" if args.same else "rows of their own"
            title = f"Sums of rows, {world.size} ranks, {kind}"
            report("rows", title, rows, args)
            for column in ("chosen over best", "auto over best"):
                worst = max(row[column] for row in rows)
                verdict = "met" if worst <= GOAL else "MISSED"
                print(f"goal {verdict}: {column}: at worst {worst:.2f} <= {GOAL}")


if __name__ == "__main__":
    main()
