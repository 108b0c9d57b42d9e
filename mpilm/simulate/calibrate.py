"""What messages and collectives cost here, as the keys of a [machine].

Notation    t(n) -> seconds of a call with n bytes, as a strategy would make it
            n -> the bytes of a model
Links       every rank exchanges with one on another node (on its node) at once:
            L = t(8),   n/B = (t(three of n) - t(n)) / 2     what lasts        (1)
            R - burst_bytes / B = t(n) - L - n/B      one of them: above or below 0
                                                                               (2)
Collectives of all ranks (of a node's), K of them:
            E  = t(barrier) / ceil(log2 K) - L                                 (3)
            L' = (t(8) - ceil(log2 K) E) / r                                   (4)
            (2 (K-1)/K n - burst_bytes) / B'
               = t(n) - ceil(log2 K) E - 2 (K-1) L'                            (5)

E, R, L', B', r as in world/machine.py. The calls are those of the world, with
its threads and pauses, and all ranks make them at once: that is how a strategy finds
them.
Leaders     the same once more with one rank of each node, the others at rest.
Long messages are as long as the model, for no library takes a time that is linear in n;
and every rank has just updated them: they lie in its core's cache, and where ranks
share cores they come from that one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import islice
from statistics import mean, median
from typing import Any

import numpy as np

from mpilm.doctor.measure import clock
from mpilm.strategies.base import Strategy
from mpilm.vectors import finish_kernels
from mpilm.world.base import IN_PLACE, Comm, World
from mpilm.world.machine import rounds_of_doubling, rounds_up

SHORT_BYTES, LEAST_BYTES, MOST_BYTES = 8, 1 << 15, 1 << 24
AT_ONCE = 3
NOISE = 0.1  # of a time that may be noise: what is left of it is at least as much
WARM_UP, ROUNDS = 2, 7
EVALUATED = 20  # minibatches of a split; chosen, not tuned


def calibrate(
    world: World, hosts: Sequence[str], *, model_bytes: int, step_s: float
) -> dict[str, float]:
    """Return the costs that two ranks are there to measure, as keys of [machine].

    Args:
        hosts: name of the node of each rank.
        model_bytes: of the messages that strategies send.
        step_s: pause before each call: strategies come from computing, and a link has
            rested.

    Communicates: collective; messages of up to 16 MiB; blocking.
    """
    node = world.comm.Split_node()
    n = min(MOST_BYTES, max(LEAST_BYTES, model_bytes))
    most = max(hosts.count(host) for host in hosts)
    found: dict[str, float] = {}
    if len(set(hosts)) > 1:
        found |= _level(world, world.comm, far_partners(hosts), n, step_s)
    if most > 1 and len(set(hosts)) > 1:
        found |= _of_leaders(world, hosts, node.rank, n, step_s)
    if most > 1:  # nodes with fewer ranks than others measure along
        ring = [(rank + 1) % node.size for rank in range(node.size)]
        inside = _level(world, node, ring, n, step_s, has_burst=False)
        full = world.comm.allgather((node.size == most, inside))
        inside = next(costs for is_full, costs in full if is_full)
        del inside["burst_bytes"]  # memory has none
        found |= {f"node_{key}": value for key, value in inside.items()}
    return found


def _of_leaders(
    world: World, hosts: Sequence[str], number: int, n: int, pause_s: float
) -> dict[str, float]:
    """Return the costs of a group with one rank of each node, alone on its link.

    Args:
        number: of this rank on its node.
    """
    leaders = world.comm.Split(None if number else 0)
    costs: dict[str, float] = {}
    if leaders is not None:
        ring = [(rank + 1) % leaders.size for rank in range(leaders.size)]
        costs = _level(world, leaders, ring, n, pause_s)
        del costs["burst_bytes"]  # the link's, measured with all ranks
    known = world.comm.allgather(costs)
    return {f"leader_{key}": value for key, value in max(known, key=len).items()}


def far_partners(hosts: Sequence[str]) -> list[int]:
    """Return whom each rank sends to: a permutation, to another node where it can be.

    >>> far_partners(["a", "a", "b", "b"])
    [2, 3, 0, 1]
    >>> far_partners(["a", "a", "b"])  # rank 1 sends to itself: it has no partner
    [2, 1, 0]
    """
    most = max(hosts.count(host) for host in hosts)
    order = sorted(range(len(hosts)), key=lambda rank: (hosts[rank], rank))
    partners = [0] * len(hosts)
    for place, rank in enumerate(order):
        partners[rank] = order[(place + most) % len(order)]
    if all(hosts[a] != hosts[b] for a, b in enumerate(partners)):
        return partners
    first, other = 0, next(r for r, host in enumerate(hosts) if host != hosts[0])
    swapped = {first: other, other: first}
    return [swapped.get(rank, rank) for rank in range(len(hosts))]


def _level(
    world: World,
    comm: Comm,
    partners: Sequence[int],
    n: int,
    pause_s: float,
    *,
    has_burst: bool = True,
) -> dict[str, float]:
    """Return the costs of one level."""
    rank, size = comm.rank, comm.size
    if size == 1:  # a node with one rank beside nodes with several
        return {}
    to, source = partners[rank], partners.index(rank)
    send, *receive = (np.ones(n // 4, np.float32) for _ in range(1 + AT_ONCE))

    def update() -> None:
        for mine in (send, receive[0]):
            np.multiply(receive[1], 1.0, out=mine)

    def exchange(num_bytes: int, times: int = 1) -> None:
        length = num_bytes // 4
        pending = [comm.Isend(send[:length], to) for _ in range(times)]
        pending += [comm.Irecv(x[:length], source) for x in receive[:times]]
        for request in pending:
            request.Wait()

    def reduce(num_bytes: int) -> None:
        comm.Allreduce(IN_PLACE, receive[0][: num_bytes // 4])

    def t(call: Callable[..., None], *args: int) -> float:
        idle = call is exchange and to == rank
        act = (lambda: None) if idle else partial(call, *args)
        is_long = bool(args) and args[0] > SHORT_BYTES
        before = update if is_long and not idle else None
        return seconds(world, comm, act, pause_s, idle=idle, before=before)

    latency_s, whole_s = t(exchange, SHORT_BYTES), t(exchange, n)
    further_s = (t(exchange, n, AT_ONCE) - whole_s) / (AT_ONCE - 1)
    speed_Bps = n / max(NOISE * whole_s, further_s)  # (1)
    late_s = whole_s - latency_s - n / speed_Bps  # (2)
    up, steps = rounds_up(size), 2 * (size - 1)
    enter_s = max(0.0, t(comm.Barrier) / up - latency_s)  # (3)
    entered_s = t(reduce, SHORT_BYTES) - up * enter_s
    round_s = max(1e-9, entered_s / rounds_of_doubling(size))  # (4)
    moved_bytes = steps / size * n
    # what one message seems to take less may be noise: memory has no burst
    burst_bytes = max(0.0, -late_s) * speed_Bps if has_burst else 0.0
    burst_bytes = round(min(burst_bytes, (1.0 - NOISE) * moved_bytes))
    long_s = t(reduce, n)
    moving_s = max(NOISE * long_s, long_s - up * enter_s - steps * round_s)
    return {
        "latency_s": latency_s,
        "bandwidth_Bps": speed_Bps,
        "rendezvous_s": max(0.0, late_s),
        "burst_bytes": burst_bytes,
        "enter_s": enter_s,
        "reduce_latency_s": round_s,
        "reduce_Bps": (moved_bytes - burst_bytes) / moving_s,  # (5)
    }


def seconds(
    world: World,
    comm: Comm,
    call: Callable[[], object],
    pause_s: float,
    *,
    idle: bool = False,
    before: Callable[[], object] | None = None,
) -> float:
    """Return how long a call takes, the same on all ranks: their mean.

    Of ROUNDS rounds without the quickest and the slowest: a disturbance counts little,
    but TCP is now quick and now slow, and a run of steps finds both.

    Args:
        pause_s: before each call.
        before: what a rank comes from, after the pause.
        idle: this rank has no part in it.

    Communicates: collective.
    """
    took = []
    for _ in range(WARM_UP + ROUNDS):
        comm.Barrier()
        world.sleep(pause_s)
        if before is not None:
            before()
        start_s = world.now_s()
        call()
        took.append(world.now_s() - start_s)
    everyone = [
        times for times in comm.allgather([] if idle else took[WARM_UP:]) if times
    ]
    means = sorted(sum(one) / len(everyone) for one in zip(*everyone, strict=True))
    return float(mean(means[1:-1]))


def step_times(learner: Any, steps: int) -> tuple[list[float], list[float]]:
    """Return the seconds of each gradient and of each update, GPU included."""
    took: tuple[list[float], list[float]] = ([], [])
    for _ in range(WARM_UP + steps):
        for seconds_, call in zip(
            took, (learner.gradient, learner.update), strict=True
        ):
            start_s = clock()
            call()
            finish_kernels()
            seconds_.append(clock() - start_s)
    return took[0][WARM_UP:], took[1][WARM_UP:]


def evaluation_s(learner: Any, batches: Iterable[Any]) -> float:
    """Return the seconds of evaluating a sample: of some minibatches, GPU included."""
    some = list(islice(batches, WARM_UP + EVALUATED))
    warm_up, counted = some[:WARM_UP], some[WARM_UP:] or some
    learner.evaluate(warm_up)
    start_s = clock()
    num_samples = learner.evaluate(counted).num_targets
    finish_kernels()
    return (clock() - start_s) / max(1, num_samples)


def own_step_s(world: World, strategy: Strategy, learner: Any, steps: int) -> float:
    """Return the seconds of a strategy's step in which the learner does not wait.

    The same on all ranks, their mean. Of it what a step of `local` takes is computing;
    the rest is the strategy's own: sums, copies, filters, starting messages.

    Communicates: as the strategy does; collective.
    """
    strategy.require(learner)
    strategy.start(learner)
    for _ in range(WARM_UP):
        strategy.step(learner)
    began_s, blocked_s = world.now_s(), world.traffic.blocked_s
    for _ in range(steps):
        strategy.step(learner)
    own_s = world.now_s() - began_s - (world.traffic.blocked_s - blocked_s)
    strategy.retire(learner)
    strategy.finish(learner)
    return sum(world.comm.allgather(own_s)) / world.size / steps


def spread(times: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Return the median of steps of all ranks, and their jitter.

    Steps of the virtual world are uniform in (1 - jitter, 1 + jitter) times step_s: the
    middle half of them is jitter times step_s wide, and so it is measured. A few steps
    that something else disturbed count little.

    >>> spread([[1.0, 1.1], [0.9, 1.0, 1.0]])
    (1.0, 0.0)
    """
    flat = sorted(second for one in times for second in one)
    step_s, num = median(flat), len(flat)
    width = flat[min(num - 1, 3 * num // 4)] - flat[num // 4]
    return step_s, min(1.0, width / step_s)
