"""What a person reads before training: what is trained, on what, and notes.

A note is a line on settings that do not do together what they say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from mpilm.config import OWN
from mpilm.strategies import Strategy
from mpilm.train.peer_copies import copies_of_use
from mpilm.train.screen import count

if TYPE_CHECKING:
    from mpilm.config import Config
    from mpilm.learner.learner import Learner
    from mpilm.train.task import Task

# strategy -> settings, what makes them void, whether it is so
VOID: dict[str, list[tuple[tuple[str, ...], str, Callable[[Any], bool]]]] = {
    "model_averaging": [
        (
            ("period",),
            "period_samples says when to average",
            lambda config: config.period_samples > 0,
        )
    ],
    "gossip_bmuf": [
        (
            ("eta", "zeta", "momentum", "mix"),
            "filter = false averages models, no more",
            lambda config: not config.filter,
        )
    ],
    "dpsgd": [
        (
            ("seed",),
            "this topology draws nothing",
            lambda config: not config.topology.startswith("random"),
        )
    ],
    "adpsgd": [
        (
            ("ring_rounds",),
            "only random_ring draws rings",
            lambda config: config.mixing != "random_ring",
        ),
        (
            ("seed",),
            "fixed_ring draws nothing",
            lambda config: config.mixing == "fixed_ring",
        ),
    ],
}
# what they come to is the model after the last whole block
BY_BLOCKS = ("bmuf", "gossip_bmuf", "eager_diloco")
WHOLE_STEPS = {
    "async_sgd": "every push is a whole step, so the rate of one rank is kept",
    "local": "every rank trains alone, so the rate of one rank is kept",
}


def introduction(
    config: Config, task: Task, strategy: Strategy, learner: Learner
) -> Iterator[str]:
    """Yield what a person wants to know before training begins."""
    size = strategy.world.size
    yield (
        f"{config.model.name} of {learner.layout.size:,} parameters,"
        f" {config.strategy.name} on {count(size, 'rank')} ({learner.device.type})"
    )
    yield task.about(learner.batches.num_dropped)
    for note in (*config.notes, *task.notes, *notes_on(config, strategy, size)):
        yield f"note: {note}"


def notes_on(config: Config, strategy: Strategy, size: int) -> Iterator[str]:
    """Yield what a run with these settings on `size` ranks should be warned of."""
    model: Any = config.model.settings
    if getattr(model, "softmax", "") == "sampled" and not model.sparse:
        yield (
            'model.softmax = "sampled" with model.sparse = false: gradient and update'
            " still go over the whole vocabulary"
        )
    if size == 1:
        return
    if config.world.on_death == "go_on":
        if not strategy.survives:
            yield (
                f'world.on_death = "go_on": {strategy.name} ends when a rank dies'
                " (docs/reliability.md says which go on)"
            )
        elif not strategy.world.can_shrink:
            yield (
                'world.on_death = "go_on": this MPI ends when a rank dies; Open MPI 5'
                " goes on under mpirun --with-ft ulfm"
            )
    if config.checkpoint.peer_every and not copies_of_use(strategy):
        yield (
            f"checkpoint.peer_every is not used: under {strategy.name} a rank's copy is"
            " of no use to the others (docs/checkpoints.md)"
        )
    elif config.checkpoint.peer_every and config.world.on_death == "end":
        yield 'checkpoint.peer_every is not used: world.on_death = "end" ends all'
    is_own = config.model.name == OWN
    if not strategy.lockstep and is_own:
        yield (
            f"under {strategy.name} a slow rank's part of the data is seen less than"
            " others'; fit has no pool that gives it to whoever is free"
        )
    elif not strategy.lockstep and config.data.source == "shards":
        yield (
            f'data.source = "shards": under {strategy.name} a slow rank\'s part of the'
            ' data is seen less than others\'; "pool" gives it to whoever is free'
        )
    inner: Any = getattr(strategy, "inner", None) or strategy  # of `hierarchical`
    if getattr(config.schedule.settings, "times_ranks", False):
        yield from notes_on_rate(inner, size)
    yield from notes_on_void(inner)
    keeps = getattr(inner.config, "momentum", "keep") == "keep"
    if inner.name == "model_averaging" and not keeps and not is_own:
        optim = config.optim
        has_moments = optim.name in ("adamw", "muon")
        if not has_moments and not getattr(optim.settings, "momentum", None):
            yield (
                f'strategy.momentum = "{inner.config.momentum}" does nothing: this'
                f" {optim.name} keeps no moment vectors"
            )


def notes_on_rate(inner: Any, size: int) -> Iterator[str]:
    """Yield why the rate should not be multiplied by the number of ranks."""
    eta = getattr(inner, "eta", 0.0)
    if eta and getattr(inner.config, "filter", True):
        yield (
            f"schedule.times_ranks multiplies the rate by {size}, the block momentum of"
            f" {inner.name} (eta = {eta:.3g}) every step by {1.0 / (1.0 - eta):.3g}"
            " again: this diverges as a rule; leave one of the two out"
        )
    if inner.name in WHOLE_STEPS:
        yield (
            f"schedule.times_ranks multiplies the rate by {size}; under {inner.name}"
            f" {WHOLE_STEPS[inner.name]} without it"
        )


def notes_on_void(inner: Any) -> Iterator[str]:
    """Yield settings that were given another value, and are not looked at."""
    config = inner.config
    for names, reason, is_so in VOID.get(inner.name, []):
        default = {field.name: field.default for field in fields(config)}
        given = [n for n in names if getattr(config, n) != default[n]]
        if given and is_so(config):
            yield f"{inner.name}: {', '.join(given)} is not used: {reason}"


def notes_after(strategy: Strategy, steps: int) -> Iterator[str]:
    """Yield what a person should be warned of when a run has ended.

    Args:
        steps: that this rank has taken.
    """
    inner: Any = getattr(strategy, "inner", None) or strategy  # of `hierarchical`
    period = getattr(inner.config, "period", 0)
    if strategy.world.size > 1 and inner.name in BY_BLOCKS and steps < period:
        yield (
            f"{steps} steps are less than one block of {inner.name}"
            f" (strategy.period = {period}): its model is still that of the beginning"
        )
