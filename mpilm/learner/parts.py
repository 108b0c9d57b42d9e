"""Several minibatches that make one step."""

from __future__ import annotations

from typing import Any


class Parts(list[Any]):
    """Minibatches that make one step: the gradient is that of their mean loss."""
