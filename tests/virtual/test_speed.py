"""The virtual world is quick enough to be of use, and its benchmark runs."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from mpilm.learner.quadratic import ProtocolLearner
from mpilm.strategies import strategy
from mpilm.world.virtual import run_virtual

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "bench_virtual.py"


@pytest.mark.long
def test_128_ranks_take_1000_steps_in_under_20_s():
    def main(world):
        learner = ProtocolLearner(1000, compute=world.compute, seed=world.rank)
        averaging = strategy("model_averaging", world)
        averaging.start(learner)
        for _ in range(1000):
            averaging.step(learner)
        averaging.finish(learner)
        return learner.theta

    start_s = time.process_time()  # of this process: others may be busy
    models = run_virtual(main, 128)
    assert time.process_time() - start_s < 20.0
    assert all((model == models[0]).all() for model in models)


def test_the_benchmark_runs():
    command = [sys.executable, str(BENCHMARK), "--smoke"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "allreduce, bucket per layer" in done.stdout
