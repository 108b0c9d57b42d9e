"""Measure the claims of the papers: all, or some, each where it was left.

    python benchmarks/claims/run.py                  # three hours at most
    python benchmarks/claims/run.py bmuf_rule --minutes 10
    python benchmarks/claims/run.py --smoke          # seconds of each
    python benchmarks/claims/run.py --jobs 4         # at one time; else one a core

Every point is written to benchmarks/results/claims/ as soon as it is measured; the same
command goes on. `python benchmarks/claims/page.py` then writes the page.
"""

from __future__ import annotations

from claim import IDS, main

if __name__ == "__main__":
    main(IDS)
