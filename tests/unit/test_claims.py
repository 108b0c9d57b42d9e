"""The claims of the papers: the page is what the points come to, the rules can fail."""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path

import pytest

CLAIMS = Path(__file__).parents[2] / "benchmarks" / "claims"
sys.path.insert(0, str(CLAIMS))
claim = importlib.import_module("claim")
page = importlib.import_module("page")
Points = claim.Points


class Imagined(claim.Study):
    """A study whose points are what a function says of their keys."""

    def __init__(self, id, value):
        super().__init__(id, ends=0.0)
        self.value = value

    def get(self, run, **key):
        found = self.value(key)
        return {**key, **(found if isinstance(found, dict) else {"test": found})}


def verdict(id, value):
    """Return the verdict of a claim whose points are imagined."""

    def point(key):
        found = value(key)
        more = found if isinstance(found, dict) else {"test": found}
        return {"valid": more.get("test", 1.0), **more}

    return claim.find(id).measure(Imagined(id, point)).verdict


@pytest.fixture(scope="module")
def rows():
    return page.rows()


def test_the_page_and_the_readme_are_what_the_points_come_to(rows):
    """Otherwise run `python benchmarks/claims/page.py`."""
    for path, table in (
        (page.PAGE, page.long_table(rows)),
        (page.README, page.short_table(rows)),
    ):
        assert path.read_text() == page.with_table(path, table)


def test_every_result_says_the_verdict_of_its_points(rows):
    stored = {path.stem: json.loads(path.read_text()) for path in results()}
    for found, finding in rows:
        if found.id in stored and finding.verdict != claim.NOT_RUN:
            assert stored[found.id]["verdict"] == finding.verdict
            assert stored[found.id]["numbers"] == finding.numbers


def results():
    return claim.RESULTS.glob("*.json")


def test_every_verdict_has_its_reason(rows):
    assert [c.id for c, f in rows if not page.why(c, f)] == []


def test_a_claim_is_a_script_of_its_name():
    assert all((CLAIMS / f"{id}.py").exists() for id in claim.IDS)
    assert {path.stem for path in results()} <= set(claim.IDS)


def test_points_are_measured_once_and_not_after_the_time(tmp_path):
    points = Points([{"lr": 1.0, "seed": 1, "test": 3.0}], time.monotonic() + 100)
    runs = []

    def run(**key):
        runs.append(key)
        return {"test": key["lr"]}

    assert points.get(run, lr=1.0, seed=1)["test"] == 3.0
    assert points.get(run, lr=2.0, seed=1)["test"] == 2.0
    assert points.get(run, lr=2.0, seed=1)["test"] == 2.0
    assert runs == [{"lr": 2.0, "seed": 1}]
    points.ends = 0.0
    with pytest.raises(TimeoutError):
        points.get(run, lr=3.0, seed=1)


def bmuf(at, averaged_at_k):
    """Return a perplexity: BMUF's least at `at` x lr, averaging's at K or at once."""

    def value(key):
        factor = key["lr"] / 4.0
        if key["strategy"]["name"] == "model_averaging":
            best = key["ranks"] if averaged_at_k else 1
            return 30.0 if factor == best else 40.0
        return 30.0 + 10.0 * abs(factor - at)

    return value


@pytest.mark.parametrize(
    ("at", "averaged_at_k", "expected"),
    [
        (1.0, True, claim.REPRODUCED),
        (2.0, True, claim.NOT_REPRODUCED),
        (1.0, False, claim.NOT_REPRODUCED),
    ],
)
def test_the_rule_of_bmuf_can_fail(at, averaged_at_k, expected):
    def value(key):
        if key["strategy"]["name"] == "local":
            return 30.0 + abs(key["lr"] - 4.0)
        return bmuf(at, averaged_at_k)(key)

    assert verdict("bmuf_rule", value) == expected


@pytest.mark.parametrize(
    ("fixed", "drawn", "expected"),
    [
        (60.0, 51.0, claim.REPRODUCED),
        (51.0, 51.0, claim.NOT_REPRODUCED),
        (70.0, 60.0, claim.NOT_REPRODUCED),
        (52.0, 51.0, claim.INCONCLUSIVE),
    ],
)
def test_the_rule_of_the_rings_can_fail(fixed, drawn, expected):
    tests = {"fixed_ring": fixed, "random_ring": drawn}

    def value(key):
        return tests.get(key["strategy"].get("mixing"), 50.0)

    assert verdict("ring_randomisation", value) == expected


@pytest.mark.parametrize(
    ("lost", "expected"),
    [
        ({"fixed_ring": 1.1, "random_ring": 1.1}, claim.REPRODUCED),
        ({"fixed_ring": 1.1, "random_ring": 2.0}, claim.NOT_REPRODUCED),
        ({"fixed_ring": 1.3, "random_ring": 1.1}, claim.INCONCLUSIVE),
    ],
)
def test_the_rule_of_stragglers_can_fail(lost, expected):
    def value(key):
        slow = lost.get(key["strategy"].get("mixing"), key["slow"])
        seconds = 100.0 * (slow if key["slow"] > 1.0 else 1.0)
        return {"valid": 30.0, "test": 30.0, "curve": [[0.0, 90.0], [seconds, 30.0]]}

    assert verdict("adpsgd_stragglers", value) == expected


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [
        (0.9, claim.REPRODUCED),
        (1.1, claim.NOT_REPRODUCED),
        (1.0, claim.INCONCLUSIVE),
    ],
)
def test_the_rule_of_the_moving_average_can_fail(ratio, expected):
    value = {"valid": 2.0, "test": 2.0, "ema": 2.0 * ratio}
    assert verdict("ema_final_model", lambda key: value) == expected
