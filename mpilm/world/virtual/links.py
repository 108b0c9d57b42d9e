"""The link of a node that its ranks share: who sends has an even share of it.

    rank 0  |== 1 ==|2 |      1 and 3 have half of the link each, then 2 has all of it:
    rank 1  |== 3 ==|         a rank sends one message after the other

Only where ranks share one (`Machine.shares_link`); others have ports of their own, and
so has every rank inside its node. There is one object a node and direction.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable

from mpilm.world.machine import Machine
from mpilm.world.virtual.engine import NETWORK, Engine, RankState

ROUNDING_BYTES = 1e-3  # flows of which less is left have passed


class Flow:
    """The bytes of a message on a link.

    left_bytes  of it, that have not passed yet
    most_Bps    its bandwidth if it is alone
    after_s     when the port of its rank is free of collectives, as it was put
    """

    after_s = 0.0

    def __init__(
        self,
        num_bytes: float,
        most_Bps: float,
        *,
        begun: Callable[[], None] | None = None,
        passed: Callable[[], None],
    ) -> None:
        self.left_bytes, self.most_Bps = num_bytes, most_Bps
        self.begun, self.passed = begun, passed


class SharedLink:
    """One direction of the link of a node.

    queues   of each rank the flows that have not passed; the first one passes
    passing  the first ones of all ranks; all have had their share until `since_s`
    """

    def __init__(self, engine: Engine, machine: Machine, port: str) -> None:
        self.engine, self.port = engine, port
        self.rank_Bps = machine.bandwidth_Bps
        self.whole_Bps = machine.bandwidth_Bps * machine.ranks_per_node
        self.burst_bytes = machine.burst_bytes
        self.queues: dict[int, deque[Flow]] = defaultdict(deque)
        self.rested_since_s: dict[int, float] = {}
        self.passing: list[tuple[RankState, Flow]] = []
        self.since_s = 0.0
        self.plan = 0  # the last one; it counts
        self.first: tuple[RankState, Flow]

    def put(self, state: RankState, flow: Flow) -> None:
        """Let the bytes of a rank pass after those that it has put before."""
        flow.after_s = getattr(state, self.port)
        queue = self.queues[state.rank]
        queue.append(flow)
        if len(queue) == 1:
            self._begin(state)

    def free_s(self, rank: int) -> float:
        """Return when all that a rank has put has passed, as it looks now."""
        num_ranks = sum(map(bool, self.queues.values()))
        free_s = self.since_s
        for flow in self.queues[rank]:
            free_s = max(free_s, flow.after_s)
            free_s += flow.left_bytes / self._speed_Bps(flow, num_ranks)
        return free_s

    def _speed_Bps(self, flow: Flow, num_ranks: int) -> float:
        return min(flow.most_Bps, self.whole_Bps / num_ranks)

    def _begin(self, state: RankState) -> None:
        """Let the first flow of a rank pass, once its time has come."""
        flow, now_s = self.queues[state.rank][0], self.engine.now_s
        if flow.after_s > now_s:
            self.engine.at(flow.after_s, NETWORK, self._begin, state)
            return
        self._pass()
        if self.burst_bytes:
            rested_s = now_s - self.rested_since_s.get(state.rank, -1e9)
            flow.left_bytes -= min(self.burst_bytes, rested_s * self.rank_Bps)
        self.passing.append((state, flow))
        if flow.begun is not None:
            flow.begun()
        self._plan()

    def _pass(self) -> None:
        """Let everybody have had his share until now."""
        passed_s = self.engine.now_s - self.since_s
        for _, flow in self.passing:
            flow.left_bytes -= passed_s * self._speed_Bps(flow, len(self.passing))
        self.since_s = self.engine.now_s

    def _plan(self) -> None:
        """Announce who has passed first, as it looks now."""
        self.plan += 1
        if self.passing:
            self.first = min(self.passing, key=lambda one: self._left_s(one[1]))
            end_s = self.engine.now_s + max(0.0, self._left_s(self.first[1]))
            self.engine.at(end_s, NETWORK, self._end, self.plan)

    def _left_s(self, flow: Flow) -> float:
        return flow.left_bytes / self._speed_Bps(flow, len(self.passing))

    def _end(self, plan: int) -> None:
        """Take out who has passed; the next flows of their ranks begin."""
        if plan != self.plan:
            return  # somebody has begun or ended meanwhile
        self._pass()
        self.first[1].left_bytes = 0.0
        ended = [one for one in self.passing if one[1].left_bytes <= ROUNDING_BYTES]
        self.passing = [one for one in self.passing if one not in ended]
        for state, flow in ended:
            self.queues[state.rank].popleft()
            self.rested_since_s[state.rank] = self.engine.now_s
            flow.passed()
        for state, _ in ended:
            if self.queues[state.rank]:
                self._begin(state)
        self._plan()
