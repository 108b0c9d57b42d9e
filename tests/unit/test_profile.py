"""Traces of several ranks become one timeline."""

from __future__ import annotations

from mpilm.train.profile import merged


def trace(rank: int, host: str, base_s: int, mark_s: float, events: list) -> dict:
    """Return a rank's trace; its process is 50 + rank."""
    about = {"rank": rank, "host": host, "pid": 50 + rank, "mark_us": mark_s * 1e6}
    named = [{"ph": "M", "pid": 50 + rank, "name": "process_name", "args": {}}]
    named += [{"ph": "M", "pid": gpu, "name": "thread_name"} for gpu in range(4)]
    base_ns = base_s * 1_000_000_000
    return {
        "mpilm": about,
        "baseTimeNanoseconds": base_ns,
        "traceEvents": named + events,
    }


def spans(timeline: dict) -> dict:
    """Return (process, name) -> time, of what lasts."""
    events = timeline["traceEvents"]
    return {(e["pid"], e["name"]): e["ts"] for e in events if e["ph"] == "X"}


def test_ranks_of_a_host_share_a_clock_whatever_their_traces_count_from() -> None:
    # rank 0 computes at 1000.5 s, rank 1 at 1000.25 s
    first = trace(0, "a", 1000, 0.0, [{"ph": "X", "name": "c", "pid": 50, "ts": 5e5}])
    other = trace(
        1, "a", 990, 9.0, [{"ph": "X", "name": "c", "pid": 51, "ts": 1.025e7}]
    )
    found = spans(merged([other, first]))
    assert found == {(0, "c"): 250_000.0, (1000, "c"): 0.0}


def test_another_hosts_clock_is_set_by_the_barrier() -> None:
    # the clock of b is 7 s ahead: the barrier ended at 100 s and at 107 s
    first = trace(0, "a", 100, 100.0, [{"ph": "X", "name": "c", "pid": 50, "ts": 1e6}])
    other = trace(1, "b", 107, 107.0, [{"ph": "X", "name": "c", "pid": 51, "ts": 3e6}])
    assert spans(merged([first, other])) == {(0, "c"): 0.0, (1000, "c"): 2e6}


def test_processes_and_arrows_of_ranks_stay_apart() -> None:
    def events(pid: int) -> list:
        arrow = {"name": "ac2g", "id": 3, "ts": 1.0}
        return [
            {"ph": "s", "pid": pid, **arrow},
            {"ph": "f", "pid": 0, **arrow},  # a kernel on GPU 0
            {"ph": "X", "name": "kernel", "pid": 0, "ts": 2.0},
            {"ph": "X", "name": "window", "pid": "Spans", "ts": 0.0},
        ]

    both = [trace(rank, "a", 0, 0.0, events(50 + rank)) for rank in (0, 1)]
    timeline = merged(both)["traceEvents"]
    names = {
        e["pid"]: e["args"]["name"]
        for e in timeline
        if e["ph"] == "M" and e["name"] == "process_name"
    }
    assert names == {
        0: "rank 0",
        1: "rank 0, GPU 0",
        1000: "rank 1",
        1001: "rank 1, GPU 0",
    }
    arrows = {}
    for event in timeline:
        if event["ph"] in "sf":
            arrows.setdefault(event["id"], []).append((event["ph"], event["pid"]))
    assert arrows == {
        "0.3": [("s", 0), ("f", 1)],
        "1.3": [("s", 1000), ("f", 1001)],
    }
    assert all(isinstance(event["pid"], int) for event in timeline)
