"""The largest entries of each chunk of a vector, in two bits each, as one packet.

Notation    n, k   entries in a chunk, and of these sent
            s      sign of an entry; u: whether its magnitude is above the mean of the k
            a, b   means of the magnitudes with u = 0 and with u = 1
Packet      uint8: a and b of all chunks (float32), then all indices (uint16), then s
            and u of all entries, 8 to a byte: C (2k + 8) + ceil(C k / 4) bytes.
Invariants  what `vector` makes of a packet is the same on all ranks. No other values of
            a and b with the same u are nearer to the entries, in squared error.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float32]
Bytes = NDArray[np.uint8]


class SparseCodes:
    """Packets of vectors of one size.

    Args:
        size: entries of a vector, P.
        chunk: entries in a chunk; the last one is padded.
        share: of a chunk that is sent; one entry at least.

    >>> codes = SparseCodes(4, chunk=4, share=0.5)
    >>> codes.vector(codes.packet(np.array([0.1, -3.0, 0.2, 5.0], np.float32)))
    array([ 0., -3.,  0.,  5.], dtype=float32)
    """

    def __init__(self, size: int, chunk: int, share: float) -> None:
        self.size = size
        self.chunk = min(chunk, size)
        self.num_chunks = -(-size // self.chunk)
        self.count = max(1, round(share * self.chunk))

    def packet(self, vector: Vector) -> Bytes:
        """Return the largest entries of each chunk, (num_bytes,)."""
        padded = np.zeros(self.num_chunks * self.chunk, np.float32)
        padded[: self.size] = vector
        x_CN = padded.reshape(self.num_chunks, self.chunk)
        split = self.chunk - self.count
        where = np.argpartition(np.abs(x_CN), split - 1 if split else 0, axis=1)
        where = np.sort(where[:, split:], axis=1)
        chosen = np.take_along_axis(x_CN, where, axis=1)
        sizes = np.abs(chosen)
        upper = sizes > sizes.mean(axis=1, keepdims=True)
        levels = np.stack([mean_of(sizes, ~upper), mean_of(sizes, upper)], axis=1)
        bits = np.packbits(np.stack([chosen < 0.0, upper]))
        parts = (levels.astype(np.float32), where.astype(np.uint16), bits)
        return np.concatenate([part.reshape(-1).view(np.uint8) for part in parts])

    def vector(self, packet: Bytes) -> Vector:
        """Return the vector that a packet stands for, (size,): 0 where nothing is."""
        shape = (self.num_chunks, self.count)
        entries, ends = shape[0] * shape[1], [8 * shape[0]]
        ends.append(ends[0] + 2 * entries)
        first, second, third = np.split(packet, ends)
        levels = first.view(np.float32).reshape(-1, 2)
        where = second.view(np.uint16).reshape(shape).astype(np.int64)
        signs, upper = np.unpackbits(third, count=2 * entries).reshape(2, *shape)
        values = np.take_along_axis(levels, upper.astype(np.int64), axis=1)
        values = np.where(signs == 1, -values, values)
        out = np.zeros((self.num_chunks, self.chunk), np.float32)
        np.put_along_axis(out, where, values, axis=1)
        return out.reshape(-1)[: self.size]


def mean_of(sizes_CK: Vector, mask_CK: NDArray[np.bool_]) -> Vector:
    """Return the mean of those of each row that `mask` names, (C,); 0: none."""
    sums = np.where(mask_CK, sizes_CK, 0.0).sum(axis=1)
    return np.asarray(sums / np.maximum(1, mask_CK.sum(axis=1)), np.float32)
