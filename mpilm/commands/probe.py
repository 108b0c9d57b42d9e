"""`mpilm probe`."""

from __future__ import annotations

import socket
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from mpilm.doctor import measure
from mpilm.errors import ConfigError

if TYPE_CHECKING:
    from mpilm.config import Config

WARM_UP = 3  # steps that are not counted

# what to put where two ranks on a link were not there to measure it
NO_NETWORK = (
    "run probe with one rank on each of two nodes; until then put in",
    "latency_s: half of what ping says, seconds",
    "bandwidth_Bps: the network's bits per second / 8; of 1 Gbit/s 1.25e8",
)
NO_NODE = ("run probe with two ranks on a node",)


def probe(
    config: tyro.conf.Positional[Path],
    /,
    *,
    steps: int = 20,
    set_: Annotated[
        tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(name="set")
    ] = (),
) -> int:
    """Measure this machine under mpirun; print a [machine] section for `simulate`.

    Every rank computes the configured model's steps, all at the same time and without
    communication; then rank 0 exchanges messages with a rank on its node and with one
    on another node. What could not be measured is left out, with a comment.

    Args:
        config: TOML file: the model, the minibatch, the optimiser
        steps: minibatches to time on each rank
        set_: override a setting: section.key=value
    """
    from mpilm.config import read_config
    from mpilm.seeds import DROPOUT, derive
    from mpilm.train.run import make_learner
    from mpilm.train.task import open_task
    from mpilm.world.mpi.world import MpiWorld, abort_on_error, start_mpi

    settings: Config | None = None
    with MpiWorld() as world, abort_on_error(world):
        with world.all_or_none():
            if steps < 1:
                raise ConfigError(f"--steps {steps}: must be 1 or more")
            settings = read_config(config, set_)
            task = open_task(settings.data.corpus, settings.model)
            batches = task.batches(settings, world, lockstep=True)
            learner = make_learner(
                settings,
                task.num_inputs,
                task.num_outputs,
                batches,
                device=world.device(settings.train.device),
                seed=derive(DROPOUT, settings.train.seed, world.rank),
                compute=world.compute,
            )
        assert settings is not None
        batches.start()
        world.comm.Barrier()
        took = step_times(learner, steps)
        batches.close()
        everyone = world.comm.allgather(took)
        hosts = world.comm.allgather(socket.gethostname())
        device = learner.device.type
    # the world's threads are gone: they would call MPI beside the messages
    comm = start_mpi().COMM_WORLD
    near, far = measure.peers(comm, hosts)
    links = {
        name: measure.link(comm, peer) if peer is not None else None
        for name, peer in (("", far), ("node_", near))
    }
    if comm.rank == 0:
        print(machine_section(everyone, hosts, links, str(config), device))
    return 0


def step_times(learner: Any, steps: int) -> list[float]:
    """Return the seconds of each step: gradient and update, GPU included."""
    took = []
    for _ in range(WARM_UP + steps):
        start_s = measure.clock()
        float(learner.gradient())  # the loss: a GPU has to be done with it
        learner.update()
        if learner.device.type == "cuda":
            import torch

            torch.cuda.synchronize()
        took.append(measure.clock() - start_s)
    return took[WARM_UP:]


def machine_section(
    times: list[list[float]],
    hosts: list[str],
    links: dict[str, tuple[float, float] | None],
    config: str,
    device: str,
) -> str:
    """Return the section as TOML.

    Steps of the virtual world are uniform in (1 - jitter, 1 + jitter) times step_s: the
    middle half of them is jitter times step_s wide, and so it is measured. A few steps
    that something else disturbed count little.
    """
    flat = sorted(second for one in times for second in one)
    step_s = statistics.median(flat)
    num = len(flat)
    width = flat[min(num - 1, 3 * num // 4)] - flat[num // 4]
    jitter = min(1.0, width / step_s)
    nodes = {host: hosts.count(host) for host in hosts}
    lines = [
        "[machine]",
        f"# {len(hosts)} ranks on {len(nodes)} nodes ({device}), {config}",
        f"step_s = {step_s:.6g}",
        f"jitter = {jitter:.3f}",
        f"ranks_per_node = {max(nodes.values())}",
    ]
    for prefix, link in links.items():
        if link is None:
            where = "inside a node" if prefix else "between nodes"
            lines.append(f"# {prefix}latency_s, {prefix}bandwidth_Bps: no two ranks")
            lines[-1] += f" {where}"
            lines += [f"# {line}" for line in (NO_NODE if prefix else NO_NETWORK)]
            continue
        lines.append(f"{prefix}latency_s = {link[0]:.3g}")
        lines.append(f"{prefix}bandwidth_Bps = {link[1]:.4g}")
    return "\n".join(lines)
