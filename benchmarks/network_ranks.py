"""One rank of a run of bench_network.py: trains until it is ended, keeps its model.

    mpirun -n 4 python benchmarks/network_ranks.py --series bmuf --lr 0.01 --folder F

Two kinds of loops, the same model, minibatches, optimiser (torch's AdamW, clipped) and
snapshots: a strategy of mpilm over MPI, and torch.distributed over gloo (`TORCH`).
Models are copied between two steps at growing distances of time, and written to F with
what it took so far; nobody waits for that, and nothing else is sent.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mpilm.data.batch import Batch
from mpilm.data.streams import Streams
from mpilm.learner.learner import Learner
from mpilm.models.lstm_lm import LstmLm
from mpilm.optim.build import build_optimizer
from mpilm.optim.configs import AdamwConfig
from mpilm.strategies import find_strategy
from mpilm.world.base import World

VOCAB, EMBED, HIDDEN = 65, 32, 224  # 247,873 parameters, 0.99 MB
BATCH, UNROLL = 8, 20
PERIOD = 10  # of torch's averager and of every strategy that has one
FIRST_S, GROWTH = 0.2, 1.04  # between two snapshots

TORCH: dict[str, dict[str, Any]] = {
    "ddp": {"bucket_cap_mb": 25},  # torch's default: its first bucket has 1 MB
    "ddp, 0.25 MB": {"bucket_cap_mb": 0.25},
    "ddp, fp16": {"bucket_cap_mb": 25, "hook": True},
    "torch averager": {},
    "torch averager, 40": {"period": 40},
}
STRATEGIES: dict[str, tuple[str, dict[str, Any]]] = {
    "local": ("local", {}),
    "model_averaging": ("model_averaging", {}),
    "model_averaging, 40": ("model_averaging", {"period": 40}),
    "bmuf": ("bmuf", {}),
    "gossip_bmuf": ("gossip_bmuf", {}),
    "adpsgd": ("adpsgd", {}),
    "sparse_loco": ("sparse_loco", {}),
    "noloco": ("noloco", {}),
    "hierarchical": ("hierarchical", {"inner": "bmuf", "settings": {"period": PERIOD}}),
    "allreduce": ("allreduce", {}),
    "allreduce, 0.05 MB": ("allreduce", {"bucket_bytes": 50_000}),
    "delay_by_one": ("delay_by_one", {}),
    "async_sgd": ("async_sgd", {}),
    "dpsgd": ("dpsgd", {}),
    "gossip_pga": ("gossip_pga", {}),
    "sgp": ("sgp", {}),
    "sparta": ("sparta", {}),
    "des_loc": ("des_loc", {}),
    "eager_diloco": ("eager_diloco", {}),
    "eager_diloco, 0.9": ("eager_diloco", {"eta": 0.9, "zeta": 0.7}),
    "divshare": ("divshare", {}),
}
ALIKE = ("allreduce", "ddp")  # every rank has the same model after each step


@dataclass
class Snapshots:
    """What a rank leaves in a folder: RANK-NUMBER.npy, and a line of RANK.jsonl."""

    folder: Path
    rank: int
    model: nn.Module
    counts: Callable[[], dict[str, float]]
    began_s: float = field(default_factory=time.monotonic)
    began_cpu_s: float = field(default_factory=time.process_time)
    due_s: float = FIRST_S
    number: int = 0

    def poll(self, step: int) -> None:
        """Keep the model if it is time."""
        now_s = time.monotonic() - self.began_s
        if now_s < self.due_s:
            return
        with torch.no_grad():
            theta_P = nn.utils.parameters_to_vector(self.model.parameters()).numpy()
        np.save(self.folder / f"{self.rank}-{self.number}.npy", theta_P)
        line = {
            "number": self.number,
            "s": now_s,
            "step": step,
            "cpu_s": time.process_time() - self.began_cpu_s,
            **self.counts(),
        }
        with (self.folder / f"{self.rank}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        self.number += 1
        self.due_s = now_s + max(FIRST_S, (GROWTH - 1.0) * now_s)


class Windows(Streams):
    """Minibatches that begin with a carried state of 0, as those that judge do."""

    def draw(self) -> Batch:
        """Return the next one."""
        return super().draw()._replace(start=True)


def model_of(seed: int) -> LstmLm:
    """Return the first model of a seed."""
    torch.manual_seed(seed)
    return LstmLm(VOCAB, embed=EMBED, hidden=HIDDEN)


class Choice:
    """The optimiser of both kinds of loops."""

    name = "adamw"

    def __init__(self, lr: float) -> None:
        self.settings = AdamwConfig(lr=lr, clip=1.0)


def turns(args: argparse.Namespace) -> Iterator[int]:
    """Yield the numbers of steps: until the process is ended, or so many."""
    return iter(range(1, args.steps + 1)) if args.steps else itertools.count(1)


def begun(world: World, series: str, tokens: Any, args: Any) -> tuple[Any, Learner]:
    """Return a strategy that has started, and its learner.

    Args:
        args: lr and seed.

    Communicates: collective.
    """
    name, settings = STRATEGIES[series]
    kind = find_strategy(name)
    keys = kind.Config.__dataclass_fields__
    own = {"period": PERIOD} if "period" in keys else {}
    own |= {"seed": args.seed} if "seed" in keys else {}
    chosen = kind(world, kind.Config(**{**own, **settings}))
    learner = Learner(
        model_of(args.seed),
        Windows(tokens, BATCH, UNROLL, world.rank, world.size),
        build_optimizer(Choice(args.lr)),
        compute=world.compute,
    )
    chosen.require(learner)
    chosen.start(learner)
    return chosen, learner


def mpilm_rank(args: argparse.Namespace) -> None:
    """Train by a strategy of mpilm."""
    from mpilm.world.mpi import MpiWorld, abort_on_error

    with MpiWorld() as world, abort_on_error(world):
        chosen, learner = begun(world, args.series, np.load(args.tokens), args)

        def counts() -> dict[str, float]:
            traffic = world.traffic
            return {"blocked_s": traffic.blocked_s, "bytes": traffic.bytes_sent}

        world.comm.Barrier()
        kept = Snapshots(args.folder, world.rank, learner.model, counts)
        for step in turns(args):
            chosen.step(learner)
            kept.poll(step)
        chosen.retire(learner)
        chosen.finish(learner)


class Loss(nn.Module):
    """LstmLm with its loss as the output, which is what DDP wants."""

    def __init__(self, model: LstmLm) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Any) -> torch.Tensor:
        """Return the mean cross-entropy of a minibatch."""
        inputs, targets = map(torch.from_numpy, (batch.inputs, batch.targets))
        tensors = {"inputs": inputs, "targets": targets}
        return self.model.loss(batch._replace(**tensors))


def torch_rank(args: argparse.Namespace) -> None:
    """Train under DistributedDataParallel, or with PeriodicModelAverager."""
    import torch.distributed as dist
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
    from torch.distributed.algorithms.model_averaging.averagers import (
        PeriodicModelAverager,
    )
    from torch.nn.parallel import DistributedDataParallel

    from mpilm.learner.malloc import keep_freed_memory

    keep_freed_memory()  # as a Learner does
    rank = int(os.environ["OMPI_COMM_WORLD_RANK"])
    size = int(os.environ["OMPI_COMM_WORLD_SIZE"])
    os.environ["GLOO_SOCKET_IFNAME"] = args.interface
    store = dist.FileStore(str(args.folder / "store"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    batches = Windows(np.load(args.tokens), BATCH, UNROLL, rank, size)
    model = model_of(args.seed)
    trained: nn.Module = Loss(model)
    averager = None
    options = dict(TORCH[args.series])
    period = options.pop("period", PERIOD)
    if options:
        has_hook = options.pop("hook", False)
        ddp = DistributedDataParallel(trained, gradient_as_bucket_view=True, **options)
        if has_hook:
            ddp.register_comm_hook(None, default_hooks.fp16_compress_hook)
        trained = ddp
    else:
        averager = PeriodicModelAverager(period=period)
    optimizer = build_optimizer(Choice(args.lr))(list(model.parameters()))
    dist.barrier()
    kept = Snapshots(args.folder, rank, model, dict)
    for step in turns(args):
        optimizer.zero_grad()
        trained(batches.next()).backward()
        optimizer.step()
        if averager is not None:
            averager.average_parameters(model.parameters())
        kept.poll(step)
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    arguments.add_argument("--series", required=True, choices=[*TORCH, *STRATEGIES])
    arguments.add_argument("--lr", type=float, default=0.01)
    arguments.add_argument("--seed", type=int, default=1)
    arguments.add_argument("--steps", type=int, default=0, help="0: until it is ended")
    arguments.add_argument("--tokens", type=Path, required=True, help=".npy, to train")
    arguments.add_argument("--folder", type=Path, required=True)
    arguments.add_argument("--interface", default="eth0", help="of gloo")
    args = arguments.parse_args()
    torch.set_num_threads(1)
    (torch_rank if args.series in TORCH else mpilm_rank)(args)


if __name__ == "__main__":
    main()
