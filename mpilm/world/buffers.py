"""Buffers of both worlds: numpy arrays and torch tensors under one face.

torch is never imported here: a tensor can only come from somebody who has.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from mpilm.errors import WorldError
from mpilm.world.base import Op

_DTYPES = {
    np.dtype(name): name for name in ("float32", "float64", "int32", "int64", "uint8")
}
_UFUNCS = {Op.SUM: np.add, Op.MAX: np.maximum, Op.MIN: np.minimum}
_TORCH_OPS = {Op.SUM: "add", Op.MAX: "maximum", Op.MIN: "minimum"}


def described(buf: Any) -> tuple[int, str]:
    """Return the bytes and the dtype's name of a buffer.

    Raises:
        WorldError: not a 1-D contiguous array of a type that travels.
    """
    if isinstance(buf, np.ndarray):
        name = _DTYPES.get(buf.dtype)
        contiguous = buf.flags.c_contiguous
    elif hasattr(buf, "is_contiguous"):
        name = str(buf.dtype).removeprefix("torch.")
        name = name if name in _DTYPES.values() else None
        contiguous = buf.is_contiguous()
    else:
        raise WorldError(f"a buffer must be an array, not {type(buf).__name__}")
    if name is None:
        raise WorldError(f"a buffer of {buf.dtype} cannot be communicated")
    if buf.ndim != 1 or not contiguous:
        raise WorldError(f"a buffer of shape {tuple(buf.shape)} is not 1-D contiguous")
    return buf.nbytes, name


def write_(buf: Any, data: Any) -> None:
    """Copy `data` into the beginning of `buf`, across libraries if need be."""
    if isinstance(buf, np.ndarray):
        if not isinstance(data, np.ndarray):
            data = data.cpu().numpy()
        buf[: data.size] = data
    else:
        data = like(data, buf)
        buf.detach()[: data.numel()].copy_(data)


def reduce_(total: Any, part: Any, op: Op) -> None:
    """Replace `total` by `total op part`."""
    if isinstance(total, np.ndarray):
        if not isinstance(part, np.ndarray):
            part = part.detach().cpu().numpy()
        _UFUNCS[op](total, part, out=total)
    else:
        function = getattr(sys.modules["torch"], _TORCH_OPS[op])
        function(total, like(part, total), out=total)


def like(data: Any, tensor: Any) -> Any:
    """Return `data` as a tensor where `tensor` lies, without gradient."""
    if isinstance(data, np.ndarray):
        data = sys.modules["torch"].from_numpy(data)
    return data.detach().to(tensor.device)
