"""Settings that do not go together are said so in one line, before training."""

from __future__ import annotations

import pytest

from mpilm.train.notes import introduction

TIMES = {"name": "constant", "times_ranks": True}
# name of the strategy, sections -> words of the only note; None: there is none
NOTED = {
    "shards out of lockstep": (
        "adpsgd", {}, 'data.source = "shards": under adpsgd',
    ),
    "shards of nodes out of lockstep": (
        "hierarchical", {"strategy": {"node_size": 1}},
        'data.source = "shards": under hierarchical',
    ),
    "the pool out of lockstep": ("adpsgd", {"data": {"source": "pool"}}, None),
    "shards in lockstep": ("allreduce", {}, None),
    "ranks counted twice": (
        "bmuf", {"schedule": TIMES},
        "rate by 2, the block momentum of bmuf (eta = 0.5) every step by 2 again",
    ),
    "ranks counted twice in groups": (
        "gossip_bmuf", {"schedule": TIMES, "strategy": {"group_size": 2, "eta": 0.75}},
        "block momentum of gossip_bmuf (eta = 0.75) every step by 4 again",
    ),
    "ranks counted twice between nodes": (
        "hierarchical",
        {"schedule": TIMES, "strategy": {"node_size": 1, "inner": "bmuf"}},
        "block momentum of bmuf (eta = 0.5)",
    ),
    "no block momentum": (
        "bmuf", {"schedule": TIMES, "strategy": {"eta": 0.0}}, None,
    ),
    "no filter": (
        "gossip_bmuf",
        {"schedule": TIMES, "strategy": {"group_size": 2, "filter": False}}, None,
    ),
    "deaths that this world cannot survive": (
        "bmuf", {"world": {"on_death": "go_on"}}, "this MPI ends when a rank dies",
    ),
    "deaths that this strategy cannot survive": (
        "sgp", {"world": {"on_death": "go_on"}}, "sgp ends when a rank dies",
    ),
    "copies of what all ranks have": (
        "allreduce", {"checkpoint": {"peer_every": 1}}, "under allreduce a rank's copy",
    ),
    "copies for nobody": (
        "bmuf", {"checkpoint": {"peer_every": 1}}, '"end" ends all',
    ),
    "averages": ("model_averaging", {"schedule": TIMES}, None),
    "ranks counted twice in pushes": (
        "async_sgd", {"schedule": TIMES, "data": {"source": "pool"}},
        "rate by 2; under async_sgd every push is a whole step",
    ),
    "ranks that train alone": (
        "local", {"schedule": TIMES}, "under local every rank trains alone",
    ),
    "two periods": (
        "model_averaging", {"strategy": {"period": 5, "period_samples": 400}},
        "model_averaging: period is not used: period_samples says when",
    ),
    "a period in samples": (
        "model_averaging", {"strategy": {"period_samples": 400}}, None,
    ),
    "moments that are not there": (
        "model_averaging", {"strategy": {"momentum": "reset"}},
        'strategy.momentum = "reset" does nothing: this sgd keeps no moment vectors',
    ),
    "moments that are not there between nodes": (
        "hierarchical",
        {
            "strategy": {
                "node_size": 1,
                "inner": "model_averaging",
                "settings": {"momentum": "average"},
            }
        },
        'strategy.momentum = "average" does nothing',
    ),
    "moments": (
        "model_averaging",
        {"strategy": {"momentum": "reset"}, "optim": {"momentum": 0.5}}, None,
    ),
    "moments of adamw": (
        "model_averaging",
        {"strategy": {"momentum": "average"}, "optim": {"name": "adamw"}}, None,
    ),
    "a filter's settings without it": (
        "gossip_bmuf",
        {"strategy": {"group_size": 2, "filter": False, "eta": 0.5, "mix": "models"}},
        "gossip_bmuf: eta, mix is not used: filter = false",
    ),
    "a seed of nothing": (
        "dpsgd", {"strategy": {"seed": 5}}, "dpsgd: seed is not used",
    ),
    "a seed of rings": (
        "dpsgd", {"strategy": {"seed": 5, "topology": "random_ring"}}, None,
    ),
    "rounds of a ring that stays": (
        "adpsgd",
        {
            "strategy": {"mixing": "random_pairs", "ring_rounds": 3},
            "data": {"source": "pool"},
        },
        "adpsgd: ring_rounds is not used: only random_ring draws rings",
    ),
}  # fmt: skip


@pytest.mark.long
def said(trainer):
    """Return what a person is told before the training begins."""
    parts = trainer.task, trainer.strategy, trainer.learner
    return list(introduction(trainer.config, *parts))


@pytest.mark.long
@pytest.mark.parametrize("case", NOTED)
def test_what_does_not_go_together_is_noted(run, case):
    name, sections, words = NOTED[case]
    sections = {"optim": {}, **sections}
    sections["optim"] = {"lr": 0.01, **sections["optim"]}
    trainer, _ = run(2, name, steps=1, **sections)
    notes = [line for line in said(trainer) if line.startswith("note: ")]
    assert len(notes) == (words is not None)
    if words is not None:
        assert words in notes[0]
        assert "\n" not in notes[0]


def test_alone_there_is_nothing_to_note(run):
    (trainer,) = run(1, "adpsgd", steps=1)
    assert not any("note" in line for line in said(trainer))
