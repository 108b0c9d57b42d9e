"""How many cores the libraries of one rank take."""

from __future__ import annotations

import torch
from threadpoolctl import threadpool_limits


def use_threads(number: int) -> None:
    """Let torch and numpy's BLAS compute with so many threads, from now on.

    Of itself numpy's takes every core, on every rank of a node: the eigenvalues of one
    60 x 60 matrix then take 0.5 ms on an idle machine and 20 beside other ranks.
    """
    torch.set_num_threads(number)
    threadpool_limits(number, user_api="blas")
