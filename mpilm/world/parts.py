"""When the parts of a gradient are complete in a step whose length is declared.

A step that only sleeps (or is slowed by a fault) has no backward pass to watch, so its
parts come at the times of this page.

    |-- forward --|---------- backward ----------|
                        part       part       part
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

FORWARD_SHARE = 1 / 3  # of a step: a backward pass costs about two forward passes


def completion_shares(parts: Sequence[Any]) -> list[float]:
    """Return the share of the step after which each part is complete, 0 to 1.

    Slices take time in proportion to their length, anything else counts as 1.

    >>> completion_shares([slice(50, 100), slice(0, 50)])
    [0.6666666666666667, 1.0]
    """
    lengths = [max(1, p.stop - p.start) if isinstance(p, slice) else 1 for p in parts]
    done = list(accumulate(lengths))
    return [FORWARD_SHARE + (1.0 - FORWARD_SHARE) * d / done[-1] for d in done]
