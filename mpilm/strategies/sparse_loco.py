"""Blocks of local steps; of what they came to only the largest entries, in two bits.

Source      A. Sarfi et al., "Communication Efficient LLM Pre-training with SparseLoCo",
            arXiv 2508.15706, 2025.
Notation    g       -> start_point, where all ranks began the block, (P,)
            e_i     -> error, what rank i has not sent yet, (P,)
            beta    -> decay of the error;  alpha -> outer_lr
            C       top k entries of each chunk of n, each in two bits: sparse_codes.py
Update      theta_i <- theta_i - lr * P(g_i)                every minibatch    (1)
            e_i     <- beta e_i + (theta_i - g)             at a block's end   (2)
            c_i     =  C(e_i);  e_i <- e_i - c_i                               (3)
            g       <- g + alpha (1/K) sum_j c_j;  theta_i <- g                (4)
Messages    at a block's end c_i to each other rank and one from each: for each chunk of
            n entries 2k + k/4 + 8 bytes; with k/n = 1/32 a packet is 1/55 of a
            model.

            rank 0: step step |=c_0 ==> all, all c_j ==>=| step step
            rank 1: step step |=c_1 ==> all, all c_j ==>=| step step
Invariants  all ranks add the c_j in the order of ranks: after (4) they hold the same
            bits. beta = 1: g / alpha + e changes by what was learned, nothing is lost;
            below 1 the error is forgotten on purpose.
Departs     from memory, as no text could be had: the two magnitudes of a chunk and the
            16 bits of an index are ours. The flat vector is cut into chunks, not each
            tensor. Sent to each rank rather than gathered: K - 1 messages. One rank has
            no outer step: it is `local`.
Cost        two copies of the model, g and e, and some passing ones; all on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from msgspec import Meta

from mpilm.learner.flat import Layout
from mpilm.strategies.base import Learner, Strategy
from mpilm.strategies.sparse_codes import SparseCodes
from mpilm.vectors import fill_, to_array
from mpilm.world.base import World


@dataclass(frozen=True, kw_only=True)
class SparseLocoConfig:
    """Section [strategy] of `sparse_loco`."""

    period: Annotated[int, Meta(ge=1)] = 30
    """minibatches in a block"""
    share: Annotated[float, Meta(gt=0.0, le=1.0)] = 0.03125
    """of the entries of a chunk that are sent"""
    chunk: Annotated[int, Meta(ge=1, le=65536)] = 4096
    """entries in a chunk"""
    decay: Annotated[float, Meta(ge=0.0, le=1.0)] = 0.95
    """of what was not sent, from one block to the next"""
    outer_lr: Annotated[float, Meta(gt=0.0)] = 1.0
    """outer learning rate"""


class SparseLoco(Strategy):
    """Local steps in blocks, and a sparse outer step.

    steps        minibatches so far
    moved        bytes sent so far, and as many received
    start_point  g, (P,) float32, an array
    error        e of this rank, (P,) float32, an array
    codes        what makes packets of vectors
    """

    name = "sparse_loco"
    Config = SparseLocoConfig
    synchronises = True
    saves = ("error", "moved", "start_point", "steps")
    lasting = ("error", "start_point", "steps")

    def __init__(self, world: World, config: SparseLocoConfig) -> None:
        super().__init__(world, config)
        self.steps = self.moved = 0
        self.start_point: Any = None
        self.error: Any = None

    def start(self, learner: Learner) -> None:
        super().start(learner)
        if self.comm.size > 1:
            self.start_point = to_array(learner.theta)
            self.error = np.zeros_like(self.start_point)
            config = self.config
            self.codes = SparseCodes(len(self.error), config.chunk, config.share)

    def step(self, learner: Learner) -> Any:
        loss = learner.gradient()
        learner.update()  # (1)
        self.steps += 1
        if self.steps % self.config.period == 0:
            if self.comm.size > 1:
                self.end_block_(learner.theta)
            self.synchronised(slice(0, learner.layout.size), learner.theta)
        return loss

    def end_block_(self, theta: Any) -> None:
        """Apply (2) to (4).

        Communicates: pairwise, a packet to and from every other rank, blocking.
        """
        self.error *= self.config.decay
        self.error += to_array(theta) - self.start_point  # (2)
        packet = self.codes.packet(self.error)
        own = self.codes.vector(packet)
        self.error -= own  # (3)
        total = self.sum_of(packet, own)
        total *= self.config.outer_lr / self.comm.size
        self.start_point += total  # (4)
        fill_(theta, self.start_point)

    def sum_of(self, packet: Any, own: Any) -> Any:
        """Return the sum of what all ranks send, (P,), added in the order of ranks."""
        comm = self.comm
        others = [rank for rank in range(comm.size) if rank != comm.rank]
        sends = [comm.Isend(packet, rank) for rank in others]
        total, received = np.zeros_like(own), np.empty_like(packet)
        for rank in range(comm.size):
            if rank == comm.rank:
                total += own
                continue
            comm.Recv(received, rank)
            total += self.codes.vector(received)
        for send in sends:
            send.Wait()
        self.moved += len(others) * packet.nbytes
        return total

    def metrics(self) -> dict[str, Any]:
        return self.averages(self.steps // self.config.period)

    def moved_bytes(self, layout: Layout) -> tuple[int, int]:
        return self.moved, self.moved

    def conserved(self, learner: Learner) -> Any:
        """Return g / alpha + e with what was learned since; None if e is forgotten."""
        if self.start_point is None:
            return super().conserved(learner)
        if self.config.decay < 1.0:
            return None
        theta, g, e = (
            np.asarray(vector, np.float64)
            for vector in (to_array(learner.theta), self.start_point, self.error)
        )
        return g / self.config.outer_lr + e + (theta - g)
