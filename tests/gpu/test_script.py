"""benchmarks/gpu.py on a CPU: what it writes, and that what fails is only a line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    """The script as a module."""
    found = ModuleType("gpu")
    found.__file__ = str(SCRIPT)
    sys.modules["gpu"] = found  # dataclasses look there
    exec(compile(SCRIPT.read_text(), str(SCRIPT), "exec"), found.__dict__)
    return found


@pytest.mark.long
@pytest.mark.timeout(600)  # several programs with torch, on a busy machine
def test_a_section_that_fails_is_a_line_and_the_rest_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    only = ["--only", "peak", "messages"]
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path), "--smoke", *only]
    environment = {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, "--device", "cuda"],
        env={**environment, "PATH": "/nowhere"},
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done
    found = json.loads((tmp_path / "gpu.json").read_text())["sections"]
    assert [section["section"] for section in found] == ["peak", "messages"]
    assert "Error" in found[0]["error"]
    assert found[1]["error"]
    page = (tmp_path / "gpu.md").read_text()
    assert "**Failed: 2**" in page
    assert "Traceback" not in page
    done = subprocess.run(
        [*command, "--device", "cpu"], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done
    peak, messages = json.loads((tmp_path / "gpu.json").read_text())["sections"]
    assert [row["kind"] for row in peak["rows"]] == ["float32", "TF32", "bfloat16"]
    assert messages["rows"][0]["direct"] == "yes"  # of tensors on the CPU
    ways = ("host", "staged", "direct")
    assert all(messages["rows"][1][f"{way} right"] for way in ways)
    assert "| float32 |" in (tmp_path / "gpu.md").read_text()


@pytest.mark.long
def test_a_section_that_hangs_is_ended_and_what_it_found_is_kept(
    gpu: ModuleType, tmp_path: Path
) -> None:
    program = tmp_path / "benchmarks" / "gpu_sections.py"
    program.parent.mkdir()
    program.write_text(
        "import sys, time\n"
        "open(sys.argv[2], 'w').write('{\"variant\": 1}\\n')\n"
        "print('so far', flush=True)\n"
        "time.sleep(600)\n"
    )
    gpu.ROOT = tmp_path
    where = gpu.Place(sys.executable, None, {})
    found = gpu.run(gpu.Section("peak", "Peak", 60), where, [], 6.0)
    assert found["error"] == "ended after 6 s"
    assert found["rows"] == [{"variant": 1}]
    assert found["log"] == "so far\n"
    program.write_text("raise ValueError('this and that')")
    found = gpu.run(gpu.Section("peak", "Peak", 60), where, [], 60.0)
    assert found["error"] == "exit code 1: ValueError: this and that"
    found = gpu.run(gpu.Section("messages", "Messages", 60, 2), where, [], 60.0)
    assert found["error"] == "no mpirun"


def test_goals_and_failures_stand_at_the_top_of_the_page(gpu: ModuleType) -> None:
    rows = [
        {"variant": "a", "goal": ">= 1.0", "met": False},
        {"variant": "b", "goal": ">= 1.0", "met": True},
        {"other": 0.123456},
    ]
    section = gpu.result(gpu.Section("peak", "Peak", 1), 2.0, rows, "", "log")
    about = {"device": "cuda", "date": "today", "commit": "c", "smoke": False}
    page = gpu.page({**about, "sections": [section]})
    assert "**Goals missed: 1**\n\n* Peak: a >= 1.0\n" in page
    assert "**Failed: 0**" in page
    assert "| 0.1235 |" in page
