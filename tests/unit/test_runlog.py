"""The log of a rank, the summary, the trace."""

from __future__ import annotations

import json
import math
import os
import random
import resource
import signal
import threading
import time

import h5py
import numpy as np
import pytest

from mpilm.errors import CheckpointError
from mpilm.storage import runlog
from mpilm.storage.runlog import RunLog, chrome_trace, read_log, read_run, write_summary

FIELDS = {"step": "i8", "loss": "f8", "bytes_sent": "i8", "staleness": "4i4"}


def fill(log, start, stop):
    """Write a row and an event for each step from `start` to `stop`, both included."""
    for step in range(start, stop + 1):
        log.row(step=step, loss=step / 2, bytes_sent=8 * step, staleness=[step] * 4)
        log.event("compute", step, step + 0.5, step=step)


def assert_filled(log, stop):
    """Assert that rows and events are those of `fill` from 1 to `stop`."""
    steps = np.arange(1, stop + 1)
    assert (log.rows["step"] == steps).all()
    assert (log.rows["loss"] == steps / 2).all()
    assert (log.rows["bytes_sent"] == 8 * steps).all()
    assert (log.rows["staleness"] == steps[:, None]).all()
    assert log.rows["staleness"].shape == (stop, 4)
    assert (log.events["step"] == steps).all()


def test_what_was_written_is_read(tmp_path):
    for rank in 0, 1:
        with RunLog(tmp_path / "log" / f"rank-{rank:04d}.h5", rank, FIELDS) as log:
            fill(log, 1, 10)
            log.event("checkpoint", 20.0, 21.5, step=10, activity="na\u00efve")
            log.row(step=11)
    logs = read_run(tmp_path)
    assert list(logs) == [0, 1]
    log = logs[1]
    assert log.rank == 1
    assert log.rows["step"].tolist() == list(range(1, 12))
    assert math.isnan(log.rows["loss"][-1])
    assert log.rows["bytes_sent"][-1] == -1
    assert log.rows["staleness"][-1].tolist() == [-1] * 4
    assert log.events["name"].tolist() == ["compute"] * 10 + ["checkpoint"]
    assert log.events["activity"][-1] == "na\u00efve"
    assert (log.events["start_s"][-1], log.events["stop_s"][-1]) == (20.0, 21.5)


def test_anyone_can_read_a_closed_log_without_mpilm(tmp_path):
    with RunLog(tmp_path / "r.h5", 0, FIELDS) as log:
        fill(log, 1, 10)
    with h5py.File(tmp_path / "r.h5") as file:
        assert file["rows"]["loss"].tolist() == [n / 2 for n in range(1, 11)]
        assert len(file["events"]) == 10
    assert (tmp_path / "r.h5").stat().st_size < 10_000


def test_an_empty_log(tmp_path):
    with RunLog(tmp_path / "r.h5", 3, FIELDS):
        pass
    log = read_log(tmp_path / "r.h5")
    assert (log.rank, len(log.rows["step"]), len(log.events["name"])) == (3, 0, 0)


def test_a_running_log_is_readable_up_to_the_last_flush(tmp_path):
    with RunLog(tmp_path / "r.h5", 0, FIELDS, flush_rows=7, flush_s=1e9) as log:
        for num, visible in (6, 0), (7, 7), (13, 7), (14, 14):
            fill(log, len(log.rows.waiting) + log.rows.num + 1, num)
            assert len(read_log(tmp_path / "r.h5").rows["step"]) == visible
        fill(log, 15, 16)
        log.flush()
        assert_filled(read_log(tmp_path / "r.h5"), 16)


def test_rows_are_flushed_after_some_time(tmp_path):
    with RunLog(tmp_path / "r.h5", 0, FIELDS, flush_s=0.02) as log:
        log.row(step=1)
        time.sleep(0.03)
        log.row(step=2)
        assert len(read_log(tmp_path / "r.h5").rows["step"]) == 2


@pytest.mark.parametrize("flush_rows", [1, 3, 1000])
def test_it_grows(tmp_path, monkeypatch, flush_rows):
    monkeypatch.setattr(runlog, "ROOM", 5)
    with RunLog(tmp_path / "r.h5", 0, FIELDS, flush_rows=flush_rows) as log:
        fill(log, 1, 300)
        for _ in range(50):
            log.event("communicate", 0, 1, step=300)
    log = read_log(tmp_path / "r.h5")
    log.events["step"] = log.events["step"][:300]
    assert_filled(log, 300)
    assert log.events["name"][299:].tolist() == ["compute"] + ["communicate"] * 50
    assert [path.name for path in tmp_path.iterdir()] == ["r.h5"]


def test_resume_drops_what_is_newer_and_goes_on(tmp_path):
    path = tmp_path / "r.h5"
    with RunLog(path, 0, FIELDS) as log:
        fill(log, 1, 25)
    with RunLog(path, 0, FIELDS, from_step=20) as log:
        assert_filled(read_log(path), 20)
        fill(log, 21, 30)
    again = read_log(path)
    assert_filled(again, 30)
    # the clock of the second launch began at zero again: it is moved behind the first
    assert (np.diff(again.events["start_s"]) > 0).all()
    assert again.events["start_s"][20] == again.events["stop_s"][19] + 21


