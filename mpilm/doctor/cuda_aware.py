"""May this MPI be given buffers on a GPU? Asked of the library, then tried in a child.

    1  what the environment switches on or off (Cray MPICH, MVAPICH)
    2  what the library says of itself: MPIX_GPU_query_support (MPICH and its kin),
       MPIX_Query_cuda_support (Open MPI, MVAPICH, MPICH)
    3  a message and a reduction of a process to itself, from GPU memory, in a child:
       a library that is wrong about itself crashes there, or hangs

Only a library that passes all three gets GPU memory.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpilm.doctor.children import python, trouble_in
from mpilm.doctor.findings import Finding, ok

PROBE = """
import torch
from mpi4py import MPI
send = torch.arange(1 << 20, dtype=torch.float32, device="cuda")
receive = torch.zeros_like(send)
torch.cuda.synchronize()
MPI.COMM_SELF.Sendrecv(send, 0, 0, receive, 0, 0)
MPI.COMM_SELF.Allreduce(MPI.IN_PLACE, receive)
torch.cuda.synchronize()
print("aware" if torch.equal(send, receive) else "wrong data")
"""
# library -> the variable that switches GPU buffers on, and what goes with it
SWITCHES = {
    "CRAY MPICH": ("MPICH_GPU_SUPPORT_ENABLED", "and load the module of its GPUs"),
    "MVAPICH2": ("MV2_USE_CUDA", "of a build with CUDA (MVAPICH2-GDR)"),
}
CUDA = 0  # MPIX_GPU_SUPPORT_CUDA
PROBE_S = 60.0


@dataclass(frozen=True)
class Verdict:
    """Whether MPI may be given buffers on a GPU, and why."""

    is_aware: bool
    why: str


def cuda_verdict(mpi: Any, environment: Mapping[str, str] = os.environ) -> Verdict:
    """Return whether this MPI may be given buffers on a GPU. Takes some seconds.

    Args:
        mpi: mpi4py's module MPI; MPI has started.
        environment: of this process.
    """
    library = name_of(mpi.Get_library_version())
    refused = switched_off(library, environment)
    if refused:
        return Verdict(False, refused)
    says = library_says(loaded_libraries())
    if says is False:
        return Verdict(False, f"{library} has no support for CUDA, as it says itself")
    code, text = python(PROBE, PROBE_S)
    if code == 0 and "aware" in text.splitlines():
        return Verdict(True, f"{library} takes buffers on the GPU, as a trial showed")
    why = f"died of signal {-code}" if code < 0 else trouble_in(text)
    said = "says that it can" if says else "does not say"
    return Verdict(False, f"{library} {said}, but a trial did not work: {why}")


def name_of(version: str) -> str:
    r"""Return name and number of an MPI library.

    >>> name_of("Open MPI v5.0.11, package: Open MPI user@host")
    'Open MPI v5.0.11'
    >>> name_of("MPI VERSION    : CRAY MPICH version 8.1.28.29 (ANL base 3.4a2)\n...")
    'CRAY MPICH version 8.1.28.29'
    >>> name_of("MPICH Version:      5.0.2\nMPICH Release date: Fri\n")
    'MPICH Version: 5.0.2'
    """
    first = version.partition(",")[0].splitlines()[0]
    line = " ".join(first.strip("\0 ").split())
    return line.removeprefix("MPI VERSION : ").partition(" (")[0]


def switched_off(library: str, environment: Mapping[str, str]) -> str:
    """Return why a library that has a switch for GPU buffers takes none now, or "".

    >>> switched_off("CRAY MPICH version 8.1.28", {"MPICH_GPU_SUPPORT_ENABLED": "1"})
    ''
    >>> switched_off("Open MPI v5.0.11", {})
    ''
    """
    for name, (variable, more) in SWITCHES.items():
        is_off = environment.get(variable, "0") in {"0", ""}
        if library.upper().startswith(name) and is_off:
            return f"{library} takes none before export {variable}=1, {more}"
    return ""


def loaded_libraries() -> list[str]:
    """Return the files of the MPI libraries that this process has loaded."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:  # not Linux: no CUDA either
        return []
    files = (line.split(maxsplit=5)[5:] for line in maps.splitlines())
    found = {file[0] for file in files if file}
    return sorted(f for f in found if Path(f).name.startswith("libmpi"))


def library_says(files: Iterable[str]) -> bool | None:
    """Return whether a library says that it takes buffers on a GPU; None: it is mute.

    Args:
        files: where it may be; it is loaded already.
    """
    for file in files:
        library = ctypes.CDLL(file)
        query = getattr(library, "MPIX_GPU_query_support", None)
        if query is not None:
            answer = ctypes.c_int(0)
            if query(ctypes.c_int(CUDA), ctypes.byref(answer)) == 0:
                return bool(answer.value)
        query = getattr(library, "MPIX_Query_cuda_support", None)
        if query is not None:
            return bool(query())
    return None


def check_cuda_aware() -> Finding:
    """May MPI be given buffers on the GPU? In a child of its own."""
    code, text = python(
        f"from {__name__} import print_verdict; print_verdict()", 2 * PROBE_S
    )
    answer, _, why = text.partition(": ")
    if code == 0 and answer == "yes":
        return ok("CUDA-aware MPI", f'{why}: world.gpu_messages = "auto" uses it')
    if code or answer != "no":
        why = f"died of signal {-code}" if code < 0 else trouble_in(text)
    return ok("CUDA-aware MPI", f"no: {why}; messages go through pinned host memory")


def print_verdict() -> None:
    """Print the verdict on the MPI that mpi4py finds."""
    from mpi4py import MPI

    verdict = cuda_verdict(MPI)
    print(f"{'yes' if verdict.is_aware else 'no'}: {verdict.why}", flush=True)
