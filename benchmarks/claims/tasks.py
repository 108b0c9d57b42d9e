"""The two tasks on which the claims are measured, and the one rule that tunes a rate.

words   An LSTM language model (E = H = 48, one layer, 115,624 parameters) on the
        1,000 most frequent words of the WikiText-2 sample: 217,646 tokens to train on,
        10,000 to choose rates by (valid), 40,000 for what is reported (test). Without
        the sample: English from the documentation that every Python carries. Plain SGD,
        clipped at 1; a minibatch of a rank has so many sequences of 10 words.
frames  A DNN (2 x 128 sigmoids, 83 classes) on the spoken digits: 90,628 frames to
        train on, the data set's own test split. Without the recordings: tones, which
        are no speech. Plain SGD or NG-SGD.

Rate    the one rule, for every row alike: from a first rate, double or halve while the
        mean over the seeds gets better on the valid split, looking past one rate that
        is no better; a rate at which seed 1 alone is more than 5% above the best mean
        so far is worse. (First it was seed 1 alone: that came to rates at which another
        seed diverged. Then without the look past one rate: of `adpsgd` at large batches
        8 and 16 are alike, and 64 is better by a tenth. All was measured again.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from bench_digits import tones
from claim import Study
from points import DATA, WIKITEXT, Point, best_rate, train_virtually, wikitext_sample

from mpilm.data.docs import prepare_docs
from mpilm.data.synthetic import prepare_synthetic
from mpilm.simulate.machines import find_machine
from mpilm.world.faults import Faults
from mpilm.world.machine import Machine

VOCAB, UNITS, UNROLL = 1000, 48, 10
PARAMETERS = 2 * VOCAB * UNITS + VOCAB + 8 * UNITS * (UNITS + 1)  # of the words' model
AS_IF = 43_200_000  # parameters of the model whose times are predicted: IBM's BLSTM
VALID, TEST = 10_000, 40_000
DIGITS = DATA / "fsdd" / "wav"
EXPONENTIAL = {"name": "exponential", "final_ratio": 0.1}
SU_CHEN = {  # NG-SGD of the program behind arXiv 1507.01239
    "optim": {
        "summed": True, "max_change": "su_chen", "rank_in": 30, "rank_out": 60,
    }
}  # fmt: skip


def words_corpus(study: Study) -> Path:
    """Return the corpus of words."""
    if study.smoke:
        return study.corpus(
            "words", lambda out: prepare_synthetic(out, vocab=VOCAB, tokens=3000)
        )
    if not WIKITEXT.is_dir():
        return study.corpus("docs", lambda out: prepare_docs(out, vocab=VOCAB))
    return study.corpus(
        "wikitext",
        lambda out: wikitext_sample(out, vocab=VOCAB, valid=VALID, test=TEST),
    )


def frames_corpus(study: Study) -> Path:
    """Return the corpus of spoken digits; where they are not there, of tones."""
    is_made = study.smoke or not DIGITS.is_dir()

    def make(out: Path) -> None:
        from mpilm.speech.plan import SplitConfig
        from mpilm.speech.prepare import prepare_wav

        wav = tones(out.parent / "wav") if is_made else DIGITS
        prepare_wav(out, SplitConfig(train=(wav,), test_names="_[0-4]$"))

    return study.corpus("tones" if is_made else "digits", make)


def machine_of(name: str, delay: float) -> Machine:
    """Return a machine for the words' model.

    Args:
        name: of a machine file, for the times of a model of AS_IF parameters; "": steps
            of 0.1 s, messages that take next to nothing.
        delay: steps that a whole model is under way; 0: as the machine has it.
    """
    if name:
        machine = find_machine(name).machine.scaled(AS_IF / PARAMETERS)
        return replace(machine, jitter=0.1)
    if not delay:
        return Machine(step_s=0.1, jitter=0.1)
    bandwidth_Bps = 4 * PARAMETERS / (delay * 0.1)
    return Machine(step_s=0.1, jitter=0.1, bandwidth_Bps=bandwidth_Bps)


def words(
    study: Study,
    *,
    strategy: Mapping[str, Any],
    ranks: int,
    lr: float,
    seed: int,
    samples: int,
    batch: int = 4,
    schedule: Mapping[str, Any] = EXPONENTIAL,
    machine: str = "",
    delay: float = 0.0,
    slow: float = 1.0,
    evaluations: int = 0,
    windows: int = 0,
    more: Mapping[str, Mapping[str, Any]] | None = None,
) -> Point:
    """Return the point of a language model, trained if it is not there.

    Args:
        samples: of all ranks.
        machine, delay: see `machine_of`.
        slow: by which factor the last rank is slow.
        evaluations: in the course of training.
        windows: of the training losses of all ranks, in the order of time.
        more: sections and keys of the configuration.
    """
    strategy = {**strategy, "seed": seed} if seeded(strategy["name"]) else strategy
    key = {
        "task": "words", "strategy": dict(strategy), "ranks": ranks, "lr": lr,
        "seed": seed, "samples": samples, "batch": batch, "schedule": dict(schedule),
        "machine": machine, "delay": delay, "slow": slow, "evaluations": evaluations,
        "more": dict(more or {}), **({"windows": windows} if windows else {}),
    }  # fmt: skip

    def run(**_: Any) -> Point:
        num = 6 * ranks * batch * UNROLL if study.smoke else samples
        every = max(1, num // (ranks * batch * UNROLL) // 40)
        document: dict[str, Any] = {
            "data": {"corpus": str(words_corpus(study))},
            "model": {"name": "lstm_lm", "embed": UNITS, "hidden": UNITS},
            "optim": {"name": "sgd", "lr": lr, "clip": 1.0},
            "schedule": schedule,
            "strategy": strategy,
            "train": {
                "samples": num, "batch": batch, "unroll": UNROLL, "seed": seed,
                "eval_streams": 128, "trace_steps": 0,
                "log_every": 1 if windows else every,
                "valid_every": num // evaluations if evaluations else 0,
            },
        }  # fmt: skip
        faults = Faults(slow={str(ranks - 1): slow} if slow > 1.0 else {})
        document = merged(document, more or {})
        on = machine_of(machine, delay)
        return train_virtually(document, ranks, on, faults, windows=windows)

    return study.get(run, **key)


def frames(
    study: Study,
    *,
    strategy: Mapping[str, Any],
    ranks: int,
    lr: float,
    seed: int,
    samples: int,
    optim: str = "sgd",
    batch: int = 128,
    schedule: Mapping[str, Any] = EXPONENTIAL,
    init: int = 0,
    make_init: Callable[[], Path] | None = None,
    more: Mapping[str, Mapping[str, Any]] | None = None,
) -> Point:
    """Return the point of the DNN on spoken digits, trained if it is not there.

    Args:
        init: seed of RBMs that its first weights are from; 0: drawn at random.
        make_init: returns the file of those weights.
    """
    key = {
        "task": "frames", "strategy": dict(strategy), "ranks": ranks, "lr": lr,
        "seed": seed, "samples": samples, "optim": optim, "batch": batch,
        "schedule": dict(schedule), "init": init, "more": dict(more or {}),
    }  # fmt: skip

    def run(**_: Any) -> Point:
        few = 8 if study.smoke else batch
        model: dict[str, Any] = {"name": "dnn", "context": 4}
        model |= {"hidden": 128, "layers": 2, "init": ""}
        if make_init is not None:
            model["init"] = str(make_init())
        document: dict[str, Any] = {
            "data": {"corpus": str(frames_corpus(study))},
            "model": model,
            "optim": {"name": optim, "lr": lr},
            "schedule": schedule,
            "strategy": strategy,
            "train": {
                "samples": 6 * ranks * few if study.smoke else samples,
                "batch": few, "seed": seed, "trace_steps": 0, "log_every": 10,
            },
        }  # fmt: skip
        return train_virtually(merged(document, more or {}), ranks)

    return study.get(run, **key)


def seeded(name: str) -> bool:
    """Return whether a strategy draws from a seed of its own."""
    from mpilm.strategies import find_strategy

    return "seed" in find_strategy(name).Config.__dataclass_fields__


def merged(
    document: dict[str, Any], sections: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Return a configuration with more keys.

    >>> merged({"a": {"x": 1}}, {"a": {"y": 2}, "b": {"z": 3}})
    {'a': {'x': 1, 'y': 2}, 'b': {'z': 3}}
    """
    result = dict(document)
    for name, values in sections.items():
        result[name] = {**result.get(name, {}), **values}
    return result


