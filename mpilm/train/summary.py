"""What a run came to: `summary.json`, and the lines that close a run.

docs/metrics.md says what every number means.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from mpilm.train.evaluate import Quality, evaluate_each
from mpilm.train.metrics import MetricsRecorder, Totals
from mpilm.train.run import versions
from mpilm.train.screen import clock, count

if TYPE_CHECKING:
    from mpilm.config import Config
    from mpilm.learner.learner import Learner
    from mpilm.train.task import Task


@dataclass(frozen=True)
class RankSummary:
    """What one rank knows of itself at the end."""

    totals: Totals
    samples: int
    metrics: dict[str, Any]


def summarise(
    config: Config,
    task: Task,
    learner: Learner,
    recorder: MetricsRecorder,
    metrics: dict[str, Any],
    *,
    num_dropped: int,
    rest: int,
    quality: Callable[[str], Quality],
    ema_quality: Callable[[str], Quality] | None,
    watch: Callable[..., Iterator[Any]],
) -> dict[str, Any]:
    """Measure what is left to measure; return what the run came to: name -> value.

    Args:
        config: of the run.
        task: what it learned.
        learner: this rank's.
        recorder: what the run has taken, on this rank.
        metrics: of the strategy, on this rank.
        num_dropped: samples of the train split that no rank saw.
        rest: samples of the run beside those of the ranks: it had another number of
            ranks before.
        quality: measures the final model on a split; collective.
        ema_quality: the same for its moving average; None: there is none.
        watch: shows how far it is: yields its second argument, named by the first.

    Communicates: collective.
    """
    world, totals = recorder.world, recorder.totals
    reports = world.comm.allgather(RankSummary(totals, learner.samples, metrics))
    splits = task.evaluated(config.train)
    measure = task.measure
    results: dict[str, Any] = {f"test_{measure}": math.nan}
    with recorder.paused():
        if "test" in splits:
            results = split_results("test", quality("test"), task)
            if ema_quality:
                average = getattr(ema_quality("test"), measure)
                results[f"ema_test_{measure}"] = average
        each: dict[str, list[Quality]] = {}
        cut_at = None
        has_valid = "valid" in splits
        if config.train.worst_rank and has_valid and differ(reports):  # on all ranks
            most = most_evaluated(config, reports, len(splits))
            for split in splits:
                shown = partial(watch, f"every rank's own model on {split}")
                each[split], count = evaluate_each(
                    learner, task, split, config.train, world, most=most, watch=shown
                )
                if most is not None and count >= most:
                    cut_at = most
    if ema_quality:
        results[f"ema_valid_{measure}"] = getattr(totals, f"ema_valid_{measure}")
    if not math.isnan(totals.valid_error):
        results[f"valid_{task.wrong}"] = totals.valid_error
    summary = {
        "strategy": config.strategy.name,
        "parameters": learner.layout.size,
        "steps": totals.step,
        "seconds": totals.seconds,
        "train_seconds": totals.train_seconds,
        f"valid_{measure}": getattr(totals, f"valid_{measure}"),
        **results,
        **worst_rank(each, task),
        "worst_rank_samples": cut_at,
        "perplexity_floor": task.floor,
        f"{task.sample}s_left_out": num_dropped,
        "device": learner.device.type,
        "versions": versions(),
        **over_ranks(reports, rest),
    }
    if each:
        alone = [split_results("valid", own, task) for own in each["valid"]]
        for name in alone[0]:
            summary["per_rank"][name] = [own.get(name, math.nan) for own in alone]
    return summary


def most_evaluated(
    config: Config, reports: list[RankSummary], num_splits: int
) -> int | None:
    """Return how many samples of each split every rank's own model is measured on.

    The part `train.worst_rank_share` of the run's work, by samples and not by seconds:
    so the same run measures the same. A sample that is evaluated counts as much as one
    that is trained: of a large model it takes a third, of a tiny one as long. None: all
    of them.
    """
    share = config.train.worst_rank_share
    if share >= 1.0:
        return None
    of_rank = sum(report.samples for report in reports) / len(reports)
    return max(1, int(share * of_rank / num_splits))


def differ(reports: list[RankSummary]) -> bool:
    """Return whether the ranks' own models differ."""
    return any(report.totals.consensus_distance > 0.0 for report in reports)


def worst_rank(each: dict[str, list[Quality]], task: Task) -> dict[str, Any]:
    """Return what the worst of the ranks' own models came to.

    It is the one with the highest loss on the valid split, or one without any.
    """
    if not each:
        return {"worst_rank": None} | {
            f"worst_rank_{split}_{task.measure}": None for split in ("valid", "test")
        }
    losses = [quality.loss for quality in each["valid"]]
    worst = int(np.argmax([math.inf if math.isnan(loss) else loss for loss in losses]))
    found: dict[str, Any] = {"worst_rank": worst}
    found[f"worst_rank_test_{task.measure}"] = None
    for split, qualities in each.items():
        for name, value in split_results(split, qualities[worst], task).items():
            found[f"worst_rank_{name}"] = value
    return found


def split_results(split: str, quality: Quality, task: Task) -> dict[str, float]:
    """Return the keys of the summary for a model on a split."""
    found = {f"{split}_{task.measure}": getattr(quality, task.measure)}
    if not math.isnan(quality.error):
        found[f"{split}_{task.wrong}"] = quality.error
    return found


