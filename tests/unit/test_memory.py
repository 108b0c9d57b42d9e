"""Memory that is freed stays with the process."""

import resource
import subprocess
import sys

import pytest

from mpilm.learner.malloc import keep_freed_memory

# Three blocks that glibc would take from the kernel and give back, each time anew.
FAULTS = """
import ctypes, resource, sys
from mpilm.learner.malloc import keep_freed_memory

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]

def use():
    blocks = [libc.malloc(40 << 20) for _ in range(3)]
    for block in blocks:
        ctypes.memset(block, 1, 40 << 20)
    for block in blocks:
        libc.free(block)

if sys.argv[1] == "keep":
    keep_freed_memory()
use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode: str) -> int:
    command = [sys.executable, "-c", FAULTS, mode]
    return int(subprocess.run(command, capture_output=True, check=True).stdout)


@pytest.mark.long
def test_freed_blocks_are_used_again_without_page_faults():
    if not keep_freed_memory():
        pytest.skip("this C library has no mallopt")
    num_pages = 3 * (40 << 20) // resource.getpagesize()
    assert faults("keep") < num_pages / 100
    assert faults("leave") > num_pages / 100