def at_the_end(point: Point) -> float:
    """Return the measure of the valid split at the end."""
    return float(point["valid"])


def tuned(
    study: Study,
    first: float,
    task: Callable[..., Point],
    judged_by: Callable[[Point], float] = at_the_end,
    **key: Any,
) -> float:
    """Return the rate that the one rule comes to; for a smoke test the first."""
    if study.smoke:
        return first
    best = math.inf

    def quality(lr: float) -> float:
        nonlocal best
        one = judged_by(task(study, lr=lr, seed=study.seeds[0], **key))
        if one > 1.05 * best:
            return one
        value = fmean(map(judged_by, all_seeds(study, task, lr=lr, **key)))
        best = min(best, value)
        return value

    return best_rate(first, quality, beyond=1)


def on_the_way(point: Point) -> float:
    """Return the geometric mean of the perplexities of a curve: how a run went.

    >>> round(on_the_way({"curve": [[1.0, 100.0], [2.0, 1.0]]}), 6)
    10.0
    """
    if "curve" not in point:
        return math.inf  # it diverged
    return math.exp(fmean(math.log(value) for _, value in point["curve"]))


def all_seeds(
    study: Study, task: Callable[..., Point], *, lr: float, **key: Any
) -> list[Point]:
    """Return the points of every seed."""
    return [task(study, lr=lr, seed=seed, **key) for seed in study.seeds]


def tuned_seeds(
    study: Study,
    first: float,
    task: Callable[..., Point],
    judged_by: Callable[[Point], float] = at_the_end,
    **key: Any,
) -> list[Point]:
    """Return the points of every seed at the rate that the one rule comes to."""
    lr = tuned(study, first, task, judged_by, **key)
    return all_seeds(study, task, lr=lr, **key)


def few(study: Study, ranks: int) -> int:
    """Return how many ranks: 2 at most in a smoke test."""
    return min(ranks, 2) if study.smoke else ranks


def seconds_to(target: float, curve: Sequence[Sequence[float]]) -> float:
    """Return when a curve of [seconds, perplexity] first reaches a perplexity.

    Between two evaluations in a straight line; infinite if it never does.

    >>> seconds_to(15.0, [[1.0, 30.0], [2.0, 20.0], [3.0, 10.0]])
    2.5
    """
    before = None
    for second, value in curve:
        if value <= target:
            if before is None:
                return float(second)
            share = (before[1] - target) / max(before[1] - value, 1e-12)
            return float(before[0] + share * (second - before[0]))
        before = (second, value)
    return float("inf")
