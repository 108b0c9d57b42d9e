"""What the benchmarks of the strategies share: variants, runs of them, mpirun, plots.

`run` is one rank's part of a run and the same in both worlds. With a `ProtocolLearner`
in an `MpiWorld(step_s=...)` the computing is a sleep, messages and strategy are real:
a machine of 2 cores then tells how strategies wait, up to the ranks that it can hold.
"""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harness import one_group

from mpilm.learner.quadratic import ProtocolLearner
from mpilm.simulate.scaled import scaled_settings
from mpilm.strategies import find_strategy
from mpilm.train.signals import Agreement
from mpilm.world.base import World
from mpilm.world.faults import Faults
from mpilm.world.machine import Machine
from mpilm.world.virtual import Simulation, VirtualWorld

sys.path.insert(0, str(Path(__file__).parents[1]))
from tools.emulated_cluster import EmulatedCluster

# name of a row -> strategy and its settings; the rest as they are by default
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "local": ("local", {}),
    "allreduce": ("allreduce", {}),
    "model_averaging": ("model_averaging", {}),
    "bmuf": ("bmuf", {}),
    "gossip_bmuf": ("gossip_bmuf", {}),
    "dpsgd": ("dpsgd", {}),
    "delay_by_one": ("delay_by_one", {}),
    "adpsgd, fixed_ring": ("adpsgd", {"mixing": "fixed_ring"}),
    "adpsgd, random_ring": ("adpsgd", {"mixing": "random_ring"}),
    "adpsgd, random_pairs": ("adpsgd", {"mixing": "random_pairs"}),
    "async_sgd": ("async_sgd", {}),
}
FURTHER: dict[str, tuple[str, dict[str, Any]]] = {  # where they are asked for
    "async_sgd, ahead": ("async_sgd", {"ahead": True}),
    "async_sgd, 16 servers": ("async_sgd", {"servers": 16}),
}
ENVIRONMENT = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMP_NUM_THREADS": "1",
}


@dataclass(frozen=True)
class Run:
    """What one rank did; without its warm-up."""

    steps: int
    seconds: float
    blocked_s: float
    bytes_sent: int
    cpu_s: float  # of this process: of all ranks, if they are virtual

    @property
    def step_s(self) -> float:
        """Seconds of one step."""
        return self.seconds / self.steps

    @property
    def waiting(self) -> float:
        """Share of the time that the learner waited for communication."""
        return self.blocked_s / self.seconds


class Deadline:
    """A wish to stop that a `Agreement` asks for: when a time has come."""

    def __init__(self, world: World, seconds: float) -> None:
        self.world, self.end_s = world, world.now_s() + seconds

    @property
    def requested(self) -> str | None:
        """Why to stop, or None."""
        return "time" if self.world.now_s() >= self.end_s else None


def run(
    world: World,
    variant: str,
    learner: Any,
    *,
    steps: int = 0,
    seconds: float = 0.0,
    warmup: int = 0,
    scale: float = 1.0,
    after_step: Callable[[], None] | None = None,
) -> Run:
    """Train `learner` for so many steps or seconds; return what this rank did.

    Out of lockstep a rank stops by its own clock. In lockstep all stop after the same
    step, by the `Agreement` that training uses, up to two strides after the time.

    Args:
        variant: of VARIANTS or FURTHER.
        scale: how many times smaller the learner is than the model it stands for.
        after_step: called after each step.

    Communicates: collective.
    """
    name, settings = (VARIANTS | FURTHER)[variant]
    kind = find_strategy(name)
    chosen = kind(world, scaled_settings(kind.Config(**settings), scale))
    chosen.require(learner)
    chosen.start(learner)
    for _ in range(warmup):
        chosen.step(learner)
    world.comm.Barrier()
    began_s, before = world.now_s(), replace(world.traffic)
    cpu_s = time.process_time()
    done = 0
    for _ in _turns(world, chosen, steps, seconds):
        chosen.step(learner)
        done += 1
        if after_step is not None:
            after_step()
    took_s, after = world.now_s() - began_s, replace(world.traffic)
    cpu_s = time.process_time() - cpu_s
    chosen.retire(learner)
    chosen.finish(learner)
    return Run(
        steps=done,
        seconds=took_s,
        blocked_s=after.blocked_s - before.blocked_s,
        bytes_sent=after.bytes_sent - before.bytes_sent,
        cpu_s=cpu_s,
    )


def _turns(world: World, chosen: Any, steps: int, seconds: float) -> Iterator[None]:
    """Yield once for each step to take."""
    if steps:
        yield from (None for _ in range(steps))
        return
    deadline: Any = Deadline(world, seconds)
    if not chosen.lockstep or chosen.name == "local":  # nobody waits for anybody
        while deadline.requested is None:
            yield
        return
    agreement = Agreement(world, every=chosen.pace.stride, request=deadline)
    step = 0
    while not agreement.stopped:
        yield
        step += 1
        agreement.poll(step)
    agreement.finish()


