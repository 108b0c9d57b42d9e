"""`mpilm simulate`: training and protocols in the virtual world."""

from __future__ import annotations

import json

import h5py
import pytest

from mpilm.cli import main
from mpilm.config import resolve
from mpilm.data.synthetic import prepare_synthetic
from mpilm.learner.flat import Layout
from mpilm.simulate import simulation
from mpilm.strategies import STRATEGIES
from mpilm.world.machine import Link, allreduce, as_messages

LAYOUT = Layout.of([("a", (30, 20), "a"), ("b", (50, 40), "b"), ("c", (400,), "b")])
P = LAYOUT.size
MACHINE = {"latency_s": 1e-5, "bandwidth_Bps": 1e6, "step_s": 0.1}


def outcome(name, ranks=4, steps=10, *, machine=None, **settings):
    document = {
        "train": {"batch": 2, "unroll": 5},
        "strategy": {"name": name, **settings},
        "machine": {**MACHINE, **(machine or {})},
    }
    return simulation.simulate_protocol(resolve(document), LAYOUT, ranks, steps)


def test_without_communication_nothing_is_lost():
    alone = outcome("local", ranks=8)
    assert alone.samples_per_s == pytest.approx(8 * 10 / 0.1)
    assert alone.efficiency == pytest.approx(1.0)
    assert (alone.communication, alone.bytes_sent) == (0.0, 0)


