"""What every rank knows of itself, and what the ranks' facts together say.

The checks of this page are functions of the facts alone, in the order of ranks.
"""

from __future__ import annotations

import os
import platform
import socket
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version

from mpilm.doctor.findings import Finding, ok, some

NEEDED = ("torch", "numpy", "mpi4py", "h5py", "greenlet", "msgspec", "tyro", "rich")
OPTIONAL = ("matplotlib", "safetensors", "kaldiio", "kaldi-native-fbank", "jiwer")
OLDEST_PYTHON = (3, 10)
SKEW_S = 1.0  # between clocks of nodes; file times and logs get confusing beyond


@dataclass(frozen=True)
class Facts:
    """What one rank knows of itself.

    cores       ids of the cores that it may use
    host_cores  cores of the host
    threads     OMP_NUM_THREADS; None: not set
    gpus        names of the GPUs that it sees, in its order
    gpu_ids     CUDA_VISIBLE_DEVICES; None: not set
    time_s      wall clock, read at about the same moment on all ranks
    """

    rank: int = 0
    host: str = "host"
    cores: tuple[int, ...] = (0,)
    host_cores: int = 1
    threads: str | None = None
    python: str = ""
    packages: dict[str, str] = field(default_factory=dict)
    gpus: tuple[str, ...] = ()
    gpu_ids: str | None = None
    time_s: float = 0.0


def collect(rank: int, gpus: Sequence[str]) -> Facts:
    """Return the facts of this process."""
    return Facts(
        rank=rank,
        host=socket.gethostname(),
        cores=tuple(sorted(os.sched_getaffinity(0))),
        host_cores=os.cpu_count() or 1,
        threads=os.environ.get("OMP_NUM_THREADS"),
        python=f"{platform.python_version()} ({sys.executable})",
        packages=installed((*NEEDED, *OPTIONAL, "mpilm")),
        gpus=tuple(gpus),
        gpu_ids=os.environ.get("CUDA_VISIBLE_DEVICES"),
        time_s=time.time(),
    )


