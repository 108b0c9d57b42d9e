"""`mpilm report`: what it reads from logs, and the page."""

from __future__ import annotations

import csv
import json
import re
import shutil
import struct
import subprocess
from dataclasses import asdict
from html.parser import HTMLParser

import numpy as np
import pytest

from mpilm.cli import main
from mpilm.config import resolve
from mpilm.report.charts import LEFT, LETTER, NARROW, RIGHT
from mpilm.report.export import crc
from mpilm.report.folders import read, read_all, short_names
from mpilm.report.groups import looks, pairs_of, series_of
from mpilm.report.page import page
from mpilm.report.timeline import timeline
from mpilm.simulate.machines import find_machine
from mpilm.storage.runlog import RunLog, write_summary
from mpilm.train.metrics import LOG_FIELDS

STEPS, EVERY, SAMPLES = 40, 2, 100


def write_run(
    folder, ranks=3, *, fields=LOG_FIELDS, slow=1, summary=True, more=None, **strategy
):
    """Write the folder of a run whose rank `slow` needs 2 s a step, the others 1 s.

    They wait for it at every step. In the second half rank 0 needs 1.25 s.

    Args:
        more: other sections of its configuration.
    """
    document = {"strategy": {"name": "allreduce", **strategy}, **(more or {})}
    config = resolve(document)
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
                begin_s = 2.0 * step - 2.0
                log.event("step", begin_s, begin_s + 2.0, step=step)
                log.event("compute", begin_s, begin_s + busy_s, step=step)
                if busy_s < 2.0:
                    log.event("wait", begin_s + busy_s, begin_s + 1.9, step=step)
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
    moments, shares = run.waiting()
    assert shares[0] == pytest.approx(1.0 / 3)
    assert shares[-1] == pytest.approx((0.375 + 0.5) / 3)
    assert moments[-1] == 2.0 * STEPS


def test_waiting_after_the_last_row_counts(tmp_path):
    """Out of lockstep the fast ranks wait at the end: the mean is the summary's."""
    folder = write_run(tmp_path / "x", ranks=2, slow=None)
    summary = json.loads((folder / "summary.json").read_text())
    end_s, waited_s = 3.0 * STEPS, [1.0 * STEPS + 30.0, 2.0 * STEPS]
    each = {"train_seconds": [end_s] * 2, "blocked_s": waited_s}
    write_summary(folder / "summary.json", {**summary, "per_rank": each})
    moments, shares = read(folder, "x").waiting()
    assert moments[-1] == end_s
    assert np.mean(shares) == pytest.approx(sum(waited_s) / (2 * end_s))


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
    found = Page(text)
    assert found.open == []
    assert found.links == []
    charts = 4 + 2 + 2 + 2 * 4  # loss, communication, staleness, ranks
    assert found.count["figure"] == charts
    assert text.count('class="wide"') == text.count('class="narrow"') == charts
    assert found.count["h2"] == 7  # they differ in more than ranks: no scaling
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
    runs, problems = read_all([tmp_path / "sim"])
    assert not problems
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
    names = [event["name"] for event in events if event["ph"] == "X"]
    assert names.count("evaluate") == 3 * STEPS // EVERY
    assert names.count("compute") == names.count("step") == 3 * STEPS
    capsys.readouterr()
    assert main(["report", str(one), str(two), *options]) == 2
    assert "--trace: is of one run, not of 2" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    for arguments in (["report", str(tmp_path / "empty")], ["report"]):
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


def speed(folder, samples_per_s, **more):
    """Change what a run's summary says."""
    summary = json.loads((folder / "summary.json").read_text())
    write_summary(
        folder / "summary.json", {**summary, "samples_per_s": samples_per_s, **more}
    )
    return folder


