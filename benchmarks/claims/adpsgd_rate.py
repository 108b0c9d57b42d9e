"""Does the error of ADPSGD depend on learners and delay as the theory has it?

    python benchmarks/claims/adpsgd_rate.py

Claim       After k gradients of all learners together the error is O(1 / sqrt k)
            whatever their number and delay: a linear speed-up, at a learning rate that
            is proportional to the number of learners.
Source      Lian et al., ICML 2018; Cui et al., arXiv 2110.11199; docs/convergence.md,
            (4) and (6)
Set-up      (a) quadratics with gradient noise, lr = 0.1: fluctuation of the mean model
            over lr sigma^2 / (K (2 - lr)), 4, 16 and 64 learners, a model under way for
            0, 2 and 5 steps; `adpsgd`, random ring. (b) LSTM on words, plain SGD,
            minibatch 4 x 10, 50,000 words in all, lr = 0.5 K, 1, 4 and 16 learners, 16
            also with a model under way for 2 and 5 steps: test perplexity over that of
            one learner; 3 seeds
Decision    reproduced if all of (a) are within 10% of 1, and all of (b) at most 1.05;
            not reproduced if one of (a) is off by more than 25% or one of (b) above
            1.10; each in the mean over the seeds
"""

from __future__ import annotations

from statistics import fmean
from typing import Any

import numpy as np
from claim import Finding, Point, Study, judged, main, mean, shown
from tasks import all_seeds, few, words

from mpilm.learner.quadratic import ProtocolLearner
from mpilm.strategies import strategy
from mpilm.world.machine import Machine
from mpilm.world.virtual import Simulation, VirtualWorld

LR, SIGMA, P = 0.1, 0.5, 400
LATER = 60  # steps until the mean model only fluctuates
DELAYS = (0.0, 2.0, 5.0)
LEARNERS = (4, 16, 64)


def fluctuation(*, ranks: int, delay: float, seed: int, steps: int, **_: Any) -> Point:
    """Return the square of the mean model, measured and as (6) has it."""

    def rank(world: VirtualWorld) -> Any:
        learner = ProtocolLearner(
            P,
            compute=world.compute,
            seed=1000 * seed + world.rank,
            target=np.zeros(P),
            lr=LR,
            noise=SIGMA,
        )
        learner.theta[:] = 0.0
        chosen = strategy("adpsgd", world, mixing="random_ring", seed=seed)
        chosen.start(learner)
        models = np.empty((steps, P), np.float32)
        for model in models:
            chosen.step(learner)
            model[:] = learner.theta
        chosen.retire(learner)
        chosen.finish(learner)
        return models

    machine = Machine(step_s=0.1, jitter=0.1)
    if delay:
        machine = Machine(
            step_s=0.1, jitter=0.1, bandwidth_Bps=4 * P / (delay * 0.1), eager_bytes=0
        )
    models = np.mean(Simulation(ranks, machine=machine, seed=seed).run(rank), axis=0)
    return {
        "measured": float(
            np.square(models[-(steps - min(LATER, steps // 2)) :]).mean()
        ),
        "predicted": LR * SIGMA**2 / (ranks * (2 - LR)),
    }


def measure(study: Study) -> Finding:
    """Return what the claim came to."""
    steps = 4 if study.smoke else 160
    noise, parts = [], []
    for ranks in (2,) if study.smoke else LEARNERS:
        for delay in DELAYS:
            key = {"part": "quadratic", "ranks": ranks, "delay": delay, "steps": steps}
            points = [study.get(fluctuation, **key, seed=s) for s in study.seeds]
            found = [p["measured"] / p["predicted"] for p in points]
            noise.append(fmean(found))
            parts.append(f"(a) {ranks} learners, delay {delay:g}: {shown(found, 2)}")
    key = {"samples": 50_000}
    alone = all_seeds(
        study, words, lr=0.5, strategy={"name": "local"}, ranks=1, delay=0.0, **key
    )
    parts.append(f"(b) one learner {shown([p['test'] for p in alone])}")
    quality = []
    for ranks, delay in ((4, 0.0), (16, 0.0), (16, 2.0), (16, 5.0)):
        ranks = few(study, ranks)
        points = all_seeds(
            study,
            words,
            lr=0.5 * ranks,
            strategy={"name": "adpsgd", "mixing": "random_ring"},
            ranks=ranks,
            delay=delay,
            **key,
        )
        ratios = [p["test"] / mean(alone) for p in points]
        quality.append(fmean(ratios))
        parts.append(f"(b) {ranks} learners, delay {delay:g}: {shown(ratios, 3)}")
    worst, most = max(abs(ratio - 1) for ratio in noise), max(quality)
    return judged(
        parts,
        holds={"(a) within 10%": worst <= 0.10, "(b) at most 1.05": most <= 1.05},
        refutes={"(a) off by over 25%": worst > 0.25, "(b) above 1.10": most > 1.10},
    )


if __name__ == "__main__":
    main()