def test_resume_without_a_log_begins_one(tmp_path):
    with RunLog(tmp_path / "r.h5", 0, FIELDS, from_step=20) as log:
        log.row(step=21)
    assert read_log(tmp_path / "r.h5").rows["step"].tolist() == [21]


def test_a_new_run_begins_anew_whatever_is_there(tmp_path):
    path = tmp_path / "r.h5"
    path.write_text("not HDF5")
    with RunLog(path, 0, FIELDS) as log:
        fill(log, 1, 2)
    assert_filled(read_log(path), 2)


def test_resume_with_fewer_fields_or_other_types_is_refused(tmp_path):
    path = tmp_path / "r.h5"
    with RunLog(path, 0, FIELDS) as log:
        fill(log, 1, 2)
    with pytest.raises(CheckpointError, match=f"{path}: a log with other fields"):
        RunLog(path, 0, {"step": "i8", "loss": "f8"}, from_step=2)
    with pytest.raises(CheckpointError, match="a log with other fields"):
        RunLog(path, 0, {**FIELDS, "loss": "f4"}, from_step=2)
    assert_filled(read_log(path), 2)


def test_resume_with_new_fields_does_not_know_them_before(tmp_path):
    path = tmp_path / "r.h5"
    with RunLog(path, 0, FIELDS) as log:
        fill(log, 1, 3)
    new = {"step": "i8", "first": "3i8", **FIELDS, "more": "f8"}
    with RunLog(path, 0, new, from_step=2) as log:
        fill(log, 3, 3)
        log.row(step=4, loss=2.0, bytes_sent=32, staleness=[4] * 4, more=0.5)
    log = read_log(path)
    assert log.rows["step"].tolist() == [1, 2, 3, 4]
    assert log.rows["loss"].tolist() == [0.5, 1.0, 1.5, 2.0]
    assert np.array_equal(log.rows["more"], [math.nan] * 3 + [0.5], equal_nan=True)
    assert (log.rows["first"] == -1).all()


@pytest.mark.parametrize("values", [{}, {"loss": 1.0}, {"step": 1, "lr": 1.0}])
def test_a_row_of_other_fields_is_refused(tmp_path, values):
    with (
        RunLog(tmp_path / "r.h5", 0, FIELDS) as log,
        pytest.raises(ValueError, match="row"),
    ):
        log.row(**values)


def test_a_summary_has_a_line_for_a_list_of_numbers(tmp_path):
    summary = {"a": [1, 2.5, math.nan], "text": "[ 1,  2 ]", "b": [[1, -2e9], [3]]}
    write_summary(tmp_path / "s.json", summary)
    text = (tmp_path / "s.json").read_text()
    assert '"a": [ 1, 2.5, null ],' in text
    assert json.loads(text) == {**summary, "a": [1, 2.5, None]}


def test_two_activities_share_a_log(tmp_path):
    with RunLog(tmp_path / "r.h5", 0, FIELDS, flush_rows=2) as log:

        def mix():
            for step in range(2000):
                log.event("mix", step, step, step=step, activity="mixer")

        thread = threading.Thread(target=mix)
        thread.start()
        fill(log, 1, 2000)
        thread.join()
    log = read_log(tmp_path / "r.h5")
    for name, steps in ("mix", range(2000)), ("compute", range(1, 2001)):
        mine = log.events["name"] == name
        assert log.events["step"][mine].tolist() == list(steps)
    assert log.rows["step"].tolist() == list(range(1, 2001))


def log_until_killed(path, first, report):
    with RunLog(path, 0, FIELDS, from_step=first - 1, flush_s=1e9) as log:
        step = first
        while True:
            end = step + random.randrange(500)
            fill(log, step, end)
            log.flush()
            os.write(report, end.to_bytes(8, "little"))
            step = end + 1


