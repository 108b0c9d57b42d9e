"""When a wait is out of line with those before."""

from __future__ import annotations

import pytest

from mpilm.world.waits import KNOWN, LEAST, MOST_KINDS, K, WaitLimits, typical_limit


def test_median_and_mad_as_by_hand() -> None:
    waits = [1.0, 1.2, 0.9, 1.1, 7.0]
    assert typical_limit(waits, 2.0) == pytest.approx(2.0 + 1.1 + K * 0.1)


def test_who_always_waits_long_is_used_to_it() -> None:
    limits = WaitLimits(60.0)
    for _ in range(KNOWN - 1):
        limits.note("Allreduce", 90.0)
    assert limits.limit_s("Allreduce") == 60.0
    limits.note("Allreduce", 90.0)
    assert limits.limit_s("Allreduce") == 90.0 + LEAST * 60.0


def test_who_never_waits_long_is_told_sooner_and_one_outlier_changes_nothing() -> None:
    limits = WaitLimits(60.0)
    for _ in range(20):
        limits.note("Allreduce", 0.01)
    limits.note("Allreduce", 300.0)
    assert limits.limit_s("Allreduce") == pytest.approx(20.01)
    assert limits.limit_s("Bcast") == 60.0, "each kind by itself"


def test_no_more_than_so_many_kinds_are_remembered() -> None:
    limits = WaitLimits(60.0)
    for number in range(2 * MOST_KINDS):
        for _ in range(KNOWN):
            limits.note(f"a message from rank {number}", 0.1)
    assert limits.limit_s("a message from rank 0") == 60.0
    assert limits.limit_s(f"a message from rank {2 * MOST_KINDS - 1}") < 60.0
