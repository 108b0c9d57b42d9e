"""What of a model of 267,735 words travels, with gradients of rows, in which format?

    python benchmarks/bench_row_traffic.py --out benchmarks/results/row_traffic.json
    python benchmarks/bench_row_traffic.py --periods 1 2 3 4 5 10 20 --out ...

Virtual ranks count the bytes that they send in `--steps` steps; nothing is learned. A
step reads the rows of 700 Zipf words (T = 35, B = 20) and of a softmax's sample. Tables
are embedding, softmax and its bias; what lies before them is as large, beside the
tables, as two LSTM layers of H = 512 are at rows of 512. Rows are `--width` long: the
flags that say which rows travel weigh more than at 512.

dense    bytes of the same exchanges of whole models in float32, by their equations
goal     at most 5% of them for `allreduce`, averaging and gossip
at 512   the share with rows of 512: what was counted but the flags, as much longer
--periods  what is exchanged every so many steps, for several numbers of them
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from harness import parser, report

from mpilm.learner.flat import Layout, Rows
from mpilm.learner.quadratic import ProtocolLearner
from mpilm.strategies import strategy
from mpilm.world.base import World
from mpilm.world.virtual import run_virtual

VOCABULARY, TOKENS, FREQUENT, DRAWN = 267_735, 700, 512, 1536
HIDDEN = 512
GOAL = 0.05
EVERY = 10
CASES: dict[str, dict[str, Any]] = {
    "allreduce": {},
    "model_averaging": {"period": EVERY},
    "bmuf": {"period": EVERY},
    "delay_by_one": {},
    "dpsgd": {},
    "gossip_bmuf": {"period": EVERY},
    "adpsgd": {},
    "async_sgd": {},
}


def layout_of(width: int, vocabulary: int) -> Layout:
    """Return the layout of a language model with row tables."""
    dense = 2 * (8 * HIDDEN * HIDDEN + 8 * HIDDEN) * width // HIDDEN
    parts = [
        ("lstm", (dense,), "lstm"),
        ("embedding.weight", (vocabulary, width), "embedding"),
        ("softmax.weight", (vocabulary, width), "softmax"),
        ("softmax.bias", (vocabulary,), "softmax"),
    ]
    segments = Layout.of(parts).segments
    return Layout((segments[0], *(replace(s, is_table=True) for s in segments[1:])))


class Reader(ProtocolLearner):
    """A learner that reads rows as a language model does, and moves nothing."""

    def __init__(self, layout: Layout, world: World) -> None:
        few = Layout((replace(layout.segments[0], shape=(1,)),))
        super().__init__(1, compute=world.compute, seed=world.rank, layout=few)
        self.layout = layout
        self.theta = np.zeros(layout.size, np.float32)
        self.grad = np.zeros(layout.num_dense, np.float32)
        self.lr, self.num_read = 0.0, 0
        ranks = np.arange(layout.tables[0].shape[0])
        self.zipf = np.cumsum(1.0 / (ranks + 2.7))

    def draw(self) -> dict[str, Any]:
        """Return the rows of this minibatch."""
        size = len(self.zipf)
        at = self.random.random(TOKENS) * self.zipf[-1]
        words = np.unique(np.searchsorted(self.zipf, at))
        drawn = np.exp(self.random.random(DRAWN) * np.log(size)).astype(np.int64) - 1
        sample = np.unique(np.concatenate([words, np.arange(FREQUENT), drawn]))
        names = [table.name for table in self.layout.tables]
        self._drawn = dict(zip(names, (words, sample, sample), strict=True))
        return self._drawn

    def gradient(
        self, ready: Callable[[slice], None] | None = None, *, scale: float = 1.0
    ) -> float:
        drawn, self._drawn = self._drawn or self.draw(), None
        self.rows = {
            s.name: Rows(ids, np.zeros((len(ids), s.row_width), np.float32))
            for s, ids in zip(self.layout.tables, drawn.values(), strict=True)
        }
        self.num_read += sum(map(len, drawn.values()))
        if ready is not None:
            ready(self.layout.segments[0].slice)
        self.compute(lambda notify: None)
        self.samples += 1
        return 0.0

    def update(self) -> None:
        """Move nothing."""


def sent(
    name: str, settings: dict[str, Any], layout: Layout, ranks: int, steps: int
) -> tuple[float, float, float]:
    """Return bytes sent in a step and rank, those of whole models, rows in a step."""

    every = settings.get("period", 1)

    def main(world: World) -> tuple[int, int, float]:
        learner = Reader(layout, world)
        method = strategy(name, world, **settings)
        method.require(learner)
        method.start(learner)
        before = world.traffic.bytes_sent
        for _ in range(steps):
            method.step(learner)
        method.retire(learner)
        method.finish(learner)
        moved = world.traffic.bytes_sent - before
        partners = int(method.metrics()["partners"].sum())
        return (
            moved,
            whole(name, layout, ranks, steps, partners, every=every),
            learner.num_read / steps,
        )

    found = run_virtual(main, ranks)
    means = [sum(each) / ranks for each in zip(*found, strict=True)]
    return means[0] / steps, means[1] / steps, means[2]


def whole(
    name: str, layout: Layout, ranks: int, steps: int, partners: int, *, every: int
) -> int:
    """Return the bytes that exchanges of whole models would have sent on a rank."""
    model = 4 * layout.size
    summed = 2 * model * (ranks - 1) // ranks
    if name in ("dpsgd", "adpsgd"):
        return partners * model
    if name == "gossip_bmuf":  # models and start points, in pairs
        return steps // every * 2 * model
    if name in ("model_averaging", "bmuf"):
        return steps // every * summed
    return steps * summed  # async_sgd: served and pushed shards


def flags(name: str, layout: Layout, ranks: int, steps: int, every: int) -> float:
    """Return the bytes of flags that a rank sends in a step; no ids are among them."""
    num_rows = sum(table.shape[0] for table in layout.tables)
    if name in ("adpsgd", "async_sgd"):
        return 0.0  # ids: they are counted as rows
    if name == "gossip_bmuf":
        return num_rows / 8 / every
    if name == "dpsgd":
        return num_rows / 8 * min(2, ranks - 1)
    return 2 * num_rows * (ranks - 1) / ranks / every


def main() -> None:
    """Count, and print a table."""
    arguments = parser(__doc__ or "", warmup=0, loops=1)
    arguments.add_argument("--ranks", type=int, default=4)
    arguments.add_argument("--steps", type=int, default=20)
    arguments.add_argument("--width", type=int, default=32)
    arguments.add_argument("--periods", type=int, nargs="*", default=[])
    args = arguments.parse_args()
    vocabulary = VOCABULARY
    if args.smoke:
        args.steps, args.width, vocabulary = EVERY, 4, 20_000
    layout = layout_of(args.width, vocabulary)
    rows: list[dict[str, Any]] = []
    cases = list(CASES.items())
    if args.periods:
        exchanged = [name for name, settings in CASES.items() if settings]
        cases = [(n, {"period": every}) for n in exchanged for every in args.periods]
    for name, settings in cases:
        every = settings.get("period", 1)
        steps = -(-args.steps // every) * every
        for wire in ("float32", "bfloat16"):
            given = {**settings, "wire": wire}
            moved, dense, read = sent(name, given, layout, args.ranks, steps)
            of_flags = flags(name, layout, args.ranks, steps, every)
            longer = HIDDEN / args.width
            at_512 = ((moved - of_flags) * longer + of_flags) / (dense * longer)
            rows.append(
                {
                    "strategy": name,
                    "period": every,
                    "wire": wire,
                    "rows read": round(read),
                    "MB": round(moved / 1e6, 4),
                    "dense MB": round(dense / 1e6, 3),
                    "share": round(moved / dense, 5),
                    "at 512": round(at_512, 5),
                    "goal": GOAL,
                }
            )
    report("row_traffic", __doc__ or "", rows, args)


if __name__ == "__main__":
    main()
