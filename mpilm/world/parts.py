"""What both worlds need: when the parts of a gradient are complete; ranks in words.

A step that only sleeps (or is slowed by a fault) has no backward pass to watch, so its
parts come at the times of this page.

    |-- forward --|---------- backward ----------|
                        part       part       part
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any

FORWARD_SHARE = 1 / 3  # of a step: a backward pass costs about two forward passes
MOST_NAMED = 16  # ranks in a line


def completion_shares(parts: Sequence[Any]) -> list[float]:
    """Return the share of the step after which each part is complete, 0 to 1.

    Slices take time in proportion to their length, anything else counts as 1.

    >>> completion_shares([slice(50, 100), slice(0, 50)])
    [0.6666666666666667, 1.0]
    """
    lengths = [max(1, p.stop - p.start) if isinstance(p, slice) else 1 for p in parts]
    done = list(accumulate(lengths))
    return [FORWARD_SHARE + (1.0 - FORWARD_SHARE) * d / done[-1] for d in done]


def named_ranks(ranks: Iterable[int]) -> str:
    """Return ranks as people write them.

    >>> named_ranks([2]), named_ranks([2, 5]), named_ranks(range(18))[-21:]
    ('rank 2', 'ranks 2, 5', '13, 14, 15 and 2 more')
    """
    found = list(ranks)
    text = ", ".join(str(rank) for rank in found[:MOST_NAMED])
    if len(found) > MOST_NAMED:
        text += f" and {len(found) - MOST_NAMED} more"
    return f"rank{'s' * (len(found) > 1)} {text}"
