"""Does BMUF need no change of the learning rate, where plain averaging needs lr x K?

    python benchmarks/claims/bmuf_rule.py

Claim       With eta = 1 - 1/K and zeta = 1 BMUF takes the learning rate of one rank
            unchanged up to 16 ranks; plain averaging needs it multiplied by K.
Source      Chen and Huo, ICASSP 2016, as CNTK's documentation states the rule; Su and
            Chen, arXiv 1507.01239 (lr x K)
Set-up      LSTM on words, plain SGD, minibatch 2 x 10, 100,000 words in all, blocks of
            5 minibatches, Nesterov; K = 4 and 16; lr is tuned on one rank by the one
            rule (benchmarks/claims/tasks.py); BMUF at lr/2, lr, 2 lr, averaging at lr,
            K/2 lr, K lr; test perplexity, 3 seeds
Decision    reproduced if at both K BMUF at lr is within 5% of the best of its three
            rates, and averaging at K lr is within 5% of the best of its three and at lr
            more than 5% above it; not reproduced if at either K BMUF at lr is more than
            10% above its best, or averaging at K lr is no better than at lr
"""

from __future__ import annotations

from typing import Any

from claim import Finding, Study, judged, main, mean
from tasks import all_seeds, few, tuned, words

WHY = {
    "not reproduced": (
        "BMUF wants half of one rank's rate, at 4 ranks and at 16, and averaging"
        " wants one rank's, or half of K times it, not K times. One rank's tuned rate"
        " lies at the edge of stability of plain SGD with clipping, so nothing above"
        " it can be better; and 16 ranks have 62 blocks, in which a block momentum of"
        " 15/16 has hardly come to its speed. With four times the words and 4 ranks"
        " BMUF's best rate is one rank's, as the rule says (the points of"
        " gossip_bmuf_quality)."
    ),
}
KEY: dict[str, Any] = {"samples": 100_000, "batch": 2}
WITHIN, BEYOND = 1.05, 1.10


def measure(study: Study) -> Finding:
    """Return what the claim came to."""
    single = {"strategy": {"name": "local"}, "ranks": 1, **KEY}
    lr = tuned(study, 4.0, words, **single)
    alone = mean(all_seeds(study, words, lr=lr, **single))
    parts = [f"one rank {alone:.1f} at lr = {lr:g}"]
    holds, fails = {}, {}
    for ranks in dict.fromkeys(few(study, k) for k in (4, 16)):
        factors = {"bmuf": (0.5, 1.0, 2.0), "model_averaging": (1.0, ranks / 2, ranks)}
        found: dict[str, list[float]] = {}
        for name, rates in factors.items():
            key = {"strategy": {"name": name, "period": 5}, "ranks": ranks, **KEY}
            found[name] = [
                mean(all_seeds(study, words, lr=lr * float(factor), **key))
                for factor in rates
            ]
        below, at, above = found["bmuf"]
        least = min(found["bmuf"])
        once, half, whole = found["model_averaging"]
        best = min(found["model_averaging"])
        of_k = f"K = {ranks}:"
        holds[f"{of_k} BMUF best at lr, or within 5%"] = at <= WITHIN * least
        holds[f"{of_k} averaging best at K lr, or within 5%"] = whole <= WITHIN * best
        holds[f"{of_k} averaging at lr over 5% worse"] = once > WITHIN * best
        fails[f"{of_k} BMUF at lr more than 10% above its best"] = at > BEYOND * least
        fails[f"{of_k} averaging at K lr no better than at lr"] = whole >= once
        parts.append(
            f"K = {ranks}: BMUF at lr/2, lr, 2 lr {below:.1f}, {at:.1f}, {above:.1f};"
            f" averaging at lr, K/2 lr, K lr {once:.1f}, {half:.1f}, {whole:.1f}"
        )
    return judged(parts, holds=holds, refutes=fails)


if __name__ == "__main__":
    main()
