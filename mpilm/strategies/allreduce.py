"""Synchronous SGD: the gradient is averaged over all ranks in every step.

Source      the common baseline; overlap as in Li et al., "PyTorch Distributed:
            Experiences on Accelerating Data Parallel Training", VLDB 2020.
Notation    g_i -> grad, gradient of rank i's minibatch, (P,)
            K   -> comm.size, number of ranks
Update      grad  <- (1/K) sum_i g_i                                           (1)
            theta <- theta - lr * P(grad)                                      (2)
Messages    one Iallreduce per bucket, started as soon as the backward pass has
            completed the bucket; 4P bytes reduced in every step.

            rank 0: forward | backward ..........| wait | update
                              bucket 1 ====>
                                   bucket 2 ====>
Invariants  K ranks with minibatch b = one rank with minibatch K*b, to rounding.
            All ranks hold the same theta after every step.
            In another wire format than float32, (1) sums g_i + e_i, and e_i is what of
            it did not travel: the sum of all updates and of lr e / K is that of float32
            (plain SGD); ranks stay alike.
Rows        of row tables are summed after the buckets: row_sum.py.
Departs     nowhere.
Cost        in another wire format than float32 one copy of the model: e.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from msgspec import Meta

from mpilm.learner.flat import Layout
from mpilm.strategies.base import ITEM_BYTES, Learner, Strategy, UpdateWireConfig
from mpilm.strategies.row_sum import RowSum
from mpilm.vectors import zeros
from mpilm.world.base import IN_PLACE, Comm, Request, World


@dataclass(frozen=True, kw_only=True)
class AllreduceConfig(UpdateWireConfig):
    """Section [strategy] of `allreduce`."""

    bucket_bytes: Annotated[int, Meta(ge=1)] = 2_000_000
    """bytes of gradient reduced by one call; fewer: earlier start, more calls"""
    rows: Literal["auto", "union", "gather", "dense"] = "auto"
    """how gradients of row tables are summed: "auto" is the cheapest, see row_sum.py"""


class Allreduce(Strategy):
    """Synchronous SGD with the reduction behind the backward pass.

    error  e, (P,): what of the gradients has not travelled yet; None: all did
    """

    name = "allreduce"
    Config = AllreduceConfig
    survives = True
    same_optimizer = True
    synchronises = True
    takes_rows = True
    saves = (
        *("error", "rounds"),
        *("rows.num_dense", "rows.received", "rows.seen", "rows.sent"),
    )
    lasting = ("rounds",)

    def __init__(self, world: World, config: AllreduceConfig) -> None:
        super().__init__(world, config)
        self.rounds = 0
        self.error: Any = None

    def start(self, learner: Learner) -> None:
        super().start(learner)
        self.rows = RowSum(self.comm, learner.layout, self.config.rows)
        if self.comm.exact is not self.comm:
            self.error = zeros(learner.layout.size, like=learner.grad)

    def step(self, learner: Learner) -> Any:
        if self.comm.size == 1:
            loss = learner.gradient()
        else:
            buckets = self.config.bucket_bytes
            reduction = OverlappedSum(self.comm, learner, buckets, self.error)
            share = 1.0 / self.comm.size
            loss = learner.gradient(ready=reduction.segment_is_ready, scale=share)
            reduction.finish()  # (1)
            self.rows.sum_(learner, self.error)
        learner.update()  # (2)
        self.rounds += 1
        if self.on_synchronised is not None:  # looking at theta brings up all rows
            self.synchronised(slice(0, learner.layout.size), learner.theta)
        return loss

    def metrics(self) -> dict[str, Any]:
        return self.averages(self.rounds)

    def moved_bytes(self, layout: Layout) -> tuple[int, int]:
        once = summed_bytes(layout, self.config.bucket_bytes, self.comm)
        moved = self.rounds * once
        return moved + self.rows.sent, moved + self.rows.received


class OverlappedSum:
    """Sums `grad` over ranks bucket by bucket while the backward pass goes on.

    All ranks start the buckets in the same order, last layers first, whatever order
    their segments complete in: collectives match by order.

    Args:
        error: (P,), is added to `grad`, and becomes what did not travel; None: all did.
    """

    def __init__(
        self, comm: Comm, learner: Learner, bucket_bytes: int, error: Any = None
    ) -> None:
        self.comm, self.grad, self.error = comm, learner.grad, error
        self.buckets = learner.layout.buckets(elements(bucket_bytes))
        self.pending = [len(bucket) for bucket in self.buckets]
        self.bucket_of = {
            segment.start: index
            for index, bucket in enumerate(self.buckets)
            for segment in bucket
        }
        self.requests: list[Request] = []

    def segment_is_ready(self, where: slice) -> None:
        """Note a complete segment; start every bucket whose turn has come."""
        self.pending[self.bucket_of[where.start]] -= 1
        last = len(self.buckets) - 1
        while len(self.requests) < last and self.pending[len(self.requests)] == 0:
            part = self.grad[self.complete(len(self.requests))]
            self.requests.append(self.comm.Iallreduce(IN_PLACE, part))

    def finish(self) -> None:
        """Block until all of `grad` is summed.

        Nothing is left that the last bucket could hide behind: it is reduced here.
        """
        assert not any(self.pending), "a segment got no gradient"
        last = self.complete(len(self.buckets) - 1)
        left = self.comm.Allreduce(IN_PLACE, self.grad[last])
        self.keep(last, left)
        for index, request in enumerate(self.requests):
            request.Wait()
            self.keep(self.where(index), request.left)

    def complete(self, index: int) -> slice:
        """Add the error to the gradient of bucket `index`; return where it lies."""
        where = self.where(index)
        if self.error is not None:
            self.grad[where] += self.error[where]
        return where

    def keep(self, where: slice, left: Any) -> None:
        """Keep what did not travel."""
        if self.error is not None:
            self.error[where] = left

    def where(self, index: int) -> slice:
        """Return where the gradient of bucket `index` lies."""
        bucket = self.buckets[index]
        return slice(bucket[0].start, bucket[-1].stop)


def elements(num_bytes: int) -> int:
    """Return how many float32 are in so many bytes, at least one."""
    return max(1, num_bytes // ITEM_BYTES)


def summed_bytes(layout: Layout, bucket_bytes: int, comm: Comm) -> int:
    """Return what an `OverlappedSum` moves on this rank, each way."""
    buckets = layout.buckets(elements(bucket_bytes))
    sizes = [bucket[-1].stop - bucket[0].start for bucket in buckets]
    return sum(comm.allreduced_bytes(num) for num in sizes)