def test_runs_of_one_point_are_one_point_with_ends_and_others_none(tmp_path):
    """A straggler's run takes the place of no other; seeds are repetitions."""
    slow = {"faults": {"slow": {"1": 4.0}}}
    for name, ranks, found, more in (
        ("a", 2, 4500, {}),
        ("b", 4, 8993, {}),
        ("c", 4, 9007, {"train": {"seed": 2, "log_every": 5}}),
        ("d", 4, 4305, slow),
    ):
        speed(write_run(tmp_path / name, ranks, more=more), found)
    runs, _ = read_all([tmp_path])
    assert len(runs) == 4
    plain, slowed = series_of(runs)
    assert plain.points == {2: [4500], 4: [8993, 9007]}
    assert plain.efficiency() == ([2, 4], [1.0, 1.0])
    assert (slowed.name, slowed.points) == ("allreduce, slow 1=4", {4: [4305]})
    (pair,) = pairs_of(runs)
    assert [value for _, value in pair.without] == [8993, 9007]
    assert [value for _, value, _ in pair.slowed] == [4305]
    out = tmp_path / "r.html"
    assert main(["report", str(tmp_path), "--out", str(out)]) == 0
    text = out.read_text()
    assert "<h2>Stragglers</h2>" in text
    assert "4305/s, 48%: slow 1=4" in text


def test_a_simulation_is_compared_with_ranks_that_never_wait(tmp_path):
    """At a fifth of the declared speed it is 20%, on the fewest ranks too."""
    machine = {"machine": {"step_s": 0.5}, "train": {"batch": 10, "unroll": 5}}
    for ranks in (2, 4):
        folder = write_run(tmp_path / f"r{ranks}", ranks, more=machine)
        speed(folder, ranks * 50 / 0.5 / 5, simulated=True)
    runs, _ = read_all([tmp_path])
    (series,) = series_of(runs)
    assert series.efficiency() == ([2, 4], pytest.approx([0.2, 0.2]))


def test_the_numbers_of_a_machine_that_ships_are_its_name(tmp_path):
    def legend(**change):
        for name in ("ethernet_1g", "cloud_25g"):
            machine = asdict(find_machine(name).machine) | {"step_s": 0.5} | change
            for ranks in (2, 4):
                folder = tmp_path / f"{len(change)}-{name}-{ranks}"
                write_run(folder, ranks, more={"machine": machine})
                speed(folder, 100.0, simulated=True)
        out = tmp_path / "r.html"
        runs = tmp_path.glob(f"{len(change)}-*")
        assert main(["report", *map(str, runs), "--out", str(out)]) == 0
        part = out.read_text().partition("<h2>Scaling</h2>")[2]
        return re.findall(r"</svg>([^<]*)</li>", part.partition("<figure")[0])

    assert sorted(legend()) == ["allreduce, cloud_25g", "allreduce, ethernet_1g"]
    assert legend(latency_s=1.0)[0].startswith("allreduce, machine.bandwidth_Bps ")


def test_models_of_different_data_have_no_best(tmp_path):
    for name in ("a", "b"):
        more = {"data": {"corpus": f"{name}.h5"}}
        speed(write_run(tmp_path / name, 2, more=more), 100.0, valid_perplexity=9.0)
    runs, _ = read_all([tmp_path])
    text = page(runs, "both")
    assert "their losses are not comparable" in text
    table = text[text.index("<table") : text.index("</table>")]
    bold = re.findall(r'class="best">([^<]*)', table)
    assert "9.00" not in bold
    runs[1].config["data"]["corpus"] = "a.h5"
    assert 'class="best">9.00' in page(runs, "both")


def test_a_prediction_stands_below_what_was_measured(tmp_path):
    for kind in ("measured", "predicted"):
        for name in ("allreduce", "dpsgd"):
            folder = write_run(tmp_path / f"{kind}-{name}", 2, name=name)
            speed(folder, 100.0, simulated=kind == "predicted")
    runs, _ = read_all([tmp_path])
    text = page(runs, "both")
    groups = re.findall(r'<tr class="group"><th>([^<]*)</th>', text)
    assert groups == ["allreduce", "allreduce, simulated", "dpsgd", "dpsgd, simulated"]


def test_the_name_of_an_axis_has_room_on_a_phone(tmp_path):
    run = read(write_run(tmp_path / "x"), "x")
    names = re.findall(r'class="name"[^>]*>([^<]*)</text>', page([run], "x"))
    most = max(names, key=len)
    assert most.startswith("foreign mixes")
    middle = (LEFT + NARROW[0] - RIGHT) / 2
    assert middle + len(most) * LETTER / 2 < NARROW[0]


