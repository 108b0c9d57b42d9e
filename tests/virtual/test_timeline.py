"""What `train.trace_steps` notes of a rank's steps."""

from __future__ import annotations

import numpy as np
import pytest

from mpilm.train.timeline import Timeline
from mpilm.world.faults import Faults
from mpilm.world.machine import Machine
from mpilm.world.virtual import run_virtual

STEP_S, SLOW = 0.1, 3.0


def test_a_fast_rank_waits_for_the_slow_one():
    """In virtual time: rank 0 computes a third of a step and waits for the rest."""

    def main(world):
        timeline = Timeline(world, 2)
        for done in range(4):
            with timeline.step(done):
                timeline.compute(lambda notify: None)
                world.comm.Barrier()
        assert world.traffic.on_blocked is None
        return timeline.take(), timeline.take()

    machine = Machine(step_s=STEP_S, latency_s=0.0)
    (fast, rest), (slow, _) = run_virtual(
        main, 2, machine=machine, faults=Faults(slow={"1": SLOW})
    )
    assert rest == []
    assert [(name, step) for name, _, _, step in fast] == [
        *(("compute", 1), ("wait", 1), ("step", 1)),
        *(("compute", 2), ("wait", 2), ("step", 2)),
    ]
    spans = np.array([(start_s, stop_s) for _, start_s, stop_s, _ in fast])
    step_s = STEP_S * SLOW
    assert spans[:3] == pytest.approx(
        np.array([(0.0, STEP_S), (STEP_S, step_s), (0.0, step_s)]), abs=1e-6
    )
    waits = [stop_s - start_s for name, start_s, stop_s, _ in slow if name == "wait"]
    assert sum(waits) == pytest.approx(0.0, abs=1e-6)
