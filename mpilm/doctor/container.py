"""In a container: does its MPI fit the launcher that started the ranks outside?

The launcher of the host starts the container once for each rank; it and the library
inside find each other by what the launcher puts into the environment. Libraries of
another family see nothing there, and each rank is a world of its own.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from mpilm.doctor.findings import Finding, ok

NAME = "container"
KINDS = {  # variable that a container's program sets -> its name
    "APPTAINER_CONTAINER": "Apptainer",
    "SINGULARITY_CONTAINER": "Singularity",
    "container": "a container",  # podman, systemd-nspawn
}


def check_container(
    library: str,
    environment: Mapping[str, str] = os.environ,
    exists: Callable[[str], bool] = lambda path: Path(path).exists(),
) -> Finding:
    """Return whether launcher and library belong together; both may be in it.

    Args:
        library: what MPI says of itself; "": it has not been started.

    >>> inside = {"APPTAINER_CONTAINER": "/mpilm.sif", "OMPI_VERSION": "5.0.11"}
    >>> print(check_container("MPICH Version: 5.0.2", inside))
    problem  container        Apptainer /mpilm.sif; Open MPI 5.0.11 started MPICH 5.0.2
             -> the MPI of the host, same family and first number, inside the container
    """
    place = next(
        (
            f"{kind} {environment[key]}"
            for key, kind in KINDS.items()
            if key in environment
        ),
        "Docker" if exists("/.dockerenv") else "",
    )
    if not place:
        return ok(NAME, "none")
    outside, inside = launcher_of(environment), library_of(library)
    if not outside or not inside:
        return ok(NAME, f"{place}; no launcher outside has started it")
    text = f"{place}; {' '.join(outside).strip()} started {' '.join(inside).strip()}"
    firsts = [version.partition(".")[0] for _, version in (outside, inside)]
    if outside[0] != inside[0]:
        status = "problem"
    elif "" not in firsts and firsts[0] != firsts[1]:
        status = "warning"
    else:
        return ok(NAME, text)
    remedy = "the MPI of the host, same family and first number, inside the container"
    return Finding(NAME, status, text, remedy)  # type: ignore[arg-type]


def launcher_of(environment: Mapping[str, str]) -> tuple[str, str] | tuple[()]:
    """Return family and version of what started this rank; "": it does not say which.

    MPICH, Intel MPI and Cray start each other's ranks: all of them are "MPICH".
    """
    if "OMPI_COMM_WORLD_RANK" in environment or "OMPI_VERSION" in environment:
        return "Open MPI", environment.get("OMPI_VERSION", "")
    return ("MPICH", "") if "PMI_RANK" in environment else ()


def library_of(text: str) -> tuple[str, str] | tuple[()]:
    """Return family and version of a library by what it says of itself.

    >>> library_of("Open MPI v5.0.11, package: Open MPI root"), library_of("")
    (('Open MPI', '5.0.11'), ())
    """
    found = re.search(r"\d+(\.\d+)+", text)
    version = found[0] if found else ""
    if "Open MPI" in text:
        return "Open MPI", version
    is_alike = any(word in text for word in ("MPICH", "Intel(R) MPI", "MVAPICH"))
    return ("MPICH", version) if is_alike else ()
