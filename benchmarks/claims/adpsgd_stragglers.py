"""Is the loss against time unharmed by one slow rank?

    python benchmarks/claims/adpsgd_stragglers.py

Claim       With one rank 2, 10 or 100 times slow ADPSGD on a fixed or random ring
            trains on unharmed; all-reduce and delay_by_one suffer.
Source      Cui et al., arXiv 2110.11199 (abstract)
Set-up      LSTM on words, plain SGD, minibatch 4 x 10, 32,000 words in all from a
            common pool, 8 ranks with steps of 0.1 s +- 10%, the last rank slow; rate
            tuned for each strategy by the one rule, on the way, without a slow rank;
            virtual seconds until the training perplexity (of words that no rank has
            seen before, in 8 windows of equally many minibatches, each at the mean of
            their times) is 1.1 times the worst that a strategy ends at without a slow
            rank; 3 seeds. First it was the valid perplexity of 8 evaluations; for these
            the slow rank has to finish its step, so with 100 x the first came when all
            was over (10.2 s, perplexity 61; 60.8 at 10.1 s without a slow rank): it had
            measured when one looks
Decision    reproduced if at every factor both rings take at most 8/7 x 1.1 of their
            time without a slow rank (an eighth of the speed may be lost), and
            all-reduce and delay_by_one at least 0.8 times the factor; not reproduced if
            a ring takes more than 1.5 times, or all-reduce or delay_by_one less than
            half the factor
"""

from __future__ import annotations

from statistics import fmean
from typing import Any

from claim import Finding, Study, judged, main, shown
from tasks import all_seeds, few, on_the_way, seconds_to, tuned, words

ROWS: dict[str, dict[str, Any]] = {
    "fixed ring": {"name": "adpsgd", "mixing": "fixed_ring"},
    "random ring": {"name": "adpsgd", "mixing": "random_ring"},
    "all-reduce": {"name": "allreduce"},
    "delay_by_one": {"name": "delay_by_one"},
}
FACTORS = (1.0, 2.0, 10.0, 100.0)
RANKS = 8
POOL = {"data": {"source": "pool", "chunk_windows": 5}}
KEY: dict[str, Any] = {"samples": 32_000, "windows": 8, "more": POOL}


def measure(study: Study) -> Finding:
    """Return what the claim came to."""
    ranks = few(study, RANKS)
    found: dict[str, dict[float, Any]] = {}
    for name, strategy in ROWS.items():
        key = {"strategy": strategy, "ranks": ranks, **KEY}
        lr = tuned(study, 8.0, words, on_the_way, **key)
        found[name] = {
            factor: all_seeds(study, words, lr=lr, slow=factor, **key)
            for factor in FACTORS
        }
    ends = [[p["curve"][-1][1] for p in points[1.0]] for points in found.values()]
    target = 1.1 * max(map(fmean, ends))
    holds, fails = {}, {}
    parts = [f"time to perplexity {target:.1f} over that without a slow rank"]
    for name, points in found.items():
        waits = not name.endswith("ring")
        numbers = []
        for factor in FACTORS[1:]:
            pairs = zip(points[factor], points[1.0], strict=True)
            ratios = [
                seconds_to(target, slow["curve"]) / seconds_to(target, even["curve"])
                for slow, even in pairs
            ]
            ratio = fmean(ratios)
            numbers.append(f"{factor:g} x: {shown(ratios, 2)}")
            if waits:
                holds[f"{name}, {factor:g} x: suffers"] = ratio >= 0.8 * factor
                fails[f"{name}, {factor:g} x: suffers little"] = ratio < 0.5 * factor
            else:
                is_unharmed = ratio <= 1.1 * RANKS / (RANKS - 1)
                holds[f"{name}, {factor:g} x: unharmed"] = is_unharmed
                fails[f"{name}, {factor:g} x: harmed"] = ratio > 1.5
        parts.append(
            f"{name}: time over that without a slow rank, {', '.join(numbers)}"
        )
    return judged(parts, holds=holds, refutes=fails)


if __name__ == "__main__":
    main()
