"""check_strategy: ours and an example pass; a wrong one is told which law it breaks."""

from __future__ import annotations

import pytest

from mpilm.errors import ConfigError
from mpilm.strategies import STRATEGIES
from mpilm.testing import LawBroken, check_strategy
from mpilm.testing.check import LAWS
from tests.strategies import wrong
from tests.strategies.cases import CASES

WRONG = {
    wrong.LosesMass: "mass is conserved: on 2 ranks .* lost or gained",
    wrong.AsymmetricPeers: "mass is conserved: on 2 ranks .* lost or gained",
    wrong.Deadlocks: "no deadlock: on 2 ranks: deadlock at .* rank 0",
    wrong.ForgetsItsRound: "resume is exact: rank . has another model",
    wrong.MiscountsBytes: r"bytes are declared: rank 0 .* declared \(\d+, 0\)",
    wrong.RollsDice: "the same seed: rank 0 has another model",
    wrong.LeavesAMessage: "nothing in flight: messages that nobody received",
    wrong.MovesAlone: "one rank is local: 30 steps on 1 rank",
    wrong.ManyFinalModels: "one final model: .* rank 1 has another one",
    wrong.SkipsData: "steps are taken: .* processed",
}


@pytest.mark.long
@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_ours_keep_all_laws(case):
    settings = {k: v for k, v in case.of(4).items() if k not in ("eta", "zeta")}
    sizes = (2, 4) if case.name == "hierarchical" else (2, 3, 4)
    if case.name == "hierarchical":  # random sizes make no whole nodes
        settings["node_size"] = 1
    check_strategy(case.name, sizes=sizes, schedules=30, **settings)


def test_every_strategy_is_checked():
    assert {case.name for case in CASES.values()} == set(STRATEGIES)


def test_a_right_strategy_passes_and_its_twins_do_not():
    check_strategy(wrong.PairAveraging)


@pytest.mark.parametrize("kind", WRONG, ids=lambda kind: kind.__name__)
def test_a_wrong_strategy_is_told_which_law_it_breaks(kind):
    with pytest.raises(LawBroken, match=WRONG[kind]) as broken:
        check_strategy(kind)
    assert "\n" not in str(broken.value)
    assert broken.value.law in LAWS


def test_a_law_may_be_left_out():
    check_strategy(wrong.MiscountsBytes, without=["bytes are declared"], schedules=5)
    with pytest.raises(ValueError, match="no law bytes"):
        check_strategy(wrong.MiscountsBytes, without=["bytes"])


def test_a_strategy_from_outside_is_named_by_module_and_class():
    check_strategy("examples.own_strategy:Easgd", schedules=50, period=3)
    check_strategy(lambda world: wrong.PairAveraging(world, None), schedules=5)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("no_such_module:Thing", "cannot be loaded: No module named"),
        ("examples.own_strategy:Nothing", "cannot be loaded: .*no attribute"),
        ("examples.own_strategy:EasgdConfig", "no subclass"),
        ("bmfu", "did you mean 'bmuf'"),
    ],
)
def test_what_cannot_be_loaded_is_refused_in_one_line(name, reason):
    with pytest.raises(ConfigError, match=reason) as refused:
        check_strategy(name)
    assert "\n" not in str(refused.value)
