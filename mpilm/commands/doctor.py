"""`mpilm doctor`."""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mpilm import __version__
from mpilm.doctor import children, facts, measure
from mpilm.doctor.container import check_container
from mpilm.doctor.cuda_aware import check_cuda_aware
from mpilm.doctor.findings import Finding, amount, duration, ok
from mpilm.doctor.folder import check_folder, check_shared_memory
from mpilm.doctor.scheduler import check_scheduler
from mpilm.launch import launched, launched_rank
from mpilm.train.screen import count

ENOUGH_OVERLAP = 0.5  # chosen, not tuned
SPEAK_FIRST_S = 2.0  # rank 0 tells of a hang before the others end the run


def doctor(
    *, folder: Path = Path("runs"), limit: float = 90.0, json: bool = False
) -> int:
    """Check this machine before a run: one line for each thing that may go wrong.

    Run it alone first, then as the run itself will be started: mpirun -n 8 mpilm
    doctor, inside the job. The exit code is 1 if there is a problem.

    Args:
        folder: where runs will be written
        limit: seconds after which a check is given up
        json: print one JSON object with all findings, in the place of lines
    """
    report = Report(limit_s=limit, as_json=json)
    if is_launched(os.environ):
        check_ranks(report, folder)
    else:
        check_alone(report, folder)
    return report.end()


def is_launched(environment: Mapping[str, str]) -> bool:
    """Return whether a launcher made this process a rank.

    One process that mpirun started is a rank; one of srun's may be a shell.

    >>> is_launched({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"})
    False
    >>> is_launched({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4"})
    True
    """
    alone = "OMPI_COMM_WORLD_RANK" in environment or (
        "PMI_RANK" in environment and "SLURM_STEP_NUM_TASKS" not in environment
    )
    return alone or launched(environment)[1] > 1


class Report:
    """Prints findings as they come; ends a check that hangs, and the process with it.

    limit_s  how long a check may take
    speaks   whether this is rank 0
    as_json  whether findings are printed as one JSON object at the end
    """

    def __init__(self, *, limit_s: float, as_json: bool = False) -> None:
        self.limit_s, self.as_json = limit_s, as_json
        self.findings: list[Finding] = []
        self.speaks = launched_rank() == 0
        self.counts = {"ok": 0, "warning": 0, "problem": 0}

    def add(self, finding: Finding) -> None:
        """Print a finding, or keep it for the end."""
        self.counts[finding.status] += 1
        self.findings.append(finding)
        if self.speaks and not self.as_json:
            print(finding, flush=True)

    def check(self, name: str, look: Callable[[], Finding | list[Finding]]) -> None:
        """Add what `look` finds; an exception and a hang are findings too."""
        with self.guarded(name):
            found = look()
            for finding in found if isinstance(found, list) else [found]:
                self.add(finding)

    @contextmanager
    def guarded(self, name: str) -> Iterator[None]:
        """Turn an exception into a finding, a hang into the end."""
        wait_s = self.limit_s + (0.0 if self.speaks else SPEAK_FIRST_S)
        timer = threading.Timer(wait_s, self.hung, [name])
        timer.daemon = True
        timer.start()
        try:
            yield
        except Exception as error:  # whatever it is, the doctor goes on
            text = " ".join(f"{type(error).__name__}: {error}".split())
            finding = Finding(name, "problem", text, "report this, please")
            if not self.speaks:
                print(f"on {socket.gethostname()}: {finding}", file=sys.stderr)
            self.add(finding)
        finally:
            timer.cancel()

    def hung(self, name: str) -> None:
        """End the process."""
        if self.speaks:
            text = f"no end after {self.limit_s:g} s"
            remedy = "a rank died, or a network that MPI chose does not work"
            self.add(Finding(name, "problem", text, remedy))
            if self.as_json:
                self.end()
        os._exit(1)

    def end(self) -> int:
        """Print the sums, or all as JSON; return the exit code."""
        if self.speaks and self.as_json:
            import json

            found = {
                "version": __version__,
                "host": socket.gethostname(),
                **self.counts,
                "findings": [asdict(finding) for finding in self.findings],
            }
            print(json.dumps(found, indent=1), flush=True)
        elif self.speaks:
            problems = count(self.counts["problem"], "problem")
            warnings = count(self.counts["warning"], "warning")
            print(f"\n{problems}, {warnings}, {self.counts['ok']} ok")
        return 1 if self.counts["problem"] else 0


