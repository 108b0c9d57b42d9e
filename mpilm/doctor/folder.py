"""Can runs be written where they shall be?"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from mpilm.doctor.findings import Finding, amount, ok, some
from mpilm.storage.files import reason

LITTLE_BYTES = 1e9  # a few checkpoints of a large model; chosen, not tuned
SHARED_MEMORY = Path("/dev/shm")
LITTLE_SHARED_BYTES = 128e6  # containers often have 64 MB; MPI wants some per rank


def existing(folder: Path) -> Path:
    """Return `folder`, or the nearest folder above it that exists."""
    folder = folder.absolute()
    return next((p for p in (folder, *folder.parents) if p.is_dir()), Path("/"))


def try_to_write(folder: Path, name: str) -> str:
    """Return why no file can be written into `folder`; "" if one can."""
    path = folder / name
    try:
        path.write_bytes(b"mpilm doctor\n")
    except OSError as error:
        return reason(error)
    return ""


def check_folder(folder: Path, comm: Any = None) -> list[Finding]:
    """Is it writable, shared by all nodes, and is there space?

    Args:
        comm: of mpi4py; None: there is one rank.
    """
    place = existing(folder)
    rank = comm.rank if comm else 0
    name = f".mpilm-doctor-{os.getpid()}-{rank}"
    try:
        why = try_to_write(place, name)
        results = comm.allgather((why, name)) if comm else [(why, name)]
        seen = (place / results[0][1]).exists()
        all_see = comm.allgather(seen) if comm else [seen]  # and nobody removes before
    finally:
        with suppress(OSError):
            (place / name).unlink()
    failed = [(rank, why) for rank, (why, _) in enumerate(results) if why]
    if failed:
        rank, why = failed[0]
        return [
            Finding(
                "run folder",
                "problem",
                f"{place}: rank {rank} cannot write: {why}",
                "name another with --folder, and --out of train",
            )
        ]
    blind = [rank for rank, saw in enumerate(all_see) if not saw]
    if blind:
        return [
            Finding(
                "run folder",
                "problem",
                f"{place}: what rank 0 writes, ranks {some(blind)} do not see",
                "runs must be on a file system that all nodes share",
            )
        ]
    free = shutil.disk_usage(place).free
    if free < LITTLE_BYTES:
        return [
            Finding(
                "run folder",
                "warning",
                f"{place}: only {amount(free)} are free",
                "make space, or lower checkpoint.keep",
            ),
            check_locking(place),
        ]
    return [
        ok("run folder", f"{place}: writable, {amount(free)} free"),
        check_locking(place),
    ]


def check_locking(folder: Path) -> Finding:
    """Does HDF5's file locking work here? mpilm does without; other readers may not."""
    import h5py

    path = folder / f".mpilm-doctor-{os.getpid()}.h5"
    try:
        with h5py.File(path, "w", locking=True) as file:
            file["x"] = 1
        with h5py.File(path, "r", locking=True):
            pass
    except OSError as error:
        return Finding(
            "HDF5 locking",
            "warning",
            f"does not work in {folder}: {reason(error)}",
            "export HDF5_USE_FILE_LOCKING=FALSE for other programs; mpilm needs none",
        )
    finally:
        with suppress(OSError):
            path.unlink()
    return ok("HDF5 locking", f"works (HDF5 {h5py.version.hdf5_version})")


def check_shared_memory(num_ranks: int) -> Finding:
    """Is there room for the shared memory of the ranks of this node?"""
    try:
        total = shutil.disk_usage(SHARED_MEMORY).total
    except OSError as error:
        text = f"{SHARED_MEMORY}: {reason(error)}"
        return Finding("shared memory", "warning", text, "mount a tmpfs there")
    if num_ranks > 1 and total < LITTLE_SHARED_BYTES:
        return Finding(
            "shared memory",
            "warning",
            f"{SHARED_MEMORY} has only {amount(total)}",
            "docker run --shm-size=1g, or --ipc=host",
        )
    return ok("shared memory", f"{SHARED_MEMORY} has {amount(total)}")
