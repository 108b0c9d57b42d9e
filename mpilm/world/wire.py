"""A wire format: float32 vectors travel in fewer bytes; nothing is lost.

Notation    x    -> a vector that a rank sends, float32
            Q(x) -> the nearest in the format: what travels, and what all ranks compute
                    with, the sender too
            left -> x - Q(x): stays with the sender, who adds it to its vector after the
                    exchange (a model), or to the next one that it sends (a gradient, an
                    update): error feedback
Formats     bfloat16, float16   2 bytes an element, of everything
            int8, int4          8.25, 4.25 bits an element (codes.py), of sums alone
Messages    p2p     2 bytes an element instead of 4; as they are in int8, int4
            sum     x in K pieces, piece k to rank k; rank k adds them in float32, in
                    the order of ranks; Q of the sum to all:

                    rank 0: |= Q(x_0)[k] => k |  s_0 = sum of [0]  |= Q(s_0) => all |
                    rank 1: |= Q(x_1)[k] => k |  s_1 = sum of [1]  |= Q(s_1) => all |

                    K - 1 messages each way and time. The second half goes when somebody
                    asks for the first: in Test, Wait, or the next sum.
Invariants  |left| <= 2^-8 |x| in bfloat16, 2^-11 |x| in float16 (2^-25 below 2^-14); in
            int8 and int4 1/254 and 1/14 of the largest |x| of 128 elements.
            After a sum  result + sum over ranks of left = sum over ranks of x, to the
            rounding of float32. `left` of rank k has s_k - Q(s_k) as well.
            The result is the same on all ranks, to the bit.
            Finite numbers beyond the format are its largest, and the rest is left; what
            is not finite travels as it is, and leaves nothing.
            Everything but float32 travels as it is, and so does a Bcast.

What travels are bytes: each format works with every MPI library and device.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from mpilm.errors import WorldError
from mpilm.vectors import is_finite, is_tensor
from mpilm.world.base import (
    ANY_SOURCE,
    ANY_TAG,
    IN_PLACE,
    SUM,
    Comm,
    Message,
    Op,
    Request,
)
from mpilm.world.buffers import described
from mpilm.world.codes import BLOCK, block_bytes, dequantised, quantised

T = TypeVar("T")

WIRES = ("float32", "bfloat16", "float16", "int8", "int4")
BITS = {"int8": 8, "int4": 4}  # of a code
LARGEST = {"bfloat16": float(2.0**127 * (2 - 2.0**-7)), "float16": 65504.0}
INFINITY = {"bfloat16": 0x7F80, "float16": 0x7C00}  # its bits
NUM_SUMS = 8192  # under way at once: MPI promises tags up to 32,767


@dataclass(frozen=True)
class Span:
    """How many bytes elements take: `num_bytes` for each `block` of them begun."""

    block: int
    num_bytes: int

    def of(self, num_elements: int) -> int:
        """Return the bytes of so many elements.

        >>> Span(128, 68).of(129)
        136
        """
        return -(-num_elements // self.block) * self.num_bytes

    def bytes_of(self, where: slice) -> slice:
        """Return where a part of a vector that begins with a block lies in bytes."""
        start = self.of(where.start)
        return slice(start, start + self.of(where.stop - where.start))

    def piece(self, num_elements: int, rank: int, size: int) -> slice:
        """Return the piece of a vector that a rank adds: whole blocks.

        >>> Span(1, 2).piece(10, 1, 3), Span(4, 6).piece(10, 1, 2)
        (slice(3, 6, None), slice(4, 10, None))
        """
        blocks = -(-num_elements // self.block)
        ends = (self.block * (r * blocks // size) for r in (rank, rank + 1))
        return slice(*(min(end, num_elements) for end in ends))


def span_of(wire: str) -> Span:
    """Return how many bytes elements take in a format."""
    return Span(BLOCK, block_bytes(BITS[wire])) if wire in BITS else Span(1, 2)


def narrowed(vector: Any, wire: str) -> Any:
    """Return Q(x) as bytes, uint8, numpy or torch as `vector` is.

    >>> widened(narrowed(np.array([1.001, 1e9], np.float32), "float16"), "float16")
    array([1.0009766e+00, 6.5504000e+04], dtype=float32)
    """
    if wire in BITS:
        with np.errstate(over="ignore", invalid="ignore"):
            return quantised(vector, BITS[wire])
    if is_tensor(vector):
        torch = sys.modules["torch"]
        x, kind = vector.detach(), getattr(torch, wire)
        short = x.to(kind)
        if short.isinf().any():
            most = LARGEST[wire]
            short = torch.where(x.isinf(), x, x.clamp(-most, most)).to(kind)
        return short.view(torch.uint8)
    with np.errstate(over="ignore", invalid="ignore"):
        bits = rounded_bits(vector, wire)
        if (bits & 0x7FFF == INFINITY[wire]).any():
            largest = np.float32(LARGEST[wire])
            clipped = np.clip(vector, -largest, largest)
            bits = rounded_bits(np.where(np.isinf(vector), vector, clipped), wire)
    return bits.view(np.uint8)


def rounded_bits(x: Any, wire: str) -> Any:
    """Return the nearest in the format, ties to even, as (n,) uint16."""
    if wire == "float16":
        return x.astype(np.float16).view(np.uint16)
    bits = np.ascontiguousarray(x).view(np.uint32)
    short = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), short)


def widened(message: Any, wire: str) -> Any:
    """Return what `narrowed` made of a vector: Q(x), float32; whole blocks of it."""
    if wire in BITS:
        with np.errstate(over="ignore", invalid="ignore"):
            return dequantised(message, BITS[wire])
    if is_tensor(message):
        torch = sys.modules["torch"]
        return message.view(getattr(torch, wire)).float()
    if wire == "float16":
        return message.view(np.float16).astype(np.float32)
    return (message.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def remainder(vector: Any, value: Any) -> Any:
    """Return x - Q(x); 0 where x is not finite.

    Args:
        value: Q(x), or whole blocks of it.

    >>> remainder(np.float32([1.5, np.inf]), np.float32([1.0, np.inf]))
    array([0.5, 0. ], dtype=float32)
    """
    with np.errstate(invalid="ignore"):
        left = vector - value[: len(vector)]
    if not is_finite(left):
        left[~(abs(left) < np.inf)] = 0.0
    return left.detach() if hasattr(left, "detach") else left


class WireComm(Comm):
    """A communicator whose float32 vectors travel in another format.

    inner  what it sends with
    span   bytes of elements in a sum
    short  whether single messages are in the format, too
    sums   the messages of sums

    Communicates: collective when made: it duplicates `inner`.
    """

    def __init__(self, inner: Comm, wire: str) -> None:
        self.inner, self.wire, self.sums = inner, wire, inner.Dup()
        self.span, self.short = span_of(wire), wire not in BITS
        self.item_bytes = 2 if self.short else 4
        self.rank, self.size, self.traffic = inner.rank, inner.size, inner.traffic
        self.num_sums = 0
        self.open: list[WireSum] = []

    @property
    def exact(self) -> Comm:
        return self.inner

    def left_of(self, vector: Any) -> Any:
        return remainder(vector, widened(narrowed(vector, self.wire), self.wire))

    # point to point
    def Isend(self, buf: Any, dest: int, tag: int = 0) -> Request:
        is_short = self.short and is_float32(buf)
        message = narrowed(buf, self.wire) if is_short else buf
        return self.inner.Isend(message, dest, tag)

    def Irecv(self, buf: Any, source: int = ANY_SOURCE, tag: int = ANY_TAG) -> Request:
        if not self.short or not is_float32(buf):
            return self.inner.Irecv(buf, source, tag)
        message = room(2 * len(buf), buf)
        request = self.inner.Irecv(message, source, tag)
        return WireReceive(request, message, self.wire, buf)

    def Improbe(self, source: int = ANY_SOURCE, tag: int = ANY_TAG) -> Message | None:
        message = self.inner.Improbe(source, tag)
        if message is None or not self.short:
            return message
        return WireMessage(message, self.wire)

    # collective
    def Iallreduce(self, sendbuf: Any, recvbuf: Any, op: Op = SUM) -> Request:
        if op is not SUM or not is_float32(recvbuf):
            return self.inner.Iallreduce(sendbuf, recvbuf, op)
        self.open = [request for request in self.open if not request.Test()]
        self.num_sums += 1
        vector = recvbuf if sendbuf is IN_PLACE else sendbuf
        request = WireSum(self, 2 * (self.num_sums % NUM_SUMS), vector, recvbuf)
        self.open.append(request)
        return request

    def Allreduce(self, sendbuf: Any, recvbuf: Any, op: Op = SUM) -> Any:
        if op is not SUM or not is_float32(recvbuf):
            return self.inner.Allreduce(sendbuf, recvbuf, op)
        request = self.Iallreduce(sendbuf, recvbuf, op)
        request.Wait()
        return request.left

    def allreduced_bytes(self, num_elements: int) -> int:
        own = self.span.piece(num_elements, self.rank, self.size)
        mine = self.span.of(own.stop - own.start)
        return self.span.of(num_elements) - mine + (self.size - 1) * mine

    def Bcast(self, buf: Any, root: int = 0) -> None:
        self.inner.Bcast(buf, root)

    def Ibarrier(self) -> Request:
        return self.inner.Ibarrier()

    def Barrier(self) -> None:
        self.inner.Barrier()

    def allgather(self, value: T) -> list[T]:
        return self.inner.allgather(value)

    # groups
    def Dup(self) -> Comm:
        return WireComm(self.inner.Dup(), self.wire)

    def Split(self, color: int | None, key: int = 0) -> Comm | None:
        found = self.inner.Split(color, key)
        return None if found is None else WireComm(found, self.wire)

    def Split_node(self) -> Comm:
        return WireComm(self.inner.Split_node(), self.wire)


class WireReceive(Request):
    """A receive; it decodes when it is done."""

    def __init__(self, request: Request, message: Any, wire: str, buf: Any) -> None:
        self.request, self.message, self.wire = request, message, wire
        self.buf: Any = buf

    def Test(self) -> bool:
        done = self.request.Test()
        if done:
            self.decode()
        return done

    def Wait(self) -> None:
        self.request.Wait()
        self.decode()

    def decode(self) -> None:
        """Write what has come into the buffer, once."""
        if self.buf is not None:
            self.buf[:] = widened(self.message, self.wire)
            self.buf = self.message = None


class WireMessage(Message):
    """A message that is decoded if it is received into float32."""

    def __init__(self, message: Message, wire: str) -> None:
        self.message, self.wire = message, wire
        self.source, self.tag = message.source, message.tag
        self.nbytes = message.nbytes

    def Recv(self, buf: Any) -> None:
        if not is_float32(buf):
            self.message.Recv(buf)
            return
        short = room(2 * len(buf), buf)
        self.message.Recv(short)
        count = self.nbytes // 2
        buf[:count] = widened(short[: self.nbytes], self.wire)


class WireSum(Request):
    """A sum over all ranks on its way; then `left` is what did not travel."""

    def __init__(self, comm: WireComm, tag: int, vector: Any, out: Any) -> None:
        self.comm, self.tag, self.out = comm, tag, out
        size, rank, span = comm.size, comm.rank, comm.span
        self.pieces = [span.piece(len(vector), r, size) for r in range(size)]
        self.own = self.pieces[rank]
        self.peers = (*range(rank + 1, size), *range(rank))
        self.message = narrowed(vector, comm.wire)
        self.left = remainder(vector, widened(self.message, comm.wire))
        self.sums = room(span.of(len(vector)), vector)
        num_own = span.of(self.own.stop - self.own.start)
        self.came = {peer: room(num_own, vector) for peer in self.peers}
        self.first = [
            comm.sums.Irecv(came, peer, tag)
            for peer, came in self.came.items()
            if num_own
        ]
        parts = {peer: span.bytes_of(self.pieces[peer]) for peer in self.peers}
        parts = {peer: part for peer, part in parts.items() if part.stop > part.start}
        self.second = [
            comm.sums.Irecv(self.sums[part], peer, tag + 1)
            for peer, part in parts.items()
        ]
        self.sends = [
            comm.sums.Isend(self.message[part], peer, tag)
            for peer, part in parts.items()
        ]
        self.is_added = self.done = False

    def Test(self) -> bool:
        if not self.is_added and all(request.Test() for request in self.first):
            self.add()
        if self.is_added and all(r.Test() for r in (*self.second, *self.sends)):
            self.end()
        return self.done

    def Wait(self) -> None:
        if self.done:
            return
        for request in self.first:
            request.Wait()
        if not self.is_added:
            self.add()
        for request in (*self.second, *self.sends):
            request.Wait()
        self.end()

    def end(self) -> None:
        """Write the sum, once."""
        if self.done:
            return
        self.out[:] = widened(self.sums, self.comm.wire)[: len(self.out)]
        self.done = True
        self.message = self.sums = self.out = None

    def add(self) -> None:
        """Add the pieces of all ranks; send the sum."""
        comm, where = self.comm, self.comm.span.bytes_of(self.own)
        if num_own := self.own.stop - self.own.start:
            self.came[comm.rank] = self.message[where]
            total = widened(self.came.pop(0), comm.wire)[:num_own]
            for rank in range(1, comm.size):
                total += widened(self.came.pop(rank), comm.wire)[:num_own]
            short = narrowed(total, comm.wire)
            self.left[self.own] += remainder(total, widened(short, comm.wire))
            self.sums[where] = short
            for peer in self.peers:
                self.sends.append(comm.sums.Isend(short, peer, self.tag + 1))
        self.is_added = True


def wired(comm: Comm, wire: str) -> Comm:
    """Return a communicator whose float32 vectors travel in a format of `WIRES`.

    Raises:
        WorldError: there is no such format; one line.

    Communicates: collective, a Dup, unless nothing is to be done.
    """
    if wire not in WIRES:
        raise WorldError(f"strategy.wire: no {wire!r}; there are {', '.join(WIRES)}")
    return comm if wire == "float32" or comm.size == 1 else WireComm(comm, wire)


def is_float32(buf: Any) -> bool:
    """Return whether a buffer is one that is encoded."""
    return described(buf)[1] == "float32"


def room(num_bytes: int, like: Any) -> Any:
    """Return a buffer for so many bytes, where `like` lies."""
    if is_tensor(like):
        return like.new_empty(num_bytes, dtype=sys.modules["torch"].uint8)
    return np.empty(num_bytes, np.uint8)
