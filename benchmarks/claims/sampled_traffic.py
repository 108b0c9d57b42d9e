"""Is training on samples 2.1 and 4.2 times faster to the same perplexity?

    python benchmarks/claims/sampled_traffic.py

Claim       Asynchronous SGD that sends samples is 2.1 times faster than dense
            asynchronous SGD and 4.2 times faster than the naive single device, at equal
            perplexity.
Source      Xiao et al., IJCAI 2017 (abstract): an RNN LM, 4 GTX 1080
Set-up      what benchmarks/bench_xiao.py has measured for real, 4 MPI ranks on the
            WikiText-2 sample: seconds of a sample in rounds that take turns, times the
            samples to the perplexity that all four systems reach (results/xiao.json).
            Nothing is measured here
Decision    reproduced if both ratios are reached; not reproduced if the first is not.
            If only the second is missed: inconclusive where the ranks share fewer than
            4 cores, as the naive system then has a core to itself and they have not;
            else not reproduced
"""

from __future__ import annotations

import json
from typing import Any

from claim import HERE, Finding, Study, judged, main

RESULT = HERE.parent / "results" / "xiao.json"
OVER_ASYNCHRONOUS, OVER_NAIVE = 2.1, 4.2


WHY = {
    "inconclusive": (
        "The first ratio is reached, the second is not: 4 ranks share 2 cores, so"
        " training on several can be no more than twice as fast as on one. Sampling"
        " alone gives the rest. One run of each, not three seeds. To decide: 4 cores"
        " and `python benchmarks/bench_xiao.py`."
    )
}


def stored() -> dict[str, Any]:
    """Return what the benchmark has: seconds to the target, the cores, the title."""
    for table in json.loads(RESULT.read_text())["tables"]:
        if table["title"].startswith("The four systems, WikiText-2"):
            seconds = {row["system"]: row["s to target"] for row in table["rows"]}
            about = {"title": table["title"], "cores": table["environment"]["cores"]}
            return {"seconds": seconds, **about}
    raise SystemExit(f"{RESULT}: has no table of WikiText-2; run bench_xiao.py")


def measure(study: Study) -> Finding:
    """Return what the claim came to."""
    point = study.copied(stored, RESULT.name)
    seconds = point["seconds"]
    fast = seconds["sampled asynchronous"]
    over_asynchronous, over_naive = (
        seconds["asynchronous"] / fast,
        seconds["naive"] / fast,
    )
    alone = seconds["naive"] / seconds["sampled"]
    first, second = over_asynchronous >= OVER_ASYNCHRONOUS, over_naive >= OVER_NAIVE
    numbers = (
        f"{over_asynchronous:.2f} x asynchronous, {over_naive:.2f} x naive;"
        f" sampled on one rank {alone:.2f} x naive; {point['cores']} cores, one run"
    )
    return judged(
        [numbers],
        holds={
            f"{OVER_ASYNCHRONOUS} x asynchronous": first,
            f"{OVER_NAIVE} x naive": second,
        },
        refutes={
            "the first ratio is missed": not first,
            "the second is missed on 4 cores": not second and point["cores"] >= 4,
        },
    )


if __name__ == "__main__":
    main()
