"""`mpilm probe`."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from mpilm.errors import ConfigError
from mpilm.strategies.base import ITEM_BYTES

if TYPE_CHECKING:
    from mpilm.config import Config

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

    Every rank computes the configured model's steps, all at the same time: without
    communication, then by the configured strategy. Then all exchange and reduce
    messages as long as the model, inside a node and between nodes. What could not be
    measured is left out, with a comment.

    Args:
        config: TOML file: the model, the minibatch, the optimiser
        steps: minibatches to time on each rank
        set_: override a setting: section.key=value
    """
    from mpilm.config import read_config
    from mpilm.seeds import DROPOUT, derive
    from mpilm.simulate.calibrate import (
        calibrate,
        evaluation_s,
        own_step_s,
        spread,
        step_times,
    )
    from mpilm.strategies import find_strategy
    from mpilm.train.run import make_learner
    from mpilm.train.task import open_task
    from mpilm.world.mpi.world import MpiWorld, abort_on_error

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
            kind = find_strategy(settings.strategy.name)
            strategy = kind(world, settings.strategy.settings)
            strategy.require(learner)
        batches.start()
        world.comm.Barrier()
        everyone = world.comm.allgather(step_times(learner, steps))
        step_s, jitter = spread([gradients for gradients, _ in everyone])
        update_s, _ = spread([updates for _, updates in everyone])
        own_s = own_step_s(world, strategy, learner, steps)
        eval_s = 0.0
        if "valid" in task.evaluated(settings.train):
            split = task.evaluation("valid", settings.train, world.rank, world.size)
            eval_s = spread(world.comm.allgather([evaluation_s(learner, split)]))[0]
        batches.close()
        hosts = world.comm.allgather(socket.gethostname())
        model_bytes = ITEM_BYTES * learner.layout.size
        costs = calibrate(world, hosts, model_bytes=model_bytes, step_s=step_s)
        computing = {
            "step_s": step_s,
            "jitter": jitter,
            "update_s": update_s,
            "mix_s": max(0.0, own_s - step_s - update_s),
            "eval_s": eval_s,
        }
        where = f"{learner.device.type}, {settings.strategy.name}), {config}"
        if world.rank == 0:
            print(machine_section(computing, costs, hosts, where))
    return 0


def machine_section(
    computing: dict[str, float],
    costs: dict[str, float],
    hosts: list[str],
    where: str,
) -> str:
    """Return the section as TOML."""
    nodes = {host: hosts.count(host) for host in hosts}
    lines = [
        "[machine]",
        f"# {len(hosts)} ranks on {len(nodes)} nodes ({where}",
        *(f"{key} = {value:.4g}" for key, value in computing.items()),
        f"ranks_per_node = {max(nodes.values())}",
    ]
    for prefix in ("", "node_"):
        if f"{prefix}latency_s" not in costs:
            level = "inside a node" if prefix else "between nodes"
            lines.append(f"# {prefix}latency_s, {prefix}bandwidth_Bps: no two ranks")
            lines[-1] += f" {level}"
            lines += [f"# {line}" for line in (NO_NODE if prefix else NO_NETWORK)]
    lines += [
        f"{key} = {value}" if isinstance(value, int) else f"{key} = {value:.4g}"
        for key, value in costs.items()
    ]
    return "\n".join(lines)
