"""The claims of the papers: the page is what the points come to, the rules can fail."""

from __future__ import annotations

import doctest
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


@pytest.mark.parametrize("name", ["claim", "points", "tasks", "ring_randomisation"])
def test_what_the_docstrings_say(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0


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


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (8.0, claim.REPRODUCED),
        (12.0, claim.NOT_REPRODUCED),
        (10.0, claim.INCONCLUSIVE),
    ],
)
def test_the_rule_of_delay_by_one_can_fail(seconds, expected):
    def value(key):
        took = seconds if key["strategy"]["name"] == "delay_by_one" else 10.0
        return {"valid": 60.0, "test": 60.0, "curve": [[0.0, 90.0], [took, 60.0]]}

    assert verdict("delay_by_one_fastest", value) == expected


@pytest.mark.parametrize(
    ("last", "expected"),
    [
        ({"allreduce": 8, "adpsgd": 32}, claim.REPRODUCED),
        ({"allreduce": 8, "adpsgd": 8}, claim.NOT_REPRODUCED),
        ({"allreduce": 32, "adpsgd": 32}, claim.INCONCLUSIVE),
    ],
)
def test_the_rule_of_large_batches_can_fail(last, expected):
    def value(key):
        return 40.0 if key["batch"] <= last[key["strategy"]["name"]] else 80.0

    assert verdict("adpsgd_large_batch", value) == expected


@pytest.mark.parametrize(
    ("gossip", "bmuf", "expected"),
    [
        (29.9, 31.0, claim.REPRODUCED),
        (33.0, 34.0, claim.NOT_REPRODUCED),
        (29.9, 29.0, claim.NOT_REPRODUCED),
        (30.3, 31.0, claim.INCONCLUSIVE),
    ],
)
def test_the_rule_of_gossip_bmuf_can_fail(gossip, bmuf, expected):
    tests = {"local": 30.0, "bmuf": bmuf, "gossip_bmuf": gossip}

    def value(key):
        return tests[key["strategy"]["name"]]

    assert verdict("gossip_bmuf_quality", value) == expected


@pytest.mark.parametrize(
    ("sgd", "ng", "expected"),
    [
        ((1.0, 1.4), (1.0, 1.1), claim.REPRODUCED),
        ((1.0, 1.1), (1.0, 1.2), claim.NOT_REPRODUCED),
        ((1.0, 1.4), (1.2, 1.3), claim.NOT_REPRODUCED),
        ((1.0, 1.4), (1.0, 1.3), claim.INCONCLUSIVE),
    ],
)
def test_the_rule_of_natural_gradient_can_fail(sgd, ng, expected):
    def value(key):
        return (sgd if key["optim"] == "sgd" else ng)[key["ranks"] > 1]

    assert verdict("ng_averaging", value) == expected


@pytest.mark.parametrize(
    ("trained", "expected"),
    [
        (0.2, claim.REPRODUCED),
        (0.5, claim.NOT_REPRODUCED),
        (0.35, claim.INCONCLUSIVE),
    ],
)
def test_the_rule_of_rbms_can_fail(trained, expected):
    def value(key):
        return 1.0 + (key["ranks"] > 1) * (trained if key["init"] else 0.4)

    assert verdict("rbm_averaging", value) == expected


@pytest.mark.parametrize(
    ("measured", "many", "expected"),
    [
        (1.0, 30.5, claim.REPRODUCED),
        (1.3, 30.5, claim.NOT_REPRODUCED),
        (1.0, 40.0, claim.NOT_REPRODUCED),
        (1.2, 30.5, claim.INCONCLUSIVE),
    ],
)
def test_the_rule_of_the_rate_can_fail(measured, many, expected):
    def value(key):
        if key.get("part") == "quadratic":
            return {"measured": measured, "predicted": 1.0}
        return many if key["ranks"] > 1 else 30.0

    assert verdict("adpsgd_rate", value) == expected


@pytest.mark.parametrize(
    ("other", "expected"),
    [(1.2, claim.REPRODUCED), (0.9, claim.NOT_REPRODUCED), (1.0, claim.INCONCLUSIVE)],
)
def test_the_rule_of_period_batch_and_schedule_can_fail(other, expected):
    def value(key):
        return (
            other
            if key["strategy"]["period"] == 10
            else 1.0
            + (0.2 * (key["batch"] != 64 or key["schedule"]["name"] != "exponential"))
        )

    assert verdict("period_batch_schedule", value) == expected


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (0.03, claim.REPRODUCED),
        (0.20, claim.NOT_REPRODUCED),
        (0.07, claim.INCONCLUSIVE),
    ],
)
def test_the_rule_of_the_speedup_can_fail(error, expected):
    published = importlib.import_module("published_curves").SU_CHEN

    def value(key):
        speedup = published[1][0] / published[key["ranks"]][0]
        return {"speed-up": speedup * (1.0 + error), "efficiency": 0.9}

    assert verdict("averaging_speedup", value) == expected


@pytest.mark.parametrize(
    ("bmuf", "gossip", "seeds", "expected"),
    [
        (40.0, 10.0, 3, claim.REPRODUCED),
        (20.0, 30.0, 3, claim.NOT_REPRODUCED),
        (40.0, 10.0, 1, claim.INCONCLUSIVE),
        (40.0, 20.0, 3, claim.INCONCLUSIVE),
    ],
)
def test_the_rule_of_restricted_networks_can_fail(bmuf, gossip, seeds, expected):
    rows = []
    for name, slow in (("bmuf", bmuf), ("gossip_bmuf", gossip)):
        rows += seeds * [[name, 4, "10mbit", slow], [name, 4, "1gbit", 10.0]]
    assert verdict("restricted_network", lambda key: {"found": rows}) == expected


@pytest.mark.parametrize(
    ("asynchronous", "naive", "expected"),
    [
        (2.2, 4.3, claim.REPRODUCED),
        (2.2, 3.0, claim.NOT_REPRODUCED),
        (1.5, 4.3, claim.NOT_REPRODUCED),
        (2.2, 3.9, claim.INCONCLUSIVE),
    ],
)
def test_the_rule_of_sampled_traffic_can_fail(asynchronous, naive, expected):
    took = {"naive": naive, "asynchronous": asynchronous, "sampled": 2.0}

    def value(key):
        if key.get("of") == "seconds of a step":
            return {"naive": 0.2, "sampled": 0.1}
        if "of" in key:
            return {"found": {**took, "sampled asynchronous": 1.0}}
        seconds = took.get(key["system"], 1.0)
        return {"valid": 500.0, "curve": [[0.0, 900.0], [seconds, 510.0]]}

    assert verdict("sampled_traffic", value) == expected
