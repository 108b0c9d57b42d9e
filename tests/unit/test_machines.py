"""Machine files: those that ship, and what is wrong with others."""

from __future__ import annotations

import dataclasses

import pytest

from mpilm.cli import main
from mpilm.config import read_config
from mpilm.simulate.machines import find_machine, shipped
from mpilm.world.machine import Machine

GOOD = {"latency_s": "1e-5", "bandwidth_Bps": "1e9"}


@pytest.mark.parametrize("name", shipped())
def test_a_machine_that_ships_says_what_it_is_and_from_where(name):
    found = find_machine(name)
    assert 20 < len(found.about) < 100
    text = shipped()[name].read_text()
    assert "# " in text.partition("[machine]")[0], "no sources"
    assert found.has_step == ("\nstep_s = " in text)
    machine = found.machine
    assert machine.node_latency_s <= machine.latency_s
    assert machine.node_bandwidth_Bps >= machine.bandwidth_Bps


def test_all_of_the_machine_is_the_files_but_a_step_that_it_has_not(tmp_path):
    config = tmp_path / "train.toml"
    config.write_text("[machine]\nstep_s = 0.03\njitter = 0.2\nranks_per_node = 2\n")
    read = read_config(config, find_machine("cloud_25g").settings).machine
    assert read == dataclasses.replace(find_machine("cloud_25g").machine, step_s=0.03)
    read = read_config(config, find_machine("v100_edr").settings).machine
    assert (read.step_s, read.jitter) == (0.124, 0.0)


def test_a_file_of_ones_own(tmp_path):
    path = tmp_path / "own.toml"
    path.write_text("[machine]\nlatency_s = 1e-3\nbandwidth_Bps = 5e6\n")
    found = find_machine(str(path))
    assert found.machine == Machine(latency_s=1e-3, bandwidth_Bps=5e6)
    assert not found.has_step


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latency_s": "-1e-5"}, "machine.latency_s"),
        ({"bandwidth_Bps": "0.0"}, "machine.bandwidth_Bps"),
        ({"bandwidth_Bps": '"fast"'}, "machine.bandwidth_Bps"),
        ({"bandwidth_Bps": "nan"}, "machine.bandwidth_Bps"),
        ({"bandwidth_Bps": "inf"}, "machine.bandwidth_Bps: inf is no number"),
        ({"latency_s": None}, "machine.latency_s is missing"),
        ({"bandwidth_Bps": None}, "machine.bandwidth_Bps is missing"),
        ({"ranks_per_node": "4"}, "machine.node_latency_s is missing"),
        ({"ranks_per_node": "0"}, "machine.ranks_per_node"),
        ({"bandwith_Bps": "1.0"}, "bandwith_Bps"),
        ({"latency_s": "= ="}, "not TOML"),
    ],
)
def test_a_bad_file_is_one_line_with_its_key(tmp_path, capsys, change, message):
    path = tmp_path / "bad.toml"
    values = {k: v for k, v in (GOOD | change).items() if v is not None}
    rows = [f"{key} = {value}" for key, value in values.items()]
    path.write_text("\n".join(["[machine]", *rows]))
    require_one_line(tmp_path, capsys, path, f"{path}: ", message)


def test_no_such_machine(tmp_path, capsys):
    words = ("--machine k20_fd: no such file", "did you mean 'k20_fdr'?")
    require_one_line(tmp_path, capsys, "k20_fd", *words)
    missing = tmp_path / "none.toml"
    require_one_line(tmp_path, capsys, missing, f"{missing}: cannot read")
    (tmp_path / "empty.toml").write_text('about = "nothing"\n')
    path = tmp_path / "empty.toml"
    require_one_line(tmp_path, capsys, path, f"{path}: has no [machine]")


def require_one_line(folder, capsys, machine, *messages):
    config = folder / "train.toml"
    config.write_text("")
    words = ["simulate", config, "--machine", machine, "--out", folder / "out"]
    assert main([*map(str, words)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    for message in messages:
        assert message in said
    assert not (folder / "out").exists()


def test_the_help_names_all_machines(capsys):
    with pytest.raises(SystemExit):
        main(["simulate", "--help"])
    said = capsys.readouterr().out
    assert all(f"    {name} " in said for name in shipped())
