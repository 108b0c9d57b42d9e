"""Does pre-training shrink the loss that averaging causes?

    python benchmarks/claims/rbm_averaging.py

Claim       Pre-training with RBMs shrinks the loss from averaging: WER 15.6 to 16.4
            from random weights, 14.7 to 15.2 from RBMs, 1 to 32 GPUs.
Source      Su and Chen, arXiv 1507.01239
Set-up      DNN (4 x 128 sigmoids) on spoken digits, plain SGD, minibatch 64, 200,000
            frames in all, averages every 5 minibatches on 16 and 32 ranks; random first
            weights, and those of RBMs (2 passes over the data for the lowest, one for
            the others, on one rank); rate tuned for each of the six by the one rule;
            test cross-entropy in nats, 3 seeds. Loss from averaging: K ranks less one
Decision    reproduced if at 16 and at 32 ranks the loss from averaging is smaller with
            RBMs by a quarter or more; not reproduced if at either it is no smaller
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from claim import Finding, Point, Study, judged, main, mean, shown
from tasks import frames, frames_corpus, tuned

SHAPE = {"model": {"layers": 4}}
KEY: dict[str, Any] = {"samples": 200_000, "batch": 64, "more": SHAPE}
FIRST = {1: 2.0, 16: 16.0, 32: 16.0}


def rbms(study: Study, seed: int) -> Path:
    """Return the file of weights that RBMs come to."""
    from mpilm.config import resolve
    from mpilm.train.pretrain import Pretrainer, write_layers
    from mpilm.world.virtual import Simulation

    corpus = frames_corpus(study)
    path = corpus.with_name(f"{corpus.stem}-rbm-{seed}.h5")
    if not path.exists():
        document: dict[str, Any] = {
            "data": {"corpus": str(corpus)},
            "model": {"name": "dnn", "hidden": 128, "layers": 4, "context": 4},
            "strategy": {"name": "local"},
            "pretrain": {"momentum_samples": 100_000},
            "train": {"seed": seed},
        }
        config = resolve(document)
        simulation = Simulation(1)
        (layers,) = simulation.run(lambda world: Pretrainer(config, world).run())
        write_layers(path, layers)
    return path


def begun(study: Study, *, seed: int, **key: Any) -> Point:
    """Return the point of a DNN that begins with the weights of RBMs."""
    return frames(
        study, seed=seed, init=seed, make_init=lambda: rbms(study, seed), **key
    )


def measure(study: Study) -> Finding:
    """Return what the claim came to."""
    parts, lost = [], {}
    for name, is_trained in (("random", False), ("RBMs", True)):
        quality, numbers = {}, []
        task = begun if is_trained else frames
        for ranks in (1, 2) if study.smoke else FIRST:
            averaged = {"name": "model_averaging", "period": 5}
            strategy = averaged if ranks > 1 else {"name": "local"}
            key = {"strategy": strategy, "ranks": ranks, **KEY}
            lr = tuned(study, FIRST.get(ranks, 16.0), task, **key)
            points = [task(study, lr=lr, seed=seed, **key) for seed in study.seeds]
            quality[ranks] = mean(points)
            tests = shown([p["test"] for p in points], 3)
            numbers.append(f"{ranks}: {tests} at lr = {lr:g}")
        lost[name] = [quality[k] - quality[1] for k in quality if k > 1]
        parts.append(f"{name}, ranks {', '.join(numbers)}")
    pairs = list(zip(lost["random"], lost["RBMs"], strict=True))
    for name, losses in lost.items():
        shares = ", ".join(f"{loss:.3f}" for loss in losses)
        parts.append(f"loss from averaging, {name}: {shares}")
    less = all(trained <= 0.75 * drawn for drawn, trained in pairs)
    no_less = any(trained >= drawn for drawn, trained in pairs)
    return judged(
        parts,
        holds={"RBMs lose a quarter less": less},
        refutes={"RBMs lose no less": no_less},
    )


if __name__ == "__main__":
    main()
