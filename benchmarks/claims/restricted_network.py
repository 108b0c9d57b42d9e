"""Does BMUF suffer from a restricted network where gossip BMUF does not?

    python benchmarks/claims/restricted_network.py

Claim       Conventional BMUF suffers under restricted network conditions, gossip BMUF
            does not.
Source      Huang et al., ICASSP 2020, arXiv 1909.09010 (abstract)
Set-up      what bench_network.py has measured for real, over links of 10 and 100 Mbit/s
            and 1 Gbit/s between the nodes of an emulated cluster: seconds until an LSTM
            of characters has a perplexity of 10, and the share of a step that is
            communication (results/network.json). Nothing is measured here
Decision    of each strategy: seconds at the slowest network over those at the fastest,
            for every number of nodes that has both with 3 seeds. Reproduced if gossip's
            is at most 1.5 and BMUF's at least 1.5 times gossip's, at every number of
            nodes; not reproduced if at one of them gossip's is no smaller than BMUF's
"""

from __future__ import annotations

import json
from collections import defaultdict
from math import inf
from statistics import fmean

from claim import HERE, Finding, Study, decide, main

RESULT = HERE.parent / "results" / "network.json"
RATES = {"10mbit": 10, "100mbit": 100, "1gbit": 1000}
STRATEGIES = ("bmuf", "gossip_bmuf")
LEAST_SEEDS = 3


def seconds() -> dict[tuple[str, int, str], list[float]]:
    """Return (strategy, nodes, network) -> seconds of each seed; inf: never."""
    found = defaultdict(list)
    if RESULT.exists():
        for table in json.loads(RESULT.read_text())["tables"]:
            for row in table["rows"] if table["title"] == "Every point" else []:
                if row["series"] in STRATEGIES:
                    key = (row["series"], row["nodes"], row["network"])
                    found[key].append(row["seconds"] or inf)
    return {k: v for k, v in found.items() if len(v) >= LEAST_SEEDS}


def measure(study: Study) -> Finding:
    """Return what the claim came to.

    Raises:
        TimeoutError: there is no number of nodes with two networks.
    """
    found = seconds()
    parts, pairs = [], []
    for nodes in sorted({nodes for _, nodes, _ in found}):
        networks = [
            network
            for network in RATES
            if all((name, nodes, network) in found for name in STRATEGIES)
        ]
        if len(networks) < 2:
            continue
        slow, fast = networks[0], networks[-1]
        ratios = []
        for name in STRATEGIES:
            values = [fmean(found[name, nodes, network]) for network in (slow, fast)]
            ratios.append(values[0] / values[1])
            parts.append(
                f"{nodes} nodes, {name}: {values[0]:.1f} s over {slow},"
                f" {values[1]:.1f} s over {fast}"
            )
        pairs.append(ratios)
    if not pairs:
        if study.smoke:
            return Finding("inconclusive", "no table of networks yet")
        raise TimeoutError
    holds = all(gossip <= 1.5 and bmuf >= 1.5 * gossip for bmuf, gossip in pairs)
    fails = any(gossip >= bmuf for bmuf, gossip in pairs)
    return Finding(decide(reproduced=holds, refuted=fails), "; ".join(parts))


if __name__ == "__main__":
    main()
