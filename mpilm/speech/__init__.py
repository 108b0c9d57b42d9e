"""From audio to words: features, word HMMs, alignment, decoding, word error rate."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from mpilm.errors import MpilmError


def require(module: str, package: str) -> ModuleType:
    """Return a module of the extra `speech`.

    Raises:
        MpilmError: it is not installed; one line with the remedy.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise MpilmError(
            f"{package} is missing ({error}): pip install 'mpilm[speech]'"
        ) from None
