"""`mpilm report`: what it reads from logs, and the page."""

from __future__ import annotations

import json
from html.parser import HTMLParser

import numpy as np
import pytest

from mpilm.cli import main
from mpilm.config import resolve
from mpilm.report.reader import read, read_all, short_names
from mpilm.storage.runlog import RunLog, write_summary
from mpilm.train.metrics import LOG_FIELDS

STEPS, EVERY, SAMPLES = 40, 2, 100


def write_run(folder, ranks=3, *, fields=LOG_FIELDS, slow=1, summary=True, **strategy):
    """Write the folder of a run whose rank `slow` needs 2 s a step, the others 1 s.

    They wait for it at every step. In the second half rank 0 needs 1.25 s.
    """
    config = resolve({"strategy": {"name": "allreduce", **strategy}})
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(config.to_toml())
    for rank in range(ranks):
        path = folder / "log" / f"rank-{rank:04d}.h5"
        with RunLog(path, rank, fields) as log:
            blocked_s = 0.0
            for step in range(1, STEPS + 1):
                busy_s = 2.0 if rank == slow else 1.0
                if rank == 0 and step > STEPS // 2:
                    busy_s = 1.25
                blocked_s += 2.0 - busy_s
                row = {
                    "step": step,
                    "samples": step * SAMPLES,
                    "seconds": 2.0 * step,
                    "loss": 5.0 - 0.05 * step,
                    "blocked_s": blocked_s,
                    "bytes_sent": 1000 * step,
                    "valid_perplexity": 100.0 - step // 10,
                    "consensus_step": step // 20 * 20,
                    "consensus_distance": 3.0 + rank if step >= 20 else np.nan,
                    "staleness": [2 * step, step] + [0] * 15,
                }
                if step % EVERY == 0:
                    log.row(**{k: v for k, v in row.items() if k in fields})
                    log.event("evaluate", 2.0 * step, 2.0 * step + 0.5, step=step)
    if summary:
        found = {"samples": ranks * STEPS * SAMPLES, "train_seconds": 2.0 * STEPS}
        found |= {"valid_perplexity": 90.5, "samples_per_s": ranks * SAMPLES / 2}
        write_summary(folder / "summary.json", {**found, "ranks": ranks})
    return folder