def check_alone(report: Report, folder: Path) -> None:
    """Check what one process can; MPI starts in children only."""
    gpus, wrong = children.find_gpus()
    everyone = [facts.collect(0, gpus)]
    check_facts(report, everyone, wrong)
    report.check("MPI starts", children.check_start)
    report.check("mpirun", children.check_launcher)
    report.check("world", lambda: facts.check_world(1))
    if gpus:
        report.check("CUDA-aware MPI", check_cuda_aware)
        report.check("GPU to GPU", children.check_gpu_pair)
    report.check("run folder", lambda: check_folder(folder))
    report.check("container", lambda: check_container(""))
    report.check("scheduler", check_scheduler)


def check_facts(report: Report, everyone: list[facts.Facts], wrong: str) -> None:
    """Add the findings that facts are enough for."""
    for name, look in (
        ("Python", facts.check_python),
        ("packages", facts.check_packages),
        ("ranks per node", facts.check_nodes),
        ("cores", facts.check_binding),
        ("threads", facts.check_threads),
        ("GPUs", facts.check_gpus),
        ("clock", facts.check_clock),
    ):
        if name == "GPUs" and wrong:
            remedy = "install the build of torch for this GPU (CONTRIBUTING.md)"
            report.add(Finding(name, "problem", wrong, remedy))
        else:
            report.check(name, lambda look=look: look(everyone))  # type: ignore[misc]
    here = facts.hosts(everyone)[everyone[0].host]
    report.check("shared memory", lambda: check_shared_memory(len(here)))


def check_ranks(report: Report, folder: Path) -> None:
    """Check everything; every rank takes part."""
    from mpilm.world.mpi.world import MpiWorld, start_mpi

    report.check("container", lambda: check_container(mpi_library()))
    if report.counts["problem"] > 0:
        return  # MPI would abort, or every rank be alone
    mpi = None
    with report.guarded("MPI starts"):
        mpi = start_mpi()
    if mpi is None:
        return
    comm = mpi.COMM_WORLD
    report.check("MPI", lambda: check_library(mpi))
    report.check("threads of MPI", lambda: check_thread_level(mpi))
    report.check("world", lambda: facts.check_world(comm.size))
    if report.counts["problem"]:
        return  # ranks that do not see each other cannot check anything together
    with report.guarded("ranks"):
        # torch is slow to start: one process of a node asks it
        node = comm.Split_type(mpi.COMM_TYPE_SHARED, comm.rank)
        gpus, wrong = children.find_gpus() if node.rank == 0 else ([], "")
        masked = "CUDA_VISIBLE_DEVICES" in os.environ
        if masked and node.rank and children.may_have_gpu():
            gpus, wrong = children.find_gpus()  # each may see another
        elif not masked:
            gpus, wrong = node.bcast((gpus, wrong), 0)
        measure.settle(comm)
        everyone = comm.allgather(facts.collect(comm.rank, gpus))
        check_facts(report, everyone, wrong)
        report.check("run folder", lambda: check_folder(folder, comm))
        report.check("scheduler", check_scheduler)
        if comm.size > 1:
            hosts = [fact.host for fact in everyone]
            near, far = measure.peers(comm, hosts)
            for peer, what in ((near, "same node"), (far, "between nodes")):
                if peer is not None:
                    report.check(what, lambda p=peer, w=what: check_link(comm, p, w))  # type: ignore[misc]
            report.check("allreduce", lambda: check_allreduce(comm))
        if any(fact.gpus for fact in everyone):
            aware = check_cuda_aware() if comm.rank == 0 else None
            measure.settle(comm)
            report.add(comm.bcast(aware, 0))
    if comm.size > 1:
        peer = far if far is not None else near
        assert peer is not None
        plain = None
        with report.guarded("MPI progress"):
            # before there is a world: its thread moves the messages of all
            plain = measure.overlap(comm, peer, measure.busy)
            measure.settle(comm)
        with report.guarded("MPI progress"), MpiWorld() as world:
            report.add(check_progress(comm, world, peer, plain))
            if all(fact.gpus for fact in everyone):
                report.add(check_staging(comm, world, peer))


