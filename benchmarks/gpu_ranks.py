"""The sections of gpu.py with several ranks on one card: strategies, messages."""

from __future__ import annotations

import traceback
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_single import make_batches
from gpu_common import Rows, goal

from mpilm.doctor.cuda_aware import Verdict, cuda_verdict
from mpilm.learner.learner import Learner
from mpilm.models.lstm_lm import LstmLm
from mpilm.strategies import STRATEGIES, strategy
from mpilm.world.base import IN_PLACE
from mpilm.world.mpi import MpiWorld, abort_on_error
from mpilm.world.mpi.world import start_mpi

MOST_OVERHEAD = 0.05  # of a step at default periods: issue E
MEASURED_S = 0.8  # of each strategy, about
MOST_STEPS = 100
# those that exchange in the background come last: one that fails may leave threads
LAST = ("async_sgd", "adpsgd")


def finish(world: MpiWorld, device: str) -> None:
    """Let the card finish on all ranks."""
    if device != "cpu":
        torch.cuda.synchronize()
    world.comm.Barrier()


def make_learner(args: Any, world: MpiWorld, device: str) -> Learner:
    """Return a language model of 14 million parameters."""
    from argparse import Namespace

    V, H, B, T = (60, 8, 2, 3) if args.smoke else (10_000, 512, 32, 35)
    torch.manual_seed(1)
    model = LstmLm(V, embed=H, hidden=H, layers=2)
    sgd = partial(torch.optim.SGD, lr=0.1, fused=True)
    batches = make_batches(Namespace(vocab=V, batch=B, unroll=T))
    return Learner(model, batches, sgd, compute=world.compute, device=device, flat=True)


def step_s(args: Any, world: MpiWorld, device: str, name: str) -> dict[str, Any]:
    """Return the seconds of a step of a strategy, and what it communicated.

    As many steps as take MEASURED_S, in whole periods; a slow strategy takes fewer.
    """
    learner = make_learner(args, world, device)
    chosen = strategy(name, world)
    chosen.start(learner)
    period = getattr(chosen.config, "period", 1)
    began_s = world.now_s()
    warmup, tried = (0, 1) if args.smoke else (period + 2, 4)
    for step in range(warmup + tried):
        if step == warmup:  # before it, buffers are allocated and pinned
            finish(world, device)
            began_s = world.now_s()
        chosen.step(learner)
    finish(world, device)
    guess_s = max(world.comm.allgather(world.now_s() - began_s)) / tried
    num = min(MOST_STEPS, max(4, round(MEASURED_S / guess_s)))
    num = -(-(2 if args.smoke else num) // period) * period
    traffic = world.traffic
    before = traffic.blocked_s, traffic.in_flight_s, traffic.bytes_sent
    began_s = world.now_s()
    for _ in range(num):
        chosen.step(learner)
    if device != "cpu":
        torch.cuda.synchronize()
    mine_s = world.now_s() - began_s
    blocked_s = traffic.blocked_s - before[0]
    in_flight_s = traffic.in_flight_s - before[1]
    sent = traffic.bytes_sent - before[2]
    chosen.finish(learner)
    finish(world, device)
    all_s = world.comm.allgather(mine_s)
    hidden = 1.0 - min(1.0, blocked_s / in_flight_s) if in_flight_s else 0.0
    return {
        "s": max(all_s) / num,
        "steps": num,
        "blocked": blocked_s / mine_s,
        "overlap": hidden,
        "MB": sent / num / 1e6,
    }


def strategies(args: Any, path: Path) -> None:
    """A step of each strategy over one of `local`, all ranks on one card.

    `local` is measured first and last: the card is shared, and may be warm or not.
    """
    with MpiWorld() as world, abort_on_error(world):
        device = world.device("cuda" if args.device == "cuda" else "cpu")
        add = Rows(path, speaks=world.rank == 0)
        step_s(args, world, device, "local")  # the card warms up
        first = step_s(args, world, device, "local")["s"]
        add(variant="local, first", **{"ms": 1e3 * first})
        chosen = [n for n in STRATEGIES if n not in LAST and n != "local"]
        for name in (*chosen, *LAST):
            try:
                found = step_s(args, world, device, name)
            except Exception as error:  # alike on all ranks, we hope: the rest goes on
                traceback.print_exc()
                add(variant=name, error=f"{type(error).__name__}: {error}"[:200])
                continue
            over = found["s"] / first - 1.0
            columns = {"ms": 1e3 * found["s"], "over local": over}
            columns |= {k: found[k] for k in ("steps", "blocked", "overlap")}
            columns |= {"MB sent": found["MB"], **goal(over, most=MOST_OVERHEAD)}
            add(variant=name, **columns)
        last = step_s(args, world, device, "local")["s"]
        add(variant="local, last", **{"ms": 1e3 * last})


def timed(world: MpiWorld, device: str, call: Any, num: int) -> float:
    """Return the seconds of a call, the slowest rank's."""
    for _ in range(2):
        call()
    finish(world, device)
    began_s = world.now_s()
    for _ in range(num):
        call()
    if device != "cpu":
        torch.cuda.synchronize()
    return max(world.comm.allgather(world.now_s() - began_s)) / num


def messages(args: Any, path: Path) -> None:
    """An exchange and a reduction of 2 ranks: host, staged, direct."""
    with MpiWorld() as world, abort_on_error(world):
        device = world.device("cuda" if args.device == "cuda" else "cpu")
        add = Rows(path, speaks=world.rank == 0)
        verdict = Verdict(True, "tensors on the CPU")
        if device != "cpu":
            found = cuda_verdict(start_mpi()) if world.rank == 0 else None
            verdict = next(v for v in world.comm.allgather(found) if v)
        add(direct="yes" if verdict.is_aware else "no", why=verdict.why)
        ways = {"host": "cpu", "staged": device}
        if verdict.is_aware:
            ways["direct"] = device
        sizes = (4096,) if args.smoke else (4096, 1 << 18, 1 << 22, 1 << 26)
        other, comm = 1 - world.rank, world.comm
        for size in sizes:
            row: dict[str, Any] = {"bytes": size}
            num = 2 if args.smoke else max(5, min(100, (1 << 27) // size))
            for way, where in ways.items():
                world.resources.staging.direct = ""
                if way == "direct":
                    if where == "cpu":
                        world.resources.staging.direct = "cpu"
                    else:
                        world.take_gpu_buffers(where)
                send = torch.ones(size // 4, device=where)
                receive = torch.zeros_like(send)

                def exchange(send: Any = send, receive: Any = receive) -> None:
                    comm.Sendrecv(send, other, 5, receive, other, 5)

                def reduce(send: Any = send) -> None:
                    comm.Allreduce(IN_PLACE, send)

                took = {"exchange": exchange, "allreduce": reduce}
                for name, call in took.items():
                    seconds = timed(world, where, call, num)
                    row[f"{name}, {way} (us)"] = 1e6 * seconds
                row[f"{way} right"] = bool((receive == 1.0).all())
            add(**row)
        world.resources.staging.direct = ""