def test_a_key_names_the_runs_that_are_drawn_and_no_others(tmp_path):
    runs = [read(write_run(tmp_path / name), name) for name in ("drawn", "empty")]
    for log in runs[1].logs.values():
        log.rows = {name: values[:0] for name, values in log.rows.items()}
    runs[1].summary.clear()
    text = page(runs, "two runs")
    part = text[text.index("Loss and perplexity") : text.index("<h2>Communication")]
    assert ">drawn</li>" in part
    assert ">empty</li>" not in part


@pytest.mark.long
def test_many_runs_look_different_and_are_all_in_the_table(tmp_path):
    for number in range(18):
        strategy = ("allreduce", "dpsgd", "adpsgd")[number % 3]
        folder = write_run(tmp_path / f"run-{number:02}", 2, name=strategy)
        speed(folder, 1000.0 + number)
    runs, _ = read_all([tmp_path])
    assert len(set(looks(runs))) == 18
    out = tmp_path / "r.html"
    assert main(["report", str(tmp_path), "--out", str(out)]) == 0
    text = out.read_text()
    table = text[text.index("<table") : text.index("</table>")]
    assert len(re.findall(r'<tr data-run="\d+">', table)) == 18
    assert len(re.findall(r'<tr class="group">', table)) == 3


def test_a_single_row_is_no_curve_and_no_empty_panel(tmp_path):
    """The defaults of a short run: nothing is drawn of what has one point."""
    folder = write_run(tmp_path / "x", 1)
    run = read(folder, "x")
    for log in run.logs.values():
        log.rows = {name: values[-1:] for name, values in log.rows.items()}
        log.rows["valid_perplexity"] = np.array([np.nan])
    text = page([run], "one row")
    assert "Loss and perplexity" not in text
    assert "Scaling" not in text
    assert "Stragglers" not in text


def test_the_timeline_shows_steps_computing_and_waiting(tmp_path):
    run = read(write_run(tmp_path / "x"), "x")
    drawn = timeline(run)
    for words in ("compute", "wait", "update and mix"):
        assert f">{words}</text>" in drawn
    assert len(run.activities("wait")[1][0]) == 0  # all wait for rank 1
    for log in run.logs.values():
        log.events = {name: values[:0] for name, values in log.events.items()}
    assert timeline(run) == ""


def test_what_cannot_be_read_is_named_and_the_others_are_drawn(tmp_path, capsys):
    good, bad = write_run(tmp_path / "good"), write_run(tmp_path / "bad")
    (bad / "summary.json").write_text("{")
    out = tmp_path / "r.html"
    assert main(["report", str(good), str(bad), "--out", str(out)]) == 0
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "left out" in said
    assert "bad" in said
    assert "left out" in out.read_text()
    assert main(["report", str(bad), "--out", str(out)]) == 2
    assert f"{bad / 'summary.json'}: cut off? It is not JSON" in said
    (bad / "config.toml").write_text('[model]\nname = "lstm')
    assert main(["report", str(bad), "--out", str(out)]) == 2
    assert f"{bad / 'config.toml'}: cut off? It is not TOML" in capsys.readouterr().err


def test_a_protocol_that_was_simulated_is_drawn(tmp_path):
    outcomes = [
        {
            "ranks": ranks,
            "steps": 10,
            "samples": 1000 * ranks,
            "seconds": 10.0,
            "samples_per_s": 90.0 * ranks,
            "efficiency": 0.9,
            "communication": 0.1,
            "bytes_sent": 1000,
        }
        for ranks in (16, 64)
    ]
    config = resolve({}).to_dict()
    for name in ("allreduce", "dpsgd"):
        config["strategy"] = {"name": name}
        document = {"simulated": True, "config": config, "outcomes": outcomes}
        (tmp_path / "sim" / name).mkdir(parents=True)
        write_summary(tmp_path / "sim" / name / "simulate.json", document)
    out = tmp_path / "r.html"
    assert main(["report", str(tmp_path / "sim"), "--out", str(out)]) == 0
    text = out.read_text()
    assert "<h2>Scaling</h2>" in text
    assert text.count("ranks-0064") >= 2