class Page(HTMLParser):
    """Counts elements, checks that they nest, keeps what would need a network."""

    def __init__(self, text):
        super().__init__()
        self.open, self.count, self.links = [], {}, []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.count[tag] = self.count.get(tag, 0) + 1
        if tag not in {"meta", "link", "br"}:
            self.open.append(tag)
        names = {"src", "href", "xlink:href"}
        self.links += [v for k, v in attrs if k in names and not v.startswith("#")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_curve_is_of_all_ranks_together(tmp_path):
    run = read(write_run(tmp_path / "x"), "x")
    curve = run.curve()
    assert curve.seconds[[0, -1]].tolist() == [2.0 * EVERY, 2.0 * STEPS]
    assert np.allclose(curve.samples, 3 * SAMPLES / 2 * curve.seconds)
    assert np.all(np.diff(curve.loss) < 0)
    # two of three wait for half of the time, then one of them less
    assert curve.waiting[0] == pytest.approx(1.0 / 3)
    assert curve.waiting[-1] == pytest.approx((0.375 + 0.5) / 3)


def test_measures_are_points_where_they_were_made(tmp_path):
    run = read(write_run(tmp_path / "x"), "x")
    samples, seconds, values = run.measured("valid_perplexity")
    assert values.tolist() == [100.0, 99.0, 98.0, 97.0, 96.0, 90.5]
    assert seconds[1] == 2.0 * 10
    assert samples[1] == 3 * 10 * SAMPLES
    assert (samples[-1], seconds[-1]) == (3 * STEPS * SAMPLES, 2.0 * STEPS)
    _, seconds, distances = run.consensus()
    assert seconds.tolist() == [40.0, 80.0]
    assert distances == pytest.approx([np.sqrt((9 + 16 + 25) / 3)] * 2)
    assert run.staleness()[:3].tolist() == [3 * 2 * STEPS, 3 * STEPS, 0]


def test_stragglers_have_low_scores(tmp_path):
    run = read(write_run(tmp_path / "x"), "x")
    first, slow, good = run.rank_rows()
    assert good.relative == 1.0
    assert slow.relative == pytest.approx(0.5)
    assert first.relative == pytest.approx(1.0 / 1.125)
    assert first.individual == pytest.approx(0.8)
    assert (good.individual, slow.individual) == pytest.approx((1.0, 1.0))
    assert (slow.waiting, good.waiting) == pytest.approx((0.0, 0.5))
    assert good.samples_per_s == pytest.approx(SAMPLES / 2)


def test_the_page_is_whole_and_needs_no_network(tmp_path, capsys):
    one = write_run(tmp_path / "a" / "x")
    two = write_run(tmp_path / "b" / "x", ranks=2, bucket_bytes=1 << 20)
    out = tmp_path / "new" / "report.html"
    title = "Ranks < 4 & more"
    assert (
        main(["report", str(one), str(two), "--out", str(out), "--title", title]) == 0
    )
    text = out.read_text()
    page = Page(text)
    assert page.open == []
    assert page.links == []
    assert page.count["svg"] == 6  # loss, scaling, communication, staleness, 2 x ranks
    assert page.count["h2"] == 8
    assert "<h1>Ranks &lt; 4 &amp; more</h1>" in text
    assert "strategy.bucket_bytes" in text
    assert "a/x" in text
    assert '<td class="slow">0.50</td>' in text
    assert "report.html: 2 runs" in capsys.readouterr().out


def test_an_old_log_and_a_run_under_way_are_drawn_too(tmp_path):
    fields = ("step", "samples", "seconds", "loss", "blocked_s", "bytes_sent")
    old = {name: LOG_FIELDS[name] for name in fields}
    run = write_run(tmp_path / "old", fields=old, summary=False)
    out = tmp_path / "r.html"
    assert main(["report", str(run), "--out", str(out)]) == 0
    text = out.read_text()
    assert "not complete" in text
    assert "Staleness" not in text
    assert Page(text).open == []


@pytest.mark.long
def test_runs_of_a_simulation_are_named_and_marked(tmp_path):
    for ranks in (2, 4):
        folder = write_run(tmp_path / "sim" / f"ranks-{ranks:04d}", ranks=ranks)
        summary = json.loads((folder / "summary.json").read_text())
        write_summary(folder / "summary.json", {**summary, "simulated": True})
    write_summary(tmp_path / "sim" / "simulate.json", {})
    runs = read_all([tmp_path / "sim"])
    assert [(run.name, run.simulated) for run in runs] == [
        ("ranks-0002", True),
        ("ranks-0004", True),
    ]
    out = tmp_path / "r.html"
    assert main(["report", str(tmp_path / "sim"), "--out", str(out)]) == 0
    text = out.read_text()
    assert '<span class="tag">simulated</span>' in text
    assert "<h2>Scaling</h2>" in text


def test_names_tell_runs_apart(tmp_path):
    paths = [tmp_path / "a" / "x", tmp_path / "b" / "x"]
    assert short_names(paths) == ["a/x", "b/x"]
    assert short_names([paths[0], paths[0]]) == ["x", "x"]


@pytest.mark.long
def test_the_trace_is_of_one_run(tmp_path, capsys):
    one, two = write_run(tmp_path / "x"), write_run(tmp_path / "y")
    out, trace = str(tmp_path / "r.html"), tmp_path / "trace.json"
    options = ["--out", out, "--trace", str(trace)]
    assert main(["report", str(one), *options]) == 0
    events = json.loads(trace.read_text())["traceEvents"]
    assert sum(event["ph"] == "X" for event in events) == 3 * STEPS // EVERY
    capsys.readouterr()
    assert main(["report", str(one), str(two), *options]) == 2
    assert "--trace: is of one run, not of 2" in capsys.readouterr().err
    for arguments in (["report", str(tmp_path)], ["report"]):
        assert main([*arguments, "--out", out]) == 2
        assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.long
def test_a_report_takes_the_place_of_no_input(tmp_path, capsys):
    run, sim = write_run(tmp_path / "x"), tmp_path / "sim"
    write_run(sim / "ranks-0002")
    write_summary(sim / "simulate.json", {})
    (tmp_path / "link").symlink_to("x/config.toml")
    new = ["--out", str(tmp_path / "r.html"), "--trace"]
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for arguments in (
        *([run, "--out", run / name] for name in ("config.toml", "log/rank-0001.h5")),
        [run, "--out", tmp_path / "link"],
        [sim, "--out", sim / "simulate.json"],
        [sim, "--out", sim / "ranks-0002/summary.json"],
        [run, "--out", tmp_path],
        [run, *new, run / "summary.json"],
        [run, *new, tmp_path / "r.html"],
    ):
        assert main(["report", *map(str, arguments)]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    for _ in range(2):  # in the run's folder, beside its own files
        assert main(["report", str(run), "--out", str(run / "report.html")]) == 0
