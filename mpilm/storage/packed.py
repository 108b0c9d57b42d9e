"""A state as one message: what is no vector first, then the vectors.

    | HEAD: lengths | header, pickled: names, shapes, types; the rest | vectors |

It is for ranks of one run only: a file is never read so. Vectors begin at multiples of
64 bytes, and are taken out without a copy.

>>> state = {"theta": np.ones(2, np.float32), "step": 3}
>>> sorted(unpacked(packed(state)).items())
[('step', 3), ('theta', array([1., 1.], dtype=float32))]
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from itertools import accumulate
from typing import Any

import numpy as np

from mpilm.storage.saved import State

HEAD = 16  # bytes: of the pickled header, of the message
ALIGNED = 64  # bytes; a cache line, and more than any type asks for


def split(state: Mapping[str, Any]) -> tuple[bytes, list[np.ndarray]]:
    """Return the header of a state, and its vectors, in order."""
    vectors = {n: v for n, v in state.items() if isinstance(v, np.ndarray) and v.size}
    about = {name: (v.shape, v.dtype.str) for name, v in vectors.items()}
    rest = {name: value for name, value in state.items() if name not in vectors}
    return pickle.dumps((about, rest)), list(vectors.values())


def packed(state: Mapping[str, Any], out: np.ndarray | None = None) -> np.ndarray:
    """Return a state as bytes, uint8; in `out`, if that is long enough.

    What is returned may be longer than the message, see `length_of`.
    """
    header, vectors = split(state)
    lengths = [HEAD + len(header), *(vector.nbytes for vector in vectors)]
    ends = list(accumulate(map(padded, lengths)))
    if out is None or len(out) < ends[-1]:
        out = np.empty(ends[-1], np.uint8)
    out[:HEAD].view(np.int64)[:] = len(header), ends[-1]
    out[HEAD : HEAD + len(header)] = np.frombuffer(header, np.uint8)
    for begin, vector in zip(ends, vectors, strict=False):
        part = out[begin : begin + vector.nbytes].view(vector.dtype)
        np.copyto(part.reshape(vector.shape), vector)
    return out


def length_of(message: np.ndarray) -> int:
    """Return the bytes of it that count."""
    return int(message[8:HEAD].view(np.int64)[0])


def unpacked(message: np.ndarray) -> State:
    """Return the state; its vectors are parts of the message."""
    length = int(message[:8].view(np.int64)[0])
    about, state = pickle.loads(message[HEAD : HEAD + length].tobytes())
    begin = padded(HEAD + length)
    for name, (shape, dtype) in about.items():
        vector = np.ndarray(shape, dtype, message, begin)
        state[name] = vector
        begin += padded(vector.nbytes)
    return dict(state)


def padded(length: int) -> int:
    """Return the next multiple of `ALIGNED`.

    >>> padded(1), padded(64)
    (64, 64)
    """
    return -(-length // ALIGNED) * ALIGNED