def test_tables_for_other_programs(tmp_path, capsys):
    one, two = write_run(tmp_path / "x"), write_run(tmp_path / "y", ranks=2)
    csvs, events = tmp_path / "csv", tmp_path / "events"
    options = ["--csv", str(csvs), "--tensorboard", str(events)]
    out = str(tmp_path / "r.html")
    assert main(["report", str(one), str(two), "--out", out, *options]) == 0
    tables = {
        path.name: list(csv.DictReader(path.open(newline="")))
        for path in csvs.iterdir()
    }
    assert [row["run"] for row in tables["runs.csv"]] == ["x", "y"]
    assert float(tables["runs.csv"][0]["valid_perplexity"]) == 90.5
    assert len(tables["ranks.csv"]) == 5
    assert len(tables["log.csv"]) == 5 * STEPS // EVERY
    assert tables["log.csv"][0]["consensus_distance"] == ""  # not measured yet
    # records: a length, its sum, the data, its sum
    data = next((events / "x").iterdir()).read_bytes()
    tags, place = [], 0
    while place < len(data):
        (length,) = struct.unpack_from("<Q", data, place)
        body = data[place + 12 : place + 12 + length]
        (found,) = struct.unpack_from("<I", data, place + 12 + length)
        value = crc(body)
        assert found == ((value >> 15 | value << 17) + 0xA282EAD8) & 0xFFFFFFFF
        tags += re.findall(rb"train/loss|valid/perplexity|waiting", body)
        place += 16 + length
    assert place == len(data)
    assert set(tags) == {b"train/loss", b"valid/perplexity", b"waiting"}
    assert tags.count(b"valid/perplexity") == 6


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.mark.long
@pytest.mark.skipif(BROWSER is None, reason="no chromium here")
@pytest.mark.parametrize("width", [1280, 500])
def test_a_browser_finds_nothing_too_wide_and_the_table_sorts(tmp_path, width):
    """500 pixels: the least that Chromium's window has; the same rules as 390."""
    for number in range(6):
        strategy = ("allreduce", "dpsgd", "adpsgd")[number % 3]
        speed(write_run(tmp_path / f"run-{number}", 2, name=strategy), 9 - number)
    out = tmp_path / "r.html"
    assert main(["report", str(tmp_path), "--out", str(out)]) == 0
    probe = """<script>addEventListener("load", () => {
      const shown = [...document.querySelectorAll("figure svg")]
        .filter(svg => svg.getBoundingClientRect().width > 0);
      const heads = document.querySelectorAll("table.sorts thead th");
      [...heads].find(h => h.textContent === "samples/s").click();
      const rows = [...document.querySelector("table.sorts").tBodies[0].rows];
      const result = [
        document.documentElement.scrollWidth <= innerWidth,
        shown.every(svg => svg.viewBox.baseVal.width <= 1.2 * svg.clientWidth),
        new Set(shown.map(svg => svg.className.baseVal)).size,
        shown[0].className.baseVal,
        [...document.querySelectorAll(".scroll")].filter(box => box.clientWidth > 0)
          .every(box => box.classList.contains("to-right")
            === box.scrollWidth > box.clientWidth + 2),
        rows.filter(row => !row.hidden).map(row => row.dataset.run).join(""),
      ];
      document.body.innerHTML = `<p id="result">${result.join(" ")}</p>`;
    });</script>"""
    out.write_text(out.read_text().replace("</body>", probe + "</body>"))
    command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu"]
    command += [f"--window-size={width},2000", "--virtual-time-budget=5000"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", out.as_uri()]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False
    )
    result = re.search(r'<p id="result">(.*?)</p>', done.stdout)
    assert result, done.stderr
    kind = "wide" if width == 1280 else "narrow"
    # the runs in the page's order: run-0, run-3, run-1, run-4, run-2, run-5
    assert result[1] == f"true true 1 {kind} true 024135"
