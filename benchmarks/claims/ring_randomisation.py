"""Does a random ring converge where a fixed one falls behind?

    python benchmarks/claims/ring_randomisation.py

Claim       ADPSGD on a random ring converges like all-reduce where the fixed ring falls
            behind, more so with more ranks.
Source      Zhang et al., arXiv 2002.01119; Cui et al., arXiv 2110.11199 (abstracts)
Set-up      LSTM on words, plain SGD, minibatch 1 x 10, 25,600 words in all on 16, 64
            and 128 ranks with steps of 0.1 s +- 10%; all-reduce, `adpsgd` on a fixed
            and on a random ring; rate tuned for each by the one rule on 16 ranks, at 64
            and 128 the same; test perplexity of the mean model, 3 seeds; 1 - rho of one
            round beside them. Then, as a rank of 128 took but 20 steps, the same with
            204,800 words. Then, as clipping bounds each rank's step, and so how far
            they come apart, with 51,200 words and without clipping, which decides
Decision    reproduced if at 64 and 128 ranks the random ring is within 5% of all-reduce
            and the fixed ring worse than the random one in all seeds and by 5% in the
            mean at 128; not reproduced if at 128 the random ring is no better than the
            fixed one in the mean, or more than 10% above all-reduce
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from claim import Finding, Study, at_each, judged, main, mean, shown
from tasks import all_seeds, few, tuned, words

WHY = {
    "not reproduced": (
        "Half of it holds. Without clipping the fixed ring falls behind the random"
        " one, by 2% with 16 ranks, 7% with 64 and 11% with 128, with the latter two"
        " in all seeds, as the spectral gap says; but the random ring falls behind"
        " all-reduce as well, at the rate that was best for 16 ranks. With clipping"
        " the two rings are alike: it bounds how far a step takes ranks apart. A rank"
        " of 128 takes 20 to 160 steps of 10 words here, so each step is little but"
        " noise; what a mean of all removes of it, a pair does not."
    ),
}
ROWS: dict[str, dict[str, Any]] = {
    "all-reduce": {"name": "allreduce"},
    "fixed ring": {"name": "adpsgd", "mixing": "fixed_ring"},
    "random ring": {"name": "adpsgd", "mixing": "random_ring"},
}
SIZES = (16, 64, 128)
SETUPS: dict[str, dict[str, Any]] = {
    "25,600 words": {"samples": 25_600, "batch": 1},
    "204,800 words": {"samples": 204_800, "batch": 1},
    "51,200 words, not clipped": {
        "samples": 51_200,
        "batch": 1,
        "more": {"optim": {"clip": 0.0}},
    },
}


def gaps(ranks: int) -> tuple[float, float]:
    """Return 1 - rho of the fixed and of the random ring (docs/convergence.md).

    >>> [round(gap, 4) for gap in gaps(16)]
    [0.0989, 0.7111]
    """
    fixed = ((1 + 2 * math.cos(2 * math.pi / ranks)) / 3) ** 2
    return 1 - fixed, 2 / 3 + (2 / 3) / (ranks - 1)


def measure(study: Study) -> Finding:
    """Return what the claim came to."""
    return at_each(study, SETUPS, compared)


def compared(study: Study, setup: Mapping[str, Any]) -> Finding:
    """Return what it came to with so many words."""
    holds: dict[str, bool] = {}
    fails: dict[str, bool] = {}
    parts = []
    for ranks in dict.fromkeys(few(study, k) for k in SIZES):
        found = {}
        for name, strategy in ROWS.items():
            key = {"strategy": strategy, **setup}
            lr = tuned(study, 4.0, words, ranks=few(study, SIZES[0]), **key)
            found[name] = all_seeds(study, words, lr=lr, ranks=ranks, **key)
        whole, fixed, drawn = (mean(points) for points in found.values())
        if ranks > SIZES[0]:
            near = f"{ranks} ranks: random ring within 5% of all-reduce"
            holds[near] = drawn <= 1.05 * whole
            pairs = zip(found["fixed ring"], found["random ring"], strict=True)
            worse = f"{ranks} ranks: fixed ring worse in all seeds"
            holds[worse] = all(one["test"] > other["test"] for one, other in pairs)
        if ranks == SIZES[-1]:
            holds[f"{ranks} ranks: fixed ring 5% worse"] = fixed > 1.05 * drawn
            fails[f"{ranks} ranks: random ring no better"] = drawn >= fixed
            far = f"{ranks} ranks: random ring over 10% above all-reduce"
            fails[far] = drawn > 1.10 * whole
        numbers = ", ".join(
            f"{name} {shown([p['test'] for p in points])}"
            for name, points in found.items()
        )
        one, other = gaps(ranks)
        parts.append(f"{ranks} ranks (1 - rho {one:.4f} and {other:.2f}): {numbers}")
    return judged(parts, holds=holds, refutes=fails)


if __name__ == "__main__":
    main()
