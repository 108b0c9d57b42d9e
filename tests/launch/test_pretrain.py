"""`mpilm pretrain` as a user starts it, on 2 ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpilm.data.kaldi_prepare import prepare_kaldi
from mpilm.storage.state_file import read_state
from tests.launch.conftest import mpirun
from tests.unit.kaldi_files import NUM_FEATURES, make_folder

CONFIG = """\
[model]
name = "dnn"
hidden = 16
layers = 2
[strategy]
name = "model_averaging"
[pretrain]
batch = 10
"""


@pytest.mark.slow
def test_two_ranks_write_the_first_weights_of_a_dnn(tmp_path: Path) -> None:
    folder, corpus = make_folder(tmp_path / "kaldi"), tmp_path / "c.h5"
    ali = [folder / "pdf.ark"]
    prepare_kaldi({"train": folder}, corpus, alignments=ali, shares={"valid": 0.3})
    config, weights = tmp_path / "c.toml", tmp_path / "w.h5"
    config.write_text(f'[data]\ncorpus = "{corpus}"\n{CONFIG}')
    before = config.read_bytes()
    mpirun(0, "pretrain", config, "--out", config).refused("is read")
    assert config.read_bytes() == before
    made = mpirun(2, "pretrain", config, "--out", weights)
    assert made.code == 0, made
    made.has_no_traceback()
    assert made.out.count("squared reconstruction error") == 2  # rank 0 speaks alone
    assert f"{weights}: 2 layers" in made.out
    shapes = {name: array.shape for name, array in read_state(weights).items()}
    assert shapes == {
        "hidden.0.weight": (16, NUM_FEATURES),
        "hidden.0.bias": (16,),
        "hidden.1.weight": (16, 16),
        "hidden.1.bias": (16,),
    }