def test_one_reduction_at_the_end_of_a_step_costs_what_the_machine_says():
    cost_s = allreduce(as_messages(Link(1e-5, 1e6)), 4, 4 * P).total_s
    averaged = outcome("model_averaging", period=1)
    assert averaged.seconds == pytest.approx(10 * (0.1 + cost_s))
    assert averaged.communication == pytest.approx(cost_s / (0.1 + cost_s))
    assert averaged.bytes_sent == pytest.approx(10 * 4 * 4 * P * 2 * 3 / 4)


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_a_scaled_protocol_takes_the_same_time(name, monkeypatch):
    settings = {"share": 0.5} if name == "sparta" else {}  # a number of parameters
    whole = outcome(name, **settings)
    monkeypatch.setattr(simulation, "PROTOCOL_PARAMETERS", P // 10)
    scaled = outcome(name, **settings)
    # a parameter server's shards end at segments: rounding moves some
    tolerance = 0.05 if name == "async_sgd" else 0.01
    assert scaled.seconds == pytest.approx(whole.seconds, rel=tolerance)
    assert scaled.bytes_sent == pytest.approx(whole.bytes_sent, rel=0.02)


@pytest.mark.parametrize(
    "strategy",
    [
        {"name": "adpsgd"},
        {"name": "async_sgd"},
        {"name": "hierarchical", "inner": "adpsgd", "node_size": 2},
    ],
    ids=lambda strategy: strategy["name"],
)
def test_out_of_lockstep_a_slow_rank_takes_fewer_of_the_steps(strategy):
    """As in training: the samples of all are given, not the steps of each."""
    document = {
        "train": {"batch": 2, "unroll": 5},
        "strategy": strategy,
        "machine": MACHINE | {"bandwidth_Bps": 1e9},
        "faults": {"slow": {"3": 20.0}},
    }
    found = simulation.simulate_protocol(resolve(document), LAYOUT, 4, 100)
    node = strategy.get("node_size", 1)
    assert 400 * 10 <= found.samples < (400 + node) * 10
    fast = 4 - node  # the node of the slow rank is as slow
    steps = 400 / (fast + node / 20)
    assert found.steps == pytest.approx(steps, rel=0.05)
    assert found.seconds <= steps * 0.1 * 1.05 + 20 * 0.1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("simulate")
    corpus = path / "corpus.h5"
    prepare_synthetic(corpus, vocab=30, tokens=40_000, seed=1, branching=4)
    (path / "train.toml").write_text(
        f'[data]\ncorpus = "{corpus}"\n[model]\nembed = 8\nhidden = 8\n'
        "[optim]\nlr = 1.0\n[train]\nbatch = 4\nunroll = 10\n"
        "[machine]\nstep_s = 0.01\n"
    )
    return path


def run(folder, *arguments):
    return main(["simulate", str(folder / "train.toml"), *map(str, arguments)])


@pytest.mark.long
def test_training_in_virtual_time(folder, capsys):
    out = folder / "co"
    assert run(folder, "--ranks", "2,16", "--steps", 10, "--out", out) == 0
    found = json.loads((out / "simulate.json").read_text())
    few, many = found["outcomes"]
    assert (few["samples"], many["samples"]) == (10 * 2 * 40, 10 * 16 * 40)
    assert few["seconds"] == pytest.approx(0.1, rel=0.05)
    assert 0.9 < many["efficiency"] < few["efficiency"] < 1.0
    assert few["loss"] < 3.5
    summary = json.loads((out / "ranks-0016" / "summary.json").read_text())
    assert summary["simulated"] is True
    assert not list((out / "ranks-0016" / "checkpoints").iterdir())
    printed = capsys.readouterr().out
    assert "seconds are virtual" in printed
    assert [line.split()[0] for line in printed.splitlines()[-2:]] == ["2", "16"]


@pytest.mark.long
def test_thousand_ranks_of_the_protocol_alone(folder, capsys):
    out = folder / "protocol"
    options = ("--protocol-only", "--steps", 5, "--set", "strategy.name=bmuf")
    assert run(folder, "--ranks", "8,1000", "--out", out, *options) == 0
    outcomes = json.loads((out / "simulate.json").read_text())["outcomes"]
    assert [o["ranks"] for o in outcomes] == [8, 1000]
    assert "bmuf, protocol only" in capsys.readouterr().out


def test_a_protocol_needs_no_corpus_and_several_strategies_one_call(tmp_path, capsys):
    config = tmp_path / "t.toml"
    config.write_text('[data]\ncorpus = "nowhere.h5"\n[model]\nembed=8\nhidden=8\n')
    out = tmp_path / "sim"
    options = ["--protocol-only", "--vocab", "500", "--ranks", "2,4", "--steps", "5"]
    options += ["--strategies", "allreduce,dpsgd", "--out", str(out)]
    assert main(["simulate", str(config), *options]) == 0
    found = {
        name: json.loads((out / name / "simulate.json").read_text())["outcomes"]
        for name in ("allreduce", "dpsgd")
    }
    assert [o["ranks"] for o in found["dpsgd"]] == [2, 4]
    whole = simulation.model_layout(
        resolve({"model": {"embed": 8, "hidden": 8}}), vocab=500
    )
    moved = 5 * 2 * 4 * whole.size  # an all-reduce of 2 ranks, twice half of it
    assert found["allreduce"][0]["bytes_sent"] == pytest.approx(moved, rel=0.02)
    page = tmp_path / "r.html"
    assert main(["report", str(out), "--out", str(page)]) == 0
    assert "<h2>Scaling</h2>" in page.read_text()
    acoustic = ["--set", "model.name=dnn", "--classes", "30", "--inputs", "440"]
    options = ["--protocol-only", "--ranks", "2", "--out", str(tmp_path / "am")]
    assert main(["simulate", str(config), *options, *acoustic]) == 0
    capsys.readouterr()
    for wrong in (["--vocab", "9", "--set", "model.name=dnn"], ["--classes", "9"]):
        assert main(["simulate", str(config), *options, *wrong]) == 2
        assert "its size is --" in capsys.readouterr().err
    assert main(["simulate", str(config), "--out", str(out), "--vocab", "9"]) == 2
    assert "--vocab: only with --protocol-only" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ranks", "0"], "write numbers"),
        (["--steps", "0"], "--steps 0: must be 1 or more"),
        (["--set", "machine.step_s=0.0"], "machine.step_s is 0"),
        (["--set", "faults.slow={9=2.0}"], "faults.slow.9"),
        (["--ranks", "2", "--set", "train.batch=30000"], "2 ranks x batch 30000"),
    ],
)
def test_bad_input_is_one_line(folder, capsys, options, message):
    assert run(folder, "--ranks", "2", "--out", folder / "bad", *options) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_a_simulation_takes_the_place_of_no_input(folder, capsys):
    out = folder / "own"
    (out / "ranks-0002").mkdir(parents=True)
    for name in ("simulate.json", "ranks-0002/config.toml"):
        (folder / "train.toml").rename(out / name)
        words = ["simulate", out / name, "--ranks", "2", "--out", out]
        before = (out / name).read_bytes()
        assert main([*map(str, words)]) == 2
        said = capsys.readouterr().err
        assert f"{out / name} is read, and would be written" in said
        assert said.count("\n") == 1
        assert (out / name).read_bytes() == before
        (out / name).rename(folder / "train.toml")


@pytest.mark.long
def test_an_evaluation_takes_the_time_that_the_machine_says(folder):
    out = folder / "evaluated"
    options = ["--ranks", "2", "--steps", "5", "--set", "train.test=false"]
    seconds = {}
    for eval_s in (0.0, 0.5):
        more = ["--set", f"machine.eval_s={eval_s}", "--out", out / str(eval_s)]
        assert run(folder, *options, *more) == 0
        path = out / str(eval_s) / "ranks-0002" / "summary.json"
        seconds[eval_s] = json.loads(path.read_text())
    none, some = seconds[0.0], seconds[0.5]
    assert some["train_seconds"] == pytest.approx(none["train_seconds"])
    with h5py.File(folder / "corpus.h5") as corpus:
        num_valid = len(corpus["splits/valid"])
    # two ranks share the split, and the slower one counts
    took_s = some["seconds"] - none["seconds"]
    assert took_s == pytest.approx(0.5 * num_valid / 2, rel=0.1)
