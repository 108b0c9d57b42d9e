"""What MPI is started with."""

from __future__ import annotations

import pytest

from mpilm.world.mpi.start import FT_SETTING, RULES, is_one_node

RANKS, HERE = "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"


@pytest.mark.parametrize(
    ("environment", "one"),
    [
        ({RANKS: "4", HERE: "4"}, True),
        ({RANKS: "4", HERE: "2"}, False),
        ({RANKS: "4", HERE: "4", FT_SETTING: "1"}, False),  # others may join
        ({}, False),  # srun does not say
    ],
)
def test_all_ranks_are_on_one_node(
    environment: dict[str, str], one: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (RANKS, HERE, FT_SETTING):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert is_one_node() == one


def test_the_file_of_rules_comes_with_the_package() -> None:
    name = RULES["OMPI_MCA_coll_tuned_dynamic_rules_filename"]
    with open(name) as stream:
        assert "400000 5 0 250000" in stream.read()
