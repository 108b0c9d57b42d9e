"""Is gossip BMUF as good as one rank, and at least as good as BMUF?

    python benchmarks/claims/gossip_bmuf_quality.py

Claim       Gossip BMUF has a lower perplexity than one rank with 4 ranks, no
            degradation with 8 and 16, and is consistently better than conventional
            BMUF.
Source      Huang et al., ICASSP 2020, arXiv 1909.09010 (abstract: tau, eta, zeta, k and
            the components are not available)
Set-up      LSTM on words, plain SGD, minibatch 2 x 10, 100,000 words in all, blocks of
            5 minibatches; one rank, `bmuf` and `gossip_bmuf` (pairs, layers, Nesterov,
            eta by the rule of each) on 4, 8 and 16 ranks; on 4 ranks ablations of
            gossip: the whole model, two slices, no block filter, groups of 3; rate
            tuned by the one rule for one rank and, on 4 ranks, for each of the others;
            test perplexity of the mean model, 3 seeds. Then, as what was missing there
            was length, all but the ablations with 400,000 words, which decides
Decision    reproduced if gossip is below one rank at 4, at most 2% above it at 8 and
            16, and below BMUF at each, in the means; not reproduced if it is more than
            2% above one rank at 4, or above BMUF at each of the three
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from claim import Finding, Study, at_each, judged, main, mean, shown
from tasks import all_seeds, few, tuned, tuned_seeds, words

WHY = {
    "not reproduced": (
        "With 400,000 words gossip with 4 ranks is below one rank, as claimed; with 8"
        " and 16 it is not, and BMUF is below gossip at each. What is missing is"
        " length: four times the words took gossip with 4 ranks from 8% above one rank"
        " to 1% below, with 16 from 53% to 25% above. A pair carries a block's"
        " progress to K ranks in log2 K blocks, and of these a rank of 16 has 250. Of"
        " what the paper does not say, whole model, slices and groups come to 2%, the"
        " block filter to 5%. Which of the two is better against time, over a network,"
        " is restricted_network's question."
    ),
}
SETUPS: dict[str, dict[str, Any]] = {
    "100,000 words": {"samples": 100_000, "batch": 2},
    "400,000 words": {"samples": 400_000, "batch": 2},
}
ROWS: dict[str, dict[str, Any]] = {
    "bmuf": {"name": "bmuf", "period": 5},
    "gossip_bmuf": {"name": "gossip_bmuf", "period": 5},
}
ABLATIONS: dict[str, dict[str, Any]] = {
    "whole model": {"components": "whole"},
    "two slices": {"components": 2},
    "no block filter": {"filter": False},
    "groups of 3": {"group_size": 3},
}
SIZES = (4, 8, 16)


def measure(study: Study) -> Finding:
    """Return what the claim came to."""
    return at_each(study, SETUPS, compared)


def compared(study: Study, setup: Mapping[str, Any]) -> Finding:
    """Return what it came to with so many words."""
    alone = tuned_seeds(study, 4.0, words, strategy={"name": "local"}, ranks=1, **setup)
    one = mean(alone)
    parts = [f"one rank {shown([p['test'] for p in alone])}"]
    means: dict[str, list[float]] = {name: [] for name in ROWS}
    rates = {}
    for name, strategy in ROWS.items():
        key = {"strategy": strategy, **setup}
        rates[name] = tuned(study, 4.0, words, ranks=few(study, SIZES[0]), **key)
        numbers = []
        for ranks in SIZES:
            points = all_seeds(
                study, words, lr=rates[name], ranks=few(study, ranks), **key
            )
            means[name].append(mean(points))
            numbers.append(f"{ranks}: {shown([p['test'] for p in points])}")
        parts.append(f"{name} at lr = {rates[name]:g}, ranks {', '.join(numbers)}")
    is_first = setup == next(iter(SETUPS.values()))
    for name, changed in ABLATIONS.items() if is_first or study.smoke else ():
        strategy = {**ROWS["gossip_bmuf"], **changed}
        key = {"strategy": strategy, "ranks": few(study, SIZES[0]), **setup}
        points = tuned_seeds(study, rates["gossip_bmuf"], words, **key)
        parts.append(f"4 ranks, {name}: {shown([p['test'] for p in points])}")
    gossip, bmuf = means["gossip_bmuf"], means["bmuf"]
    pairs = list(zip(gossip, bmuf, strict=True))
    return judged(
        parts,
        holds={
            "below one rank with 4": gossip[0] < one,
            "at most 2% above it with 8 and 16": max(gossip[1:]) <= 1.02 * one,
            "below BMUF at each": all(mine < other for mine, other in pairs),
        },
        refutes={
            "more than 2% above one rank with 4": gossip[0] > 1.02 * one,
            "above BMUF at each": all(mine > other for mine, other in pairs),
        },
    )


if __name__ == "__main__":
    main()