def installed(names: Sequence[str]) -> dict[str, str]:
    """Return name -> version of those packages that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def hosts(facts: Sequence[Facts]) -> dict[str, list[Facts]]:
    """Return host -> its ranks."""
    found: dict[str, list[Facts]] = defaultdict(list)
    for fact in facts:
        found[fact.host].append(fact)
    return dict(found)


def check_python(facts: Sequence[Facts]) -> Finding:
    """Is Python new enough, and the same everywhere?"""
    pythons = Counter(fact.python for fact in facts)
    first = facts[0].python
    if len(pythons) > 1:
        return Finding(
            "Python",
            "problem",
            f"{len(pythons)} different ones: {some(pythons, 3)}",
            "activate the same environment on all nodes (an absolute path in the job)",
        )
    if sys.version_info[:2] < OLDEST_PYTHON:
        return Finding("Python", "problem", first, "Python 3.10 or newer is needed")
    return ok("Python", first)


def check_packages(facts: Sequence[Facts]) -> Finding:
    """Are the packages there, with the same versions everywhere?"""
    first = facts[0].packages
    for fact in facts:
        missing = [name for name in NEEDED if name not in fact.packages]
        if missing:
            return Finding(
                "packages",
                "problem",
                f"rank {fact.rank} on {fact.host} lacks {', '.join(missing)}",
                "pip install mpilm there, or activate the right environment",
            )
        if fact.packages != first:
            names = sorted(first.keys() | fact.packages.keys())
            name = next(n for n in names if first.get(n) != fact.packages.get(n))
            return Finding(
                "packages",
                "problem",
                f"rank 0 has {name} {first.get(name)}, rank {fact.rank} on {fact.host}"
                f" has {fact.packages.get(name)}",
                "use the same environment on all nodes",
            )
    shown = ", ".join(f"{name} {first[name]}" for name in ("mpilm", *NEEDED[:4]))
    absent = [name for name in OPTIONAL if name not in first]
    return ok("packages", shown + (f"; without {', '.join(absent)}" if absent else ""))


def check_world(size: int, environment: Mapping[str, str] = os.environ) -> Finding:
    """Does MPI see as many ranks as somebody started or asked for?

    >>> print(check_world(1, {"OMPI_COMM_WORLD_SIZE": "4"}).status)
    problem
    """
    from mpilm.errors import WorldError
    from mpilm.launch import check_launch

    try:
        check_launch(size, environment)
    except WorldError as error:
        what, _, remedy = str(error).partition(": ")
        return Finding("world", "problem", what, remedy)
    asked = environment.get("SLURM_NTASKS", "")
    if size == 1 and asked.isdecimal() and int(asked) > 1:
        return Finding(
            "world",
            "warning",
            f"one rank in a SLURM job of {asked} tasks",
            f"mpirun -n {asked} mpilm doctor",
        )
    if size == 1:
        return ok("world", "one rank; under mpirun -n 2 this command measures more")
    return ok("world", f"{size} ranks")


def check_nodes(facts: Sequence[Facts]) -> Finding:
    """Do all nodes have the same number of ranks?"""
    counts = {host: len(ranks) for host, ranks in hosts(facts).items()}
    if len(set(counts.values())) > 1:
        shown = some([f"{count} on {host}" for host, count in counts.items()])
        return Finding(
            "ranks per node",
            "warning",
            f"not the same everywhere: {shown}",
            "--ntasks-per-node (SLURM), mpiprocs (PBS), --map-by ppr:N:node (mpirun)",
        )
    return ok(
        "ranks per node",
        f"{len(facts) // len(counts)} on each of {len(counts)}: {some(counts)}",
    )


def check_binding(facts: Sequence[Facts]) -> Finding:
    """Has every rank cores of its own?"""
    for host, ranks in hosts(facts).items():
        together = set().union(*(fact.cores for fact in ranks))
        if len(together) < len(ranks):
            return Finding(
                "cores",
                "warning",
                f"{host}: {len(ranks)} ranks share {len(together)} cores"
                f" (of {ranks[0].host_cores})",
                "start fewer ranks, or ask for more cores per task",
            )
        if len(ranks) == 1 or all(set(fact.cores) == together for fact in ranks):
            continue  # one rank, or not bound: the kernel spreads them
        for first, second in clashes(ranks):
            return Finding(
                "cores",
                "problem",
                f"{host}: ranks {first.rank} and {second.rank} are bound to the same"
                f" core {min(set(first.cores) & set(second.cores))}",
                "mpirun --bind-to none, or --map-by slot:PE=N --bind-to hwthread",
            )
    first = facts[0]
    shown = f"rank 0 may use {len(first.cores)} of {first.host_cores} on {first.host}"
    alone = all(len(ranks) == 1 for ranks in hosts(facts).values())
    bound = any(
        set(fact.cores) != set(ranks[0].cores)
        for ranks in hosts(facts).values()
        for fact in ranks
    )
    how = "" if alone else "; each rank its own" if bound else "; not bound"
    return ok("cores", shown + how)


def clashes(ranks: Sequence[Facts]) -> list[tuple[Facts, Facts]]:
    """Return pairs of ranks of a host that may use the same core."""
    owner: dict[int, Facts] = {}
    found = []
    for fact in ranks:
        for core in fact.cores:
            if core in owner:
                found.append((owner[core], fact))
            owner[core] = fact
    return found


def check_threads(facts: Sequence[Facts]) -> Finding:
    """Do the threads of a host's ranks fit on its cores?"""
    settings = {fact.threads for fact in facts}
    if None in settings:
        rank = next(fact.rank for fact in facts if fact.threads is None)
        return Finding(
            "threads",
            "warning",
            f"OMP_NUM_THREADS is not set on rank {rank}: libraries take all cores",
            "export OMP_NUM_THREADS=1 (mpirun -x OMP_NUM_THREADS across nodes)",
        )
    for host, ranks in hosts(facts).items():
        numbers = [str(fact.threads).split(",")[0] for fact in ranks]
        if not all(n.isdecimal() and int(n) > 0 for n in numbers):
            return Finding(
                "threads",
                "problem",
                f"{host}: OMP_NUM_THREADS={numbers[0]} is no number",
                "export OMP_NUM_THREADS=1",
            )
        wanted = sum(map(int, numbers))
        cores = len(set().union(*(fact.cores for fact in ranks)))
        if wanted > max(cores, len(ranks)):  # too many ranks are another finding
            return Finding(
                "threads",
                "warning",
                f"{host}: {len(ranks)} ranks with {some(sorted(set(numbers)))} threads"
                f" each on {cores} cores",
                f"export OMP_NUM_THREADS={max(1, cores // len(ranks))}",
            )
    return ok("threads", f"OMP_NUM_THREADS={some(sorted(filter(None, settings)))}")


def check_gpus(facts: Sequence[Facts]) -> Finding:
    """Has every rank a GPU of its own?"""
    if not any(fact.gpus for fact in facts):
        return ok("GPUs", "none is visible: ranks compute on the CPU")
    for host, ranks in hosts(facts).items():
        counts = {len(fact.gpus) for fact in ranks}
        if counts & {0} or len(counts) > 1:
            return Finding(
                "GPUs",
                "problem",
                f"{host}: ranks see {some(sorted(counts))} GPUs",
                "give all ranks the same --gpus-per-node (SLURM) or ngpus (PBS)",
            )
        number = counts.pop()
        # with a list of its own for each rank, GPU 0 is another one for each
        own = len({fact.gpu_ids for fact in ranks}) == len(ranks)
        if len(ranks) > number and not own:
            return Finding(
                "GPUs",
                "warning",
                f"{host}: {len(ranks)} ranks share {number} GPUs",
                f"start {number} ranks per node",
            )
    first = facts[0]
    placed = [
        f"rank {fact.rank} cuda:{i % len(fact.gpus)}"
        for i, fact in enumerate(hosts(facts)[first.host])
    ]
    return ok("GPUs", f"{len(first.gpus)} x {first.gpus[0]}: {some(placed)}")


def check_clock(facts: Sequence[Facts]) -> Finding:
    """Do the nodes agree what time it is?"""
    times = [fact.time_s for fact in facts]
    spread_s = max(times) - min(times)
    resolution_s = time.get_clock_info("perf_counter").resolution
    if spread_s > SKEW_S:
        late = facts[times.index(min(times))]
        return Finding(
            "clock",
            "warning",
            f"wall clocks differ by {spread_s:.1f} s ({late.host} is the last)",
            "run a time service (chrony, ntpd) on all nodes",
        )
    text = f"resolution {resolution_s * 1e9:.0f} ns"
    if len(hosts(facts)) > 1:
        text += f", wall clocks within {spread_s:.2f} s"
    return ok("clock", text)