def sleeper(world: World, parameters: int) -> ProtocolLearner:
    """Return a learner without torch; how long it computes its world says."""
    return ProtocolLearner(parameters, compute=world.compute, seed=world.rank, lr=0.001)


def simulate(
    variant: str,
    ranks: int,
    *,
    machine: Machine,
    parameters: int,
    model_parameters: int,
    faults: Faults | None = None,
    seed: int = 0,
    **until: Any,
) -> list[Run]:
    """Return what every virtual rank did.

    Args:
        parameters: of the learner that runs.
        model_parameters: of the model that it stands for, on `machine`.
        until: steps or seconds, as of `run`.
    """
    scale = model_parameters / parameters

    def main(world: VirtualWorld) -> Run:
        learner = sleeper(world, parameters)
        return run(world, variant, learner, scale=scale, **until)

    played = machine.scaled(scale)
    return Simulation(ranks, machine=played, faults=faults, seed=seed).run(main)


def mpirun(
    ranks: int, script: str, arguments: Sequence[object], *, limit_s: float
) -> Any:
    """Return what rank 0 of `script` gave to `answer`; its screen is ours.

    Raises:
        RuntimeError: it failed, or took longer than `limit_s`; all its ranks are ended.
    """
    launcher = Path(sys.executable).with_name("mpirun")
    command = [str(launcher) if launcher.exists() else "mpirun"]
    version = subprocess.run(
        [*command, "--version"], capture_output=True, text=True, check=True
    )
    if "Open MPI" in version.stdout or "PRRTE" in version.stdout:
        command += ["--oversubscribe", "--bind-to", "none"]
    with one_group(), tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "answer.json"
        command += ["-n", str(ranks), sys.executable, script, *map(str, arguments)]
        command += ["--result", str(result)]
        environment = {**os.environ, **ENVIRONMENT}
        process = subprocess.Popen(command, env=environment, start_new_session=True)
        try:
            code = process.wait(limit_s)
        except BaseException:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(20)
            raise
        if code != 0:
            raise RuntimeError(f"{' '.join(command)}: exit code {code}")
        return json.loads(result.read_text())


@contextmanager
def launch(
    arguments: Sequence[object], nodes: int, rate: str, *, slots: int = 1
) -> Iterator[tuple[list[str], dict[str, str]]]:
    """Yield a command that runs `mpirun *arguments`, and its environment.

    The nodes are those of an emulated cluster that is there meanwhile; its ranks import
    what this process can.

    Args:
        nodes: of the cluster.
        rate: of each link; "": no cluster, all ranks on this machine.
        slots: of a node.
    """
    words = list(map(str, arguments))
    with one_group(), ExitStack() as stack:
        if rate:
            cluster = stack.enter_context(
                EmulatedCluster(nodes, rate=rate, slots=slots)
            )
            command, environment = cluster.command(words), cluster.environment
        else:
            mpirun = str(Path(sys.executable).with_name("mpirun"))
            command = [mpirun, "--oversubscribe", "--bind-to", "none", *words]
            environment = {**os.environ, **ENVIRONMENT}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        yield command, environment


def answer(world: World, result: Path, value: Any) -> None:
    """Hand `value` of rank 0 to the process that called `mpirun`."""
    if world.rank == 0:
        result.write_text(json.dumps(value))


def pss_bytes() -> int:
    """Return this process's memory, shared pages divided by those who share them."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/smaps_rollup has no line Pss")


@contextmanager
def figure(folder: Path | None, name: str, columns: int = 1) -> Iterator[Any]:
    """Yield axes in a row; save them as `folder`/`name`.png, without a folder nowhere.

    Needs matplotlib (`pip install mpilm[figures]`).
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawing, axes = pyplot.subplots(
        1, columns, figsize=(1.5 + 4.2 * columns, 3.8), squeeze=False
    )
    yield axes[0]
    drawing.tight_layout()
    target: Any = io.BytesIO()
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / f"{name}.png"
    drawing.savefig(target, dpi=110, bbox_inches="tight", metadata={"Software": None})
    pyplot.close(drawing)


def legend(axes: Any, columns: int = 3) -> None:
    """Put the legend below the axes, where it hides nothing, if there is a line."""
    if not axes.get_legend_handles_labels()[1]:
        return
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16)}
    axes.legend(fontsize=7, ncols=columns, frameon=False, **place)


def lines(
    axes: Any, rows: Sequence[Mapping[str, Any]], x: str, y: str, by: str = "strategy"
) -> None:
    """Draw a line of column `y` over column `x` for each value of column `by`."""
    for index, name in enumerate(dict.fromkeys(row[by] for row in rows)):
        points = [(row[x], row[y]) for row in rows if row[by] == name]
        marker = "osD^v<>Px*+"[index % 11]
        axes.plot(*zip(*points, strict=True), marker=marker, markersize=4, label=name)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
