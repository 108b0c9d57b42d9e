"""mpilm: MPI-based training of LSTM language models and acoustic models.

Importing this package imports neither torch nor mpi4py; the names below load what
they need when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.2.0"

_EXPORTS = {
    "fit": "mpilm.own.fit",
    "load_model": "mpilm.own.fit",
    "evaluate_mean": "mpilm.train.evaluate",
    "Learner": "mpilm.learner.learner",
    "MpiWorld": "mpilm.world.mpi",
    "run_mpi": "mpilm.world.mpi",
    "run_virtual": "mpilm.world.virtual",
    "Machine": "mpilm.world.machine",
    "Faults": "mpilm.world.faults",
    "strategy": "mpilm.strategies",
    "STRATEGIES": "mpilm.strategies",
    "MpilmError": "mpilm.errors",
}
__all__ = [*_EXPORTS, "__version__"]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'mpilm' has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)
