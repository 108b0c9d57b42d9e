"""`mpilm plan`: which strategy, period and batch, and why."""

from __future__ import annotations

import json

import pytest

from mpilm.cli import main
from mpilm.config import read_config, resolve
from mpilm.data.synthetic import prepare_synthetic
from mpilm.learner.flat import Layout
from mpilm.simulate import plan, simulation

LAYOUT = Layout.of([("a", (40, 20), "a"), ("b", (50, 40), "b")])
MACHINE = {"latency_s": 1e-5, "bandwidth_Bps": 1e6, "step_s": 0.1}


def drift(name, ranks=4, steps=40, machine=None, **settings):
    document = {
        "train": {"batch": 2, "unroll": 5},
        "strategy": {"name": name, **settings},
        "machine": {**MACHINE, **(machine or {})},
    }
    config = resolve(document)
    return simulation.simulate_protocol(config, LAYOUT, ranks, steps).drift


@pytest.mark.parametrize("ranks", [2, 4, 40])
def test_drift_counts_the_steps_since_all_were_equal(ranks):
    assert drift("allreduce", ranks) == pytest.approx(0.0, abs=1e-4)
    # after 0, 1, ..., 9 steps alone
    assert drift("model_averaging", ranks, period=10) == pytest.approx(4.5, rel=1e-3)
    assert drift("bmuf", ranks, period=10) == pytest.approx(4.5, rel=1e-3)
    # 21 to 40 steps alone
    assert drift("local", ranks) == pytest.approx(30.5, rel=1e-3)


def test_drift_grows_where_the_network_lets_ranks_mix_less_often():
    fast, slow = (
        drift("adpsgd", machine={"bandwidth_Bps": bandwidth})
        for bandwidth in (1e8, 2e4)
    )
    assert 0.0 < fast < slow / 2


def rows(machine, **settings):
    config = resolve({"machine": machine, "train": {"batch": 20}, **settings})
    names = plan.default_strategies(config, 4)
    found = plan.candidates(config, names, (2, 10, 50), {20: 0.0})
    found = [plan.Row(candidate) for candidate in found]
    for row in found:
        plan.play(config, row, LAYOUT, 4)
    return config, found


@pytest.mark.long
def test_a_fast_network_asks_for_little_drift_a_slow_one_for_few_bytes():
    _, fast = rows({**MACHINE, "bandwidth_Bps": 1e9, "step_s": 0.1})
    _, slow = rows({**MACHINE, "bandwidth_Bps": 1e3, "step_s": 0.1})
    assert all(row.why == "" for row in fast)
    by_name = {row.candidate.strategy: row for row in fast}
    best = plan.ranked(fast)[0]
    assert best.spoken.drift < 0.5
    assert best.promise >= by_name["allreduce"].promise > 0.95 * best.promise
    best = plan.ranked(slow)[0]
    allreduce = next(row for row in slow if row.candidate.strategy == "allreduce")
    assert best.spoken.efficiency > 10 * allreduce.spoken.efficiency
    sentences = "\n".join(plan.reasons(plan.ranked(slow), 1.0))
    assert "allreduce, batch 20, loses: it is slower" in sentences
    assert "Nothing was trained" in sentences


def test_half_the_batch_takes_half_the_time_unless_it_is_said_to_take_another():
    config = resolve({"machine": MACHINE, "train": {"batch": 20}})
    batches = {10: 0.0, 20: 0.0, 40: 0.15}
    found = plan.candidates(config, ["bmuf"], (5,), batches)
    assert [(c.batch, c.step_s) for c in found] == [(10, 0.05), (20, 0.1), (40, 0.15)]
    one = found[2].applied(config)
    assert (one.train.batch, one.machine.step_s) == (40, 0.15)
    assert one.strategy.settings.period == 5


def test_settings_of_the_configured_strategy_stay_those_of_others_do_not_mix():
    given = {"name": "bmuf", "eta": 0.25, "wire": "bfloat16", "period": 7}
    config = resolve({"strategy": given})
    same, other, node = (
        plan.Candidate(name, 3, 20, 0.1).applied(config).strategy.settings
        for name in ("bmuf", "eager_diloco", "hierarchical")
    )
    assert (same.eta, same.period, same.wire) == (0.25, 3, "bfloat16")
    assert (other.period, other.wire) == (3, "bfloat16")
    assert other.eta != 0.25
    assert (node.inner, node.settings["period"]) == ("gossip_bmuf", 3)


