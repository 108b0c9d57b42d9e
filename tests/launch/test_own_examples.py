"""The examples of `mpilm.fit` train, in both worlds, and are resumed."""

from __future__ import annotations

import ast
import importlib.util
import io
import json
import sys
import tokenize
from functools import partial
from pathlib import Path

import pytest

from mpilm import run_virtual

from .conftest import mpirun

EXAMPLES = Path(__file__).parents[2] / "examples"
# name -> settings of a shorter run, and the valid loss that it gets below
SHORT = {
    "own_lstm": ({"epochs": 1}, 4.0),  # nats; 4.85 at first
    "small_transformer": ({"samples": 2_400}, 2.6),  # ln 16 = 2.77
    "image_cnn": ({"epochs": 1}, 2.0),  # ln 10 = 2.30
}


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", SHORT)
def test_it_trains_in_the_virtual_world(tmp_path, name):
    settings, limit = SHORT[name]
    train = load(name).train

    def main(world):
        return train(tmp_path / "run", world=world, **settings)

    first = run_virtual(main, 2)
    assert first[0] == first[1]
    assert first[0]["valid_loss"] < limit
    again = run_virtual(
        partial(
            train_on, train, tmp_path / "run", {k: 2 * v for k, v in settings.items()}
        ),
        2,
    )
    assert again[0]["samples"] >= 1.9 * first[0]["samples"]


def train_on(train, out, settings, world):
    return train(out, world=world, resume=True, **settings)


@pytest.mark.parametrize("name", SHORT)
def test_it_has_fewer_than_50_lines_of_code(name):
    """Without blank lines, comments and docstrings."""
    source = (EXAMPLES / f"{name}.py").read_text()
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.string.strip() and token.type != tokenize.COMMENT:
            code |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        if documented and ast.get_docstring(node):
            text = node.body[0]
            code -= set(range(text.lineno, text.end_lineno + 1))
    assert 20 < len(code) < 50


@pytest.mark.long
def test_the_others_train_under_mpirun(tmp_path):
    """One launch for both: most of its time goes to the start."""
    program = tmp_path / "program.py"
    lines = [f"import sys; sys.path.insert(0, {str(EXAMPLES)!r})"]
    for name in ("own_lstm", "small_transformer"):
        settings, _ = SHORT[name]
        lines += [
            f"import {name}",
            f"{name}.train({str(tmp_path / name)!r}, **{settings})",
        ]
    program.write_text("\n".join(lines))
    run = mpirun(2, program=(sys.executable, program))
    assert run.code == 0, run
    run.has_no_traceback()
    for name in ("own_lstm", "small_transformer"):
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        assert summary["ranks"] == 2
        assert summary["valid_loss"] < SHORT[name][1]


@pytest.mark.parametrize("name", ["image_cnn"])
def test_it_trains_under_mpirun_and_the_report_shows_it(tmp_path, name):
    program = tmp_path / "program.py"
    program.write_text(
        (EXAMPLES / f"{name}.py").read_text().replace("runs/", f"{tmp_path}/")
    )
    run = mpirun(2, program=(sys.executable, program))
    assert run.code == 0, run
    run.has_no_traceback()
    (summary,) = tmp_path.glob("*/summary.json")
    assert json.loads(summary.read_text())["valid_error"] < 0.5
    shown = mpirun(0, "report", summary.parent, "--out", tmp_path / "page.html")
    assert shown.code == 0, shown
    assert "valid loss" in (tmp_path / "page.html").read_text()
    again = mpirun(2, program=(sys.executable, program))
    assert again.code == 2
    assert "holds a run; resume = True goes on" in again.err
