"""Settings that do not do together what they say: a line each, before training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from mpilm.strategies import Strategy

if TYPE_CHECKING:
    from mpilm.config import Config


def notes_on(config: Config, strategy: Strategy, size: int) -> Iterator[str]:
    """Yield what a run with these settings on `size` ranks should be warned of."""
    if size == 1:
        return
    if not strategy.lockstep and config.data.source == "shards":
        yield (
            f'data.source = "shards": under {strategy.name} a slow rank\'s part of the'
            ' data is seen less than others\'; "pool" gives it to whoever is free'
        )
    inner: Any = getattr(strategy, "inner", None) or strategy  # of `hierarchical`
    eta = getattr(inner, "eta", 0.0)
    is_filtering = getattr(inner.config, "filter", True)
    if getattr(config.schedule.settings, "times_ranks", False) and eta and is_filtering:
        yield (
            f"schedule.times_ranks multiplies the rate by {size}, the block momentum of"
            f" {inner.name} (eta = {eta:.3g}) every step by {1.0 / (1.0 - eta):.3g}"
            " again: this diverges as a rule; leave one of the two out"
        )