def test_what_cannot_run_leaves_the_others_alone():
    _, found = rows(MACHINE, model={"sparse": True})
    assert any(row.spoken for row in found)
    config = resolve({"machine": MACHINE, "faults": {"slow": {"7": 2.0}}})
    row = plan.Row(plan.Candidate("bmuf", 2, 20, 0.1))
    plan.play(config, row, LAYOUT, 4)
    assert row.spoken is None
    assert "there are only 4 ranks" in row.why
    assert any("cannot run: " in line for line in plan.table([row]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("plan")
    corpus = path / "corpus.h5"
    prepare_synthetic(corpus, vocab=30, tokens=40_000, seed=1, branching=4)
    (path / "train.toml").write_text(
        f'[data]\ncorpus = "{corpus}"\n[model]\nembed = 8\nhidden = 8\n'
        "[optim]\nlr = 1.0\n[train]\nbatch = 4\nunroll = 10\n"
        "[machine]\nstep_s = 0.01\n"
    )
    return path


def run(folder, *arguments):
    return main(["plan", str(folder / "train.toml"), *map(str, arguments)])


@pytest.mark.long
def test_the_lowest_loss_at_equal_time_is_written(folder, capsys):
    out, found = folder / "planned.toml", folder / "plan.json"
    options = ["--ranks", 3, "--machine", "ethernet_1g", "--steps", 20]
    options += ["--strategies", "allreduce,bmuf,adpsgd", "--periods", "4"]
    options += ["--set", "machine.step_s=0.01", "--out", out, "--json", found]
    assert run(folder, *options) == 0
    printed = capsys.readouterr().out
    document = json.loads(found.read_text())
    trained = [row for row in document["rows"] if row["trained"]]
    assert {r["candidate"]["strategy"] for r in trained} == {
        "allreduce",
        "bmuf",
        "adpsgd",
    }
    best = min(trained, key=lambda row: row["trained"]["perplexity"])
    assert best is trained[0]
    for row in trained:  # everybody had the same time
        assert row["trained"]["seconds"] == pytest.approx(0.2, rel=0.2)
    chosen = best["candidate"]
    config = read_config(out)
    assert config.strategy.name == chosen["strategy"]
    assert config.train.batch == chosen["batch"]
    assert config.machine.bandwidth_Bps == 117.7e6
    assert f"a perplexity of {best['trained']['perplexity']:.2f}" in printed
    assert "training 1/3" not in printed  # on stderr


@pytest.mark.long
def test_stored_curves_take_the_place_of_training(folder, capsys):
    """On the machine that the curves are of they give what was reached there."""
    machine = ["--machine", "ethernet_1g", "--set", "machine.step_s=0.01"]
    config, out = str(folder / "train.toml"), folder / "curves"
    words = ["simulate", config, *machine, "--ranks", "2", "--out", str(out)]
    words += ["--strategies", "allreduce,bmuf,adpsgd"]
    words += ["--set", "train.valid_every=800"]
    assert main([*words, "--set", "train.samples=4800"]) == 0
    found, planned = folder / "curves.json", folder / "curved.toml"
    options = [*machine, "--json", found, "--out", planned, "--curves", out]
    capsys.readouterr()
    assert run(folder, "--ranks", 2, *options) == 0
    printed = capsys.readouterr()
    document = json.loads(found.read_text())
    rows = {row["candidate"]["strategy"]: row["trained"] for row in document["rows"]}
    ends = {
        name: json.loads((out / name / "ranks-0002" / "summary.json").read_text())
        for name in ("allreduce", "bmuf")
    }
    # the faster one has just ended then, and the other is on its way
    times = {name: end["train_seconds"] for name, end in ends.items()}
    first = min(times, key=times.get)
    assert document["budget_s"] == pytest.approx(times[first], rel=0.05)
    end = ends[first]["valid_perplexity"]
    assert rows[first]["perplexity"] == pytest.approx(end, rel=1e-6)
    best = min(rows, key=lambda name: rows[name]["perplexity"])
    assert read_config(planned).strategy.name == best
    assert "as it did before" in printed.out
    assert "adpsgd mixes as often as its network lets it" in printed.err
    assert "training" not in printed.err
    assert run(folder, "--ranks", 2, *options, "--steps", 9999) == 2
    assert "its curve ends at 4,800" in capsys.readouterr().err
    for words, said in (
        (["--ranks", 3], "(3 runs left out)"),
        (["--ranks", 2, "--set", "model.hidden=9"], "model.hidden is 8 there, 9 here"),
        (["--ranks", 2, "--periods", "2"], "no --strategies, --periods"),
    ):
        assert run(folder, *words, *options) == 2
        told = capsys.readouterr().err
        assert said in told
        assert told.count("\n") == 1


def test_speed_alone_needs_no_corpus(folder, capsys):
    config = folder / "none.toml"
    config.write_text('[data]\ncorpus = "nowhere.h5"\n[model]\nembed=8\nhidden=8\n')
    words = ["plan", str(config), "--ranks", "4", "--strategies", "allreduce,sgp"]
    assert main([*words, "--throughput", "--vocab", "500"]) == 0
    assert "allreduce" in capsys.readouterr().out
    assert main([*words, "--throughput"]) == 2
    assert "nowhere.h5" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ranks", "0"], "--ranks 0: must be 1 or more"),
        (["--ranks", "4", "--steps", "0"], "--steps 0: must be 1 or more"),
        (["--ranks", "4", "--finalists", "0"], "--finalists 0: must be 1 or more"),
        (["--ranks", "4", "--strategies", "bmfu"], "did you mean 'bmuf'?"),
        (["--ranks", "4", "--periods", "2,x"], "--periods 2,x: write numbers"),
        (["--ranks", "4", "--batches", "20=-1"], "--batches 20=-1: write numbers"),
        (["--ranks", "4", "--machine", "none"], "--machine none: no such file"),
        (["--ranks", "4", "--vocab", "9"], "--vocab, --classes: only with"),
        (["--ranks", "4", "--set", "machine.step_s=0"], "machine.step_s is 0"),
        (["--ranks", "2", "--set", "faults.slow={7=2.0}"], "there are only 2 ranks"),
        (["--ranks", "2", "--out", "CONFIG"], "is"),
    ],
)
def test_bad_input_is_one_line(folder, capsys, words, message):
    config = str(folder / "train.toml")
    before = (folder / "train.toml").read_text()
    assert main(["plan", config, *(config if w == "CONFIG" else w for w in words)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert message in said
    assert (folder / "train.toml").read_text() == before