def over_ranks(reports: list[RankSummary], rest: int) -> dict[str, Any]:
    """Return what all ranks took together, and each of them.

    A sum is over ranks; a time is a rank's mean; a distance the root mean square.
    """
    totals = [report.totals for report in reports]
    size = len(totals)
    samples = sum(report.samples for report in reports) + rest
    blocked_s = sum(t.blocked_s for t in totals)
    together = Totals(
        blocked_s=blocked_s,
        in_flight_s=sum(t.in_flight_s for t in totals),
        train_seconds=sum(t.train_seconds for t in totals),
    )
    distance = math.sqrt(sum(t.consensus_distance**2 for t in totals) / size)
    norm = totals[0].consensus_norm
    staleness = [r.metrics["staleness"] for r in reports if "staleness" in r.metrics]
    return {
        "ranks": size,
        "samples": samples,
        "samples_per_s": samples / max(totals[0].train_seconds, 1e-9),
        "train_loss": train_loss(totals),
        "comm_seconds": blocked_s / size,
        "overlap": together.overlap,
        "idle": together.idle,
        "bytes_sent": sum(t.bytes_sent for t in totals),
        "bytes_received": sum(t.bytes_received for t in totals),
        "messages": sum(t.messages for t in totals),
        "skipped": sum(t.skipped for t in totals),
        "mixes": sum(r.metrics.get("mixes", 0) for r in reports),
        "staleness": np.sum(staleness, axis=0) if staleness else None,
        "consensus_distance": distance,
        "consensus_distance_relative": distance / norm if norm else math.nan,
        "spectral_gap": totals[0].spectral_gap,
        "per_rank": per_rank(reports),
    }


def train_loss(totals: list[Totals]) -> float:
    """Return the mean loss of the minibatches in the logs; NaN: there is none yet."""
    count = sum(t.loss_count for t in totals)
    return sum(t.loss_sum for t in totals) / count if count else math.nan


def per_rank(reports: list[RankSummary]) -> dict[str, list[Any]]:
    """Return name -> its value on every rank."""
    names = (
        "train_seconds",
        "blocked_s",
        "idle",
        "overlap",
        "data_s",
        "forward_s",
        "backward_s",
        "bytes_sent",
        "bytes_received",
        "messages",
        "skipped",
        "consensus_distance",
    )
    values: dict[str, list[Any]] = {
        name: [getattr(r.totals, name) for r in reports] for name in names
    }
    values["steps"] = [r.totals.step for r in reports]
    values["samples"] = [r.samples for r in reports]
    for name in ("mixes", "partners", "staleness"):
        values[name] = [r.metrics.get(name) for r in reports]
    return values


def closing_lines(summary: dict[str, Any], *, virtual: bool = False) -> list[str]:
    """Return what a person wants to read of a summary.

    Args:
        virtual: its seconds are those of a declared machine.
    """
    took = clock(summary["train_seconds"])
    took += " of virtual time" if virtual else " of training"
    speed = (
        f"{summary['samples']:,} samples in {took}"
        f" on {count(summary['ranks'], 'rank')}: {summary['samples_per_s']:,.0f}/s"
    )
    if summary["ranks"] > 1:
        speed += (
            f", {summary['comm_seconds']:.1f} s waiting for communication,"
            f" overlap {summary['overlap']:.0%}"
        )
    if not virtual and clock(summary["seconds"]) != clock(summary["train_seconds"]):
        speed += f"; {clock(summary['seconds'])} with evaluations and checkpoints"
    quality = results(summary)
    if summary["worst_rank"] is not None:
        worst = f"worst single rank ({summary['worst_rank']})"
        worst += f": {results(summary, 'worst_rank_')}"
        if cut := summary.get("worst_rank_samples"):
            # not beside the final model, which was measured on all of them
            measure = "loss" if "valid_loss" in summary else "perplexity"
            each = summary["per_rank"]
            best = int(np.argmin(each[f"valid_{measure}"]))
            if "valid_frame_error" in each:
                measure = "frame_error"
            worst += f", on {cut:,} samples of each split, where the best rank has"
            value = each[f"valid_{measure}"][best]
            worst += f" valid {measure.replace('_', ' ')} {value:{SHOWN[measure]}}"
        quality = f"final model: {quality}; {worst}"
    if summary["perplexity_floor"]:
        quality += f"; floor {summary['perplexity_floor']:.2f}"
    lines = [speed, quality] if quality else [speed]
    if skipped := summary.get("skipped"):
        lines.append(f"{count(skipped, 'step')} skipped: gradient not finite")
    return lines


SHOWN = {"frame_error": ".2%", "error": ".2%", "loss": ".4f", "perplexity": ".2f"}


def results(summary: dict[str, Any], prefix: str = "") -> str:
    """Return how good a model is on the splits that were measured.

    >>> results({"valid_perplexity": 9.0, "test_perplexity": 8.0})
    'valid perplexity 9.00, test perplexity 8.00'
    >>> results({"valid_loss": 0.5, "valid_error": 0.25})
    'valid error 25.00%, valid loss 0.5000'
    """
    is_frames = f"{prefix}valid_frame_error" in summary
    is_own = f"{prefix}valid_loss" in summary
    names = ["frame_error"] if is_frames else ["perplexity"]
    values = {
        f"{split} {name.replace('_', ' ')}": (
            summary.get(f"{prefix}{split}_{name}"),
            SHOWN[name],
        )
        for name in (["error", "loss"] if is_own else names)
        for split in ("valid", "test")
    }
    return ", ".join(
        f"{what} {value:{digits}}"
        for what, (value, digits) in values.items()
        if value is not None and not math.isnan(value)
    )
