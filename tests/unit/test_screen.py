"""What a person sees of a run, and what its closing lines say."""

from __future__ import annotations

import math

import pytest

from mpilm.train import screen as screens
from mpilm.train.screen import Screen
from mpilm.train.summary import closing_lines


@pytest.fixture
def on_terminal(monkeypatch):
    """Return a function that makes a terminal of so many columns."""

    def make(width):
        monkeypatch.setattr(screens, "terminal_width", lambda: width)
        monkeypatch.setenv("TERM", "xterm")  # not "dumb", as under mpirun

    return make


def test_the_rate_is_that_of_training_alone(monkeypatch, capsys):
    """10 s of training in 100 s of which 90 were an evaluation: 100/s, 10 s left."""
    now_s = 0.0
    monkeypatch.setattr(screens.time, "monotonic", lambda: now_s)
    with Screen(2000) as screen:
        batches = screen.watch("evaluating valid", [1, 2, 3])
        for _ in batches:
            now_s += 30.0
        now_s += 10.0
        screen.update(1000, math.log(50.0), 10.0)
    out = capsys.readouterr().out.splitlines()
    assert out[0].split() == ["33%", "evaluating", "valid", "1:00", "left"]
    assert out[-1].split() == [
        *("50%", "1,000", "samples", "100/s", "loss", "3.912"),
        *("perplexity", "50.0", "0:10", "left"),
    ]


@pytest.mark.parametrize("width", [80, 160])
def test_the_bar_has_room(on_terminal, capsys, width):
    on_terminal(width)
    with Screen(2_000_000) as screen:
        screen.update(1_234_567, 4.0, 60.0)
        text = screen.status(1_234_567, 20_576.1, 4.0, 3725.0)
    assert width - len("100%  ") - len(text) >= 20
    assert ("loss" in text) == (width == 160)
    assert capsys.readouterr().out


def test_at_the_end_the_bar_stands_at_all_samples(on_terminal):
    """Which was shown last is some steps ago, and a run ends behind its total."""
    on_terminal(100)
    with Screen(1000) as screen:
        screen.update(900, math.log(50.0), 9.0)
        screen.done(1040)
        (task,) = screen.bar.tasks
        assert task.finished
        assert task.fields["status"] == "1,040  100/s  perplexity 50.0  0:00 left"


def test_an_evaluation_is_a_phase_of_its_own(on_terminal, capsys):
    on_terminal(100)
    with Screen(100) as screen:
        screen.update(100, 1.0, 1.0)
        for _ in screen.watch("evaluating valid", range(2)):
            names = [task.fields["status"] for task in screen.bar.tasks if task.visible]
            assert len(names) == 1
            assert names[0].startswith("evaluating valid")
    for _ in screen.watch("evaluating test", range(2)):  # after the loop
        assert screen.bar.live.is_started
    assert not screen.bar.live.is_started
    assert "evaluating test" in capsys.readouterr().out


def test_frames_have_an_error_and_no_perplexity():
    screen = Screen(100, perplexity=False)
    screen.valid = "valid frame error 12.30%"
    status = screen.status(10, 5.0, 1.0, 18.0)
    assert status == (
        "10 samples  5/s  loss 1.000  valid frame error 12.30%  0:18 left"
    )


def test_a_narrow_terminal_has_room_for_the_frame_error(on_terminal):
    on_terminal(80)
    screen = Screen(2_000_000, perplexity=False)
    assert "loss 4.000" in screen.status(1_234_567, 20_576.1, 4.0, 3725.0)
    screen.valid = "valid frame error 37.79%"
    status = screen.status(1_234_567, 20_576.1, 4.0, 3725.0)
    assert status == "1,234,567  20,576/s  frame error 37.79%  1:02:05 left"
    assert 80 - len("100%  ") - len(status) >= 20


def test_the_seconds_of_a_simulation_are_called_virtual(capsys):
    with Screen(100, virtual=True) as screen:
        screen.update(100, 1.0, 4.0)
    assert "25/virtual s" in capsys.readouterr().out


def test_the_closing_line_has_one_rate_and_both_times():
    summary = {
        "samples": 200_200,
        "seconds": 111.0,
        "train_seconds": 44.0,
        "samples_per_s": 4550.0,
        "ranks": 1,
        "worst_rank": None,
        "valid_perplexity": 9.0,
        "test_perplexity": None,
        "perplexity_floor": None,
    }
    first, second = closing_lines(summary)
    assert first == (
        "200,200 samples in 0:44 of training on 1 rank: 4,550/s;"
        " 1:51 with evaluations and checkpoints"
    )
    assert second == "valid perplexity 9.00"
    assert "0:44 of virtual time" in closing_lines(summary, virtual=True)[0]
    worst = {"worst_rank": 3, "worst_rank_samples": 5000}
    worst |= {"worst_rank_valid_perplexity": 9.5}
    worst |= {"per_rank": {"valid_perplexity": [9.25, 9.5]}}
    assert closing_lines(summary | worst)[1] == (
        "final model: valid perplexity 9.00; worst single rank (3): valid perplexity"
        " 9.50, on 5,000 samples of each split, where the best rank has valid"
        " perplexity 9.25"
    )


def test_the_best_rank_of_frames_has_a_frame_error():
    summary = {
        "samples": 200,
        "seconds": 1.0,
        "train_seconds": 1.0,
        "samples_per_s": 200.0,
        "ranks": 2,
        "comm_seconds": 0.0,
        "overlap": 1.0,
        "perplexity_floor": None,
        "valid_frame_error": 0.25,
        "worst_rank": 1,
        "worst_rank_samples": 50,
        "worst_rank_valid_frame_error": 0.5,
        "per_rank": {
            "valid_perplexity": [2.0, 3.0],
            "valid_frame_error": [0.375, 0.5],
        },
    }
    final, worst = closing_lines(summary)[1].split("; ")
    assert final == "final model: valid frame error 25.00%"
    assert worst == (
        "worst single rank (1): valid frame error 50.00%, on 50 samples of each split,"
        " where the best rank has valid frame error 37.50%"
    )
