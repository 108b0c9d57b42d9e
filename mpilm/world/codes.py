"""Whole numbers of 8 or 4 bits with a scale for each block: `int8` and `int4`.

Notation    x    -> a vector, float32, in blocks of B = 128 elements
            m    -> 127 in 8 bits, 7 in 4
            s    -> scale of a block, float32
            q_i  -> the code of x_i, a whole number from -m to m
Encoding    s   = max |x_i| / m over the block
            q_i = the nearest to x_i / s, ties to even;  Q(x)_i = s q_i
Message     for each block s in 4 bytes, then its codes, B or B/2 bytes: element 2 i in
            the lower half of byte i. The last block is filled up with zeros. So an
            element takes 8.25 or 4.25 bits.
Invariants  |x_i - Q(x)_i| <= s / 2, to float32's rounding: an error of the largest
            element of its block, not of its own size. So codes are for what is sent
            again and again and added up (gradients, updates of blocks) with what they
            leave, not for models, which would keep their error.
            A block in which something is not finite comes as NaN.
            The same bits in numpy and torch.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from mpilm.vectors import end_to_end, is_tensor, zeros

BLOCK = 128
LARGEST_CODE = {8: 127, 4: 7}
SCALE_BYTES = 4
SMALLEST = float(np.finfo(np.float32).tiny)  # scales below it: the block is all left


def block_bytes(bits: int) -> int:
    """Return the bytes of a block.

    >>> block_bytes(8), block_bytes(4)
    (132, 68)
    """
    return SCALE_BYTES + BLOCK * bits // 8


def namespace_of(vector: Any) -> Any:
    """Return the library whose functions a vector takes: numpy or torch."""
    return sys.modules["torch"] if is_tensor(vector) else np


def quantised(vector: Any, bits: int) -> Any:
    """Return the blocks of a vector as bytes, uint8, numpy or torch as `vector` is.

    >>> x = np.array([7.0, -3.0, 0.6], np.float32)
    >>> len(quantised(x, 4)), dequantised(quantised(x, 4), 4)[:3]
    (68, array([ 7., -3.,  1.], dtype=float32))
    """
    xp, most = namespace_of(vector), LARGEST_CODE[bits]
    blocks = in_blocks(vector.detach() if is_tensor(vector) else vector)
    scales = xp.amax(abs(blocks), 1) / most
    usable = xp.where(scales >= SMALLEST, scales, xp.inf)
    codes = xp.round(blocks / usable[:, None])
    finite = xp.isfinite(scales)
    codes = xp.where(finite[:, None], codes, most)
    scales = xp.where(finite, scales, xp.nan).view(xp.uint8).reshape(-1, SCALE_BYTES)
    whole = cast(codes if bits == 8 else codes + 8, xp.int8).view(xp.uint8)
    if bits == 4:
        whole = whole[:, 0::2] | whole[:, 1::2] << 4
    return xp.hstack((scales, whole)).reshape(-1)


def dequantised(message: Any, bits: int) -> Any:
    """Return Q(x) of what `quantised` made, float32, filled up to whole blocks."""
    xp = namespace_of(message)
    blocks = message.reshape(-1, block_bytes(bits))
    scales = contiguous(blocks[:, :SCALE_BYTES]).view(xp.float32)
    codes = contiguous(blocks[:, SCALE_BYTES:])
    if bits == 8:
        return (cast(codes.view(xp.int8), xp.float32) * scales).reshape(-1)
    whole = xp.stack((codes & 15, codes >> 4), -1).reshape(len(blocks), BLOCK)
    return ((cast(whole, xp.float32) - 8) * scales).reshape(-1)


def in_blocks(vector: Any) -> Any:
    """Return a vector as (blocks, BLOCK), filled up with zeros."""
    if fill := -len(vector) % BLOCK:
        vector = end_to_end([vector, zeros(fill, vector)])
    return vector.reshape(-1, BLOCK)


def cast(values: Any, kind: Any) -> Any:
    """Return values in another kind of number."""
    return values.to(kind) if is_tensor(values) else values.astype(kind)


def contiguous(values: Any) -> Any:
    """Return values without gaps in memory."""
    return values.contiguous() if is_tensor(values) else np.ascontiguousarray(values)
