"""Block momentum: the filter of `bmuf` and `gossip_bmuf`, written with start points.

Source      as of `bmuf`, with its equation numbers. W(t-1) is not kept: it is g, or
            g - eta Delta under nesterov.
Notation    wbar   mean of models at the end of a block; `bmuf` says of which    (1)
            g      -> start_point, what theta is set to after a block, (P,)
            Delta  -> delta, filtered update, (P,)
            W      -> model_(), the filtered model, (P,)
Update      G     = wbar - g                                                   (2)
            Delta <- eta Delta + zeta G                                        (3)
            W     = g + Delta                classical                         (4)
                  = g + zeta G               nesterov                          (5)
            g     <- W                       classical                         (6)
                  <- W + eta Delta           nesterov                          (7)
Invariants  eta = 0, zeta = 1: g <- wbar, to the bit.
            Nothing here reads theta: when the mean arrives changes no bit.
Cost        two copies of the model, g and Delta.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mpilm.vectors import chunked, copy_of, to_array

ALL = slice(None)


class BlockMomentum:
    """The filter and its state.

    start_point  g, (P,)
    delta        Delta, (P,); zero until the filter begins
    """

    def __init__(self, theta: Any, *, eta: float, zeta: float, momentum: str) -> None:
        self.eta, self.zeta, self.is_nesterov = eta, zeta, momentum == "nesterov"
        self.start_point = copy_of(theta)
        self.delta = copy_of(theta)
        self.delta[:] = 0.0

    @property
    def is_plain(self) -> bool:
        """Whether g is wbar: the filter is left out, with its rounding."""
        return self.eta == 0.0 and self.zeta == 1.0

    def filter_(self, where: slice, wbar: Any, *, plain: bool = False) -> None:
        """Apply (2) to (7) to a part of the model, in place, without temporaries.

        Args:
            wbar: mean of the part, becomes its next start point g.
            plain: g <- wbar, without momentum.

        >>> import numpy as np
        >>> settings = {"eta": 0.5, "zeta": 1.0, "momentum": "nesterov"}
        >>> block, wbar = BlockMomentum(np.zeros(1), **settings), np.ones(1)
        >>> block.filter_(slice(1), wbar)
        >>> float(block.delta[0]), float(wbar[0]), float(block.start_point[0])
        (1.0, 1.5, 1.5)
        """
        start_point, delta = self.start_point[where], self.delta[where]
        if plain or self.is_plain:
            start_point[:] = wbar
            return
        for w, g, d in chunked(wbar, start_point, delta):
            w -= g  # (2)
            w *= self.zeta
            d *= self.eta
            d += w  # (3)
            if self.is_nesterov:
                g += w  # (5)
                w[:] = d
                w *= self.eta
                g += w  # (7)
            else:
                g += d  # (4), (6)
            w[:] = g

    def model_(self, out: Any, where: slice = ALL) -> None:
        """Write W of a part of the model into `out`: (6), (7), solved for W."""
        if self.is_nesterov:
            out[:] = self.delta[where]
            out *= -self.eta
            out += self.start_point[where]
        else:
            out[:] = self.start_point[where]

    def conserved(self) -> Any:
        """Return what a block changes by what was learned in it, (P,) float64.

        (3) to (5) summed over all blocks, D: what was learned in them,

            (1 - eta) W(T) + eta Delta(T) = (1 - eta) W(0) + zeta D            (9)
        """
        model = copy_of(self.delta)
        self.model_(model)
        delta = to_array(self.delta).astype(np.float64)
        return ((1.0 - self.eta) * to_array(model) + self.eta * delta) / self.zeta
