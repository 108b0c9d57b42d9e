"""Does MPI take buffers on a GPU? What a library says is asked of real libraries."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mpilm.doctor.cuda_aware import library_says, switched_off
from mpilm.world.mpi.staging import capacity

OPEN_MPI = "int MPIX_Query_cuda_support(void) { return %d; }"
MPICH = "int MPIX_GPU_query_support(int kind, int *is) { *is = %d; return %d; }"


def library(folder: Path, source: str) -> str:
    """Return a shared library of a C source."""
    (folder / "mpi.c").write_text(source)
    file = folder / "libmpi_of_test.so"
    command = ["gcc", "-shared", "-fPIC", "-o", str(file), str(folder / "mpi.c")]
    subprocess.run(command, check=True)
    return str(file)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (OPEN_MPI % 1, True),
        (OPEN_MPI % 0, False),
        (MPICH % (1, 0), True),
        (MPICH % (0, 0), False),
        (MPICH % (1, 1) + OPEN_MPI % 0, False),  # it failed: the other one is asked
        ("int MPI_Init(void) { return 0; }", None),
    ],
)
def test_a_library_is_asked(tmp_path: Path, source: str, says: bool | None) -> None:
    assert library_says([library(tmp_path, source)]) is says


def test_cray_and_mvapich_have_a_switch() -> None:
    cray = "CRAY MPICH version 8.1.28.29"
    assert "export MPICH_GPU_SUPPORT_ENABLED=1" in switched_off(cray, {})
    assert switched_off(cray, {"MPICH_GPU_SUPPORT_ENABLED": "0"})
    assert not switched_off(cray, {"MPICH_GPU_SUPPORT_ENABLED": "1"})
    assert "export MV2_USE_CUDA=1" in switched_off("MVAPICH2 2.3.7", {})
    assert not switched_off("MVAPICH2 2.3.7", {"MV2_USE_CUDA": "1"})
    assert not switched_off("MPICH Version: 5.0.2", {})


@pytest.mark.long
def test_a_library_that_is_wrong_about_itself_gets_no_gpu_memory(
    tmp_path: Path,
) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("the trial may work here: tests/mpi/test_cuda.py")
    program = (
        "import ctypes, sys; from mpilm.doctor.cuda_aware import cuda_verdict\n"
        "class Mpi:\n"
        "    Get_library_version = staticmethod(lambda: 'Another MPI 1.0')\n"
        "ctypes.CDLL(sys.argv[1]); print(cuda_verdict(Mpi))\n"
    )
    file = library(tmp_path, OPEN_MPI % 1)
    command = [sys.executable, "-c", program, file]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "is_aware=False" in said
    assert "says that it can, but a trial did not work" in said


def test_pinned_buffers_come_in_few_lengths() -> None:
    sizes = range(1, 20_000)
    lengths = [capacity(size) for size in sizes]
    assert all(s <= n <= s + s // 8 + 1 for s, n in zip(sizes, lengths, strict=True))
    assert all(capacity(n) == n for n in lengths)  # a buffer goes back where it was
    assert len(set(lengths)) < 8 * 12 + 16