@pytest.mark.long
def test_killed_at_any_moment_it_is_readable_up_to_the_last_flush(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(runlog, "ROOM", 100)
    path, random_s = tmp_path / "r.h5", random.Random(1)
    last = 0
    for _ in range(20):
        read_end, write_end = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                log_until_killed(path, last + 1, write_end)
            finally:
                os._exit(1)
        os.close(write_end)
        reported = [os.read(read_end, 8)]
        time.sleep(random_s.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        while step := os.read(read_end, 8):
            reported.append(step)
        os.close(read_end)
        log = read_log(path)
        assert len(log.rows["step"]) >= int.from_bytes(reported[-1], "little")
        assert_filled(log, len(log.rows["step"]))
        last = random_s.randint(1, len(log.rows["step"]))


def test_disk_full_is_one_line_and_what_is_flushed_stays(tmp_path):
    path = tmp_path / "r.h5"
    child = os.fork()
    if child == 0:
        code = 1
        try:
            log = RunLog(path, 5, FIELDS, flush_rows=10)
            behind_rows = log.events.offset
            limit = behind_rows + 200 * log.events.dtype.itemsize
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            with pytest.raises(CheckpointError) as caught:
                fill(log, 1, 10**6)
            line = f"{path}: cannot write the log: File too large"
            assert str(caught.value) == line
            with pytest.raises(CheckpointError):
                log.close()
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    log = read_log(path)
    assert log.rows["step"].tolist() == list(range(1, 201))
    assert log.events["step"].tolist() == list(range(1, 200))


def test_no_place_for_the_last_copy_is_no_error(tmp_path, monkeypatch):
    """Closing gives back unused room by copying; a full disk has no place for that."""
    log = RunLog(tmp_path / "r.h5", 0, FIELDS)
    fill(log, 1, 10)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runlog, "create_hdf5", full)
    log.close()
    assert_filled(read_log(tmp_path / "r.h5"), 10)


def test_a_log_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "log").write_text("")
    with pytest.raises(CheckpointError, match=r"/log/r.h5: cannot write"):
        RunLog(tmp_path / "log" / "r.h5", 2, FIELDS)


def test_truncated_and_foreign_logs_are_named(tmp_path):
    path = tmp_path / "log" / "rank-0000.h5"
    with RunLog(path, 0, FIELDS) as log:
        fill(log, 1, 10)
    whole = path.read_bytes()
    for content in whole[:-1], whole[:500], whole[:3], b"", b"text" * 100:
        path.write_bytes(content)
        for read in (
            lambda: read_log(path),
            lambda: read_run(tmp_path),
            lambda: RunLog(path, 0, FIELDS, from_step=5),
        ):
            with pytest.raises(CheckpointError, match=f"^{path}: [^\n]*$"):
                read()
    with h5py.File(path, "w") as file:
        file["rows"] = 1
    with pytest.raises(CheckpointError, match=f"{path}: no mpilm log"):
        read_log(path)


@pytest.mark.parametrize("num", [(11, 10), (10, 11), (-1, 10)])
def test_a_wrong_number_of_records_is_found(tmp_path, num):
    with RunLog(tmp_path / "r.h5", 0, FIELDS) as log:
        fill(log, 1, 10)
    with h5py.File(tmp_path / "r.h5", "r+") as file:
        file["num"][:] = num
    with pytest.raises(CheckpointError, match="wrong number of records"):
        read_log(tmp_path / "r.h5")


def test_a_folder_without_logs(tmp_path):
    with pytest.raises(CheckpointError, match=f"{tmp_path}: no logs here"):
        read_run(tmp_path)


def test_chrome_trace(tmp_path):
    for rank in 0, 1:
        with RunLog(tmp_path / "log" / f"rank-{rank:04d}.h5", rank, FIELDS) as log:
            log.event("compute", 1.0, 1.5, step=3)
            log.event("mix", 1.25, 2.0, step=3, activity="mixer")
    assert chrome_trace(tmp_path, tmp_path / "trace.json") == 4
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert spans[2] == {
        "ph": "X",
        "name": "compute",
        "pid": 1,
        "tid": 0,
        "ts": 1e6,
        "dur": 0.5e6,
        "args": {"step": 3},
    }
    assert (spans[3]["name"], spans[3]["tid"]) == ("mix", 1)
    names = [(e["name"], e["args"]["name"]) for e in events if e["ph"] == "M"]
    assert names[:3] == [
        ("process_name", "rank 0"),
        ("thread_name", "main"),
        ("thread_name", "mixer"),
    ]


def test_summary(tmp_path):
    path = tmp_path / "summary.json"
    summary = {
        "valid_perplexity": np.float32(0.5),
        "samples": np.int64(10),
        "loss": math.nan,
        "best": -math.inf,
        "curve": np.array([1.0, np.inf]),
        "about": {"b": 1, "a": (True, None, "text")},
    }
    write_summary(path, summary)
    text = path.read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "valid_perplexity": 0.5,
        "samples": 10,
        "loss": None,
        "best": None,
        "curve": [1.0, None],
        "about": {"b": 1, "a": [True, None, "text"]},
    }
    assert list(json.loads(text)) == sorted(summary)
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]


def test_a_summary_that_cannot_be_written_leaves_the_old_one(tmp_path):
    path = tmp_path / "summary.json"
    write_summary(path, {"run": 1})
    (tmp_path / f".summary.json.{os.getpid()}.partial").mkdir()
    with pytest.raises(CheckpointError, match=f"{path}: cannot write: Is a directory"):
        write_summary(path, {"run": 2})
    assert json.loads(path.read_text()) == {"run": 1}


def test_a_summary_in_a_missing_folder_is_one_line(tmp_path):
    path = tmp_path / "missing" / "summary.json"
    with pytest.raises(CheckpointError, match=f"{path}: cannot write: No such file"):
        write_summary(path, {})
