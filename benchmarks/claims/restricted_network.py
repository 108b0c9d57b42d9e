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
            for every number of nodes that has both. Reproduced if gossip's is at most
            1.5 and BMUF's at least 1.5 times gossip's, at every number of nodes; not
            reproduced if at one of them gossip's is no smaller than BMUF's;
            inconclusive in any case if a number stands on fewer than 3 seeds
"""

from __future__ import annotations

import json
from collections import defaultdict
from math import inf
from statistics import fmean
from typing import Any

from claim import HERE, Finding, Study, judged, main, shown

RESULT = HERE.parent / "results" / "network.json"
WHY = {
    "not reproduced": (
        "Both suffer, gossip more: it sends its momentum beside its model, two vectors"
        " where an Allreduce sends 1.5, and at 10 Mbit/s bytes are what counts. It"
        " needs fewer steps, and is the quicker one at 1 Gbit/s. Whether the paper's"
        " network was short of bytes, or had latency among many ranks, cannot be told:"
        " its abstract names none."
    ),
}
RATES = {"10mbit": 10, "100mbit": 100, "1gbit": 1000}
STRATEGIES = ("bmuf", "gossip_bmuf")
LEAST_SEEDS = 3


def points() -> list[list[Any]]:
    """Return [strategy, nodes, network, seconds or None: never] of every run."""
    found = []
    if RESULT.exists():
        for table in json.loads(RESULT.read_text())["tables"]:
            for row in table["rows"] if table["title"] == "Every point" else []:
                if row["series"] in STRATEGIES:
                    key = ("series", "nodes", "network", "seconds")
                    found.append([row[name] for name in key])
    return found


def measure(study: Study) -> Finding:
    """Return what the claim came to.

    Raises:
        TimeoutError: there is no number of nodes with two networks.
    """
    found: dict[tuple[str, int, str], list[float]] = defaultdict(list)
    for name, nodes, network, seconds in study.copied(points, RESULT.name):
        found[name, nodes, network].append(seconds or inf)
    parts, pairs, seeds = [], [], [LEAST_SEEDS]
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
            both = [found[name, nodes, network] for network in (slow, fast)]
            seeds += map(len, both)
            ratios.append(fmean(both[0]) / fmean(both[1]))
            parts.append(
                f"{nodes} nodes, {name}: {shown(both[0])} s over {slow},"
                f" {shown(both[1])} s over {fast}, {ratios[-1]:.1f} times"
            )
        pairs.append(ratios)
    if not pairs:
        if study.smoke:
            return judged([], holds={"a table of networks": False}, refutes={})
        raise TimeoutError
    parts.append(f"{min(seeds)} seeds or more")
    enough = min(seeds) >= LEAST_SEEDS
    fails = any(gossip >= bmuf for bmuf, gossip in pairs)
    return judged(
        parts,
        holds={
            "gossip at most 1.5 times": all(gossip <= 1.5 for _, gossip in pairs),
            "BMUF 1.5 times more": all(b >= 1.5 * gossip for b, gossip in pairs),
            "3 seeds of every number": enough,
        },
        refutes={"gossip suffers no less": fails and enough},
    )


if __name__ == "__main__":
    main()
