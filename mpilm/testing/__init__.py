"""Test a strategy of your own: `check_strategy`, and what it is made of.

    from mpilm.testing import check_strategy

    def test_my_strategy():
        check_strategy("my_module:MyStrategy", period=4)

Everything runs in the virtual world: no MPI, no torch, seconds.
"""

from mpilm.testing.check import LawBroken, check_strategy
from mpilm.testing.fleet import Rank, fleet

__all__ = ["LawBroken", "Rank", "check_strategy", "fleet"]