def mpi_library() -> str:
    """Return what the MPI library says of itself, without starting MPI."""
    import mpi4py

    mpi4py.rc.initialize = False
    mpi4py.rc.finalize = True  # or it would not be, however MPI is started later
    from mpi4py import MPI

    return MPI.Get_library_version()


def check_library(mpi: Any) -> Finding:
    """Which MPI is it?"""
    library = mpi.Get_library_version().split(",")[0].splitlines()[0].strip("\0 ")
    standard = ".".join(map(str, mpi.Get_version()))
    return ok("MPI", f"{library}, MPI {standard}")


def check_thread_level(mpi: Any) -> Finding:
    """May several threads call MPI at once?"""
    if mpi.Query_thread() >= mpi.THREAD_MULTIPLE:
        return ok("threads of MPI", "THREAD_MULTIPLE")
    return Finding(
        "threads of MPI",
        "warning",
        "no THREAD_MULTIPLE: no overlap, and adpsgd and async_sgd refuse to start",
        "use an MPI that was built with it (MPICH: --enable-threads=multiple)",
    )


def check_link(comm: Any, peer: int, name: str) -> Finding:
    """How fast are messages of rank 0 to `peer`?"""
    latency_s, bandwidth = measure.link(comm, peer)
    text = f"ranks 0 and {peer}: {duration(latency_s)}, {amount(bandwidth)}/s"
    return ok(name, text)


def check_allreduce(comm: Any) -> Finding:
    """How fast is a reduction over all ranks, at three sizes?"""
    parts = []
    for num_bytes in measure.ALLREDUCE_BYTES:
        seconds = measure.allreduce_s(comm, num_bytes)
        parts.append(f"{amount(num_bytes)} in {duration(seconds)}")
    return ok("allreduce", f"{comm.size} ranks: {', '.join(parts)}")


def check_progress(comm: Any, world: Any, peer: int, plain: float | None) -> Finding:
    """Do long messages go on while ranks compute?

    Args:
        plain: share that MPI moved by itself; on rank 0.
    """
    ours = measure.overlap(
        world.comm, peer, lambda s: world.compute(lambda _: measure.busy(s))
    )
    measure.settle(comm)
    plain, ours = comm.bcast((plain, ours), 0)
    text = f"beside computing, MPI alone moves {plain:.0%} of a long message"
    text += f", mpilm's progress thread {ours:.0%}"
    if ours >= ENOUGH_OVERLAP:
        return ok("MPI progress", text)
    return Finding(
        "MPI progress",
        "warning",
        text,
        "leave a core free beside the ranks; asynchronous strategies will wait",
    )


def check_staging(comm: Any, world: Any, peer: int) -> Finding:
    """How fast are messages between GPUs through pinned host memory?"""
    import torch

    took = measure.clock()
    if comm.rank in (0, peer):
        other = peer if comm.rank == 0 else 0
        buffer = torch.zeros(measure.LONG_BYTES // 4, device=world.device("cuda"))
        for turn in range(6):
            if turn == 2:  # two to warm up
                took = measure.clock()
            world.comm.Sendrecv(buffer, other, 5, torch.empty_like(buffer), other, 5)
    seconds = comm.bcast((measure.clock() - took) / 4, 0)
    measure.settle(comm)
    rate = amount(measure.LONG_BYTES / seconds)
    text = f"{rate}/s each way, both at once, through pinned host memory"
    return ok("GPU to GPU", text)
