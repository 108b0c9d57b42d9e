"""Memory that is freed stays with the process.

A training step on a CPU takes and frees the same few megabytes again and again
(logits, gradients). The C library hands blocks of that size back to the kernel, and
the next step gets them page by page, each page cleared: a tenth of a step
(docs/benchmarks.md).
"""

from __future__ import annotations

import ctypes

# <malloc.h> of the GNU C library
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3

# Larger blocks still go back at once: such a block is rare in a step on a CPU, and may
# be the only one of its kind (a model that is loaded). Chosen, not tuned.
KEPT_BYTES = 256 << 20


def keep_freed_memory() -> bool:
    """Have the C library keep freed memory for the next block; return whether it does.

    It holds for the whole process from now on. The process grows to the size that it
    reached at its peak, and stays there. Only the GNU C library is asked.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    never = 2**31 - 1
    return bool(
        mallopt(M_MMAP_THRESHOLD, KEPT_BYTES) and mallopt(M_TRIM_THRESHOLD, never)
    )
