"""`mpilm export --format safetensors`, and what `mpilm generate` draws."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from mpilm.cli import main
from mpilm.config import resolve
from mpilm.data.hdf5 import Corpus
from mpilm.data.text import prepare_text
from mpilm.models.lstm_lm import LstmLm
from mpilm.train.loop import Trainer
from mpilm.train.run import TrainedModel
from mpilm.world.virtual import run_virtual


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return the folder of a short run; every third word of its text is rare."""
    folder = tmp_path_factory.mktemp("export")
    words = [f"rare{i}" if i % 3 == 0 else f"word{i % 7}" for i in range(4000)]
    lines = [" ".join(words[i : i + 20]) for i in range(0, len(words), 20)]
    (folder / "text").write_text("\n".join(lines))
    prepare_text([folder / "text"], None, None, folder / "corpus.h5", vocab=9)
    document = {
        "data": {"corpus": str(folder / "corpus.h5")},
        "model": {"embed": 8, "hidden": 8, "layers": 2},
        "train": {"batch": 4, "unroll": 10, "samples": 800, "test": False},
    }
    config, out = resolve(document), folder / "run"
    run_virtual(lambda world: Trainer(config, world, out).train(), 1)
    return out


@pytest.mark.long
def test_the_module_takes_the_tensors_as_they_are(trained, tmp_path, capsys):
    out = tmp_path / "new" / "model.safetensors"
    assert main(["export", str(trained), "--out", str(out)]) == 0
    tensors = load_file(out)
    about = json.loads(out.with_suffix(".json").read_text())
    settings = {k: about["model"][k] for k in ("embed", "hidden", "layers")}
    model = LstmLm(len(about["words"]), **settings)
    model.load_state_dict(tensors, strict=True)
    original = TrainedModel.read(trained)
    flat = original.learner()
    for name, parameter in flat.model.named_parameters():
        assert torch.equal(parameter, tensors[name]), name
    corpus = Corpus.open(trained.parent / "corpus.h5")
    assert about["words"] == list(corpus.vocabulary)
    assert about["fingerprint"] == corpus.fingerprint
    assert (
        f"{len(tensors)} tensors, {flat.layout.size:,} param" in capsys.readouterr().out
    )


@pytest.mark.long
def test_generate_leaves_unk_out_unless_asked(trained, capsys):
    options = ["--tokens", "60", "--temperature", "2"]
    assert main(["generate", str(trained), *options]) == 0
    assert "<unk>" not in capsys.readouterr().out
    assert main(["generate", str(trained), *options, "--unk"]) == 0
    assert "<unk>" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "/proc/no/model.safetensors"], "cannot be written"),
        (["--out", "x.ark"], "say --corpus"),
        (["--out", "x.safetensors", "--ema"], "has no moving average"),
    ],
)
def test_bad_input_is_one_line(trained, capsys, options, message):
    assert main(["export", str(trained), *options]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_an_export_takes_the_place_of_no_input(trained, capsys):
    before = {p: p.read_bytes() for p in trained.rglob("*") if p.is_file()}
    (checkpoint,) = trained.glob("checkpoints/*")
    outputs = [trained / "config.toml", trained / "x.priors", checkpoint / "shared.h5"]
    options = [["--format", "safetensors"], ["--corpus", str(trained.parent / "c.h5")]]
    for out, option in (
        *((out, options[0]) for out in (outputs[0], outputs[2], trained / "x.json")),
        *((out, options[1]) for out in outputs),
        (trained.parent / "corpus.h5", ["--corpus", str(trained.parent / "corpus.h5")]),
    ):
        assert main(["export", str(trained), "--out", str(out), *option]) == 2
        said = capsys.readouterr().err
        assert "name another" in said
        assert said.count("\n") == 1
    assert {p: p.read_bytes() for p in trained.rglob("*") if p.is_file()} == before
    beside = str(trained / "model.safetensors")
    assert main(["export", str(trained), "--out", beside]) == 0


@pytest.mark.long
def test_training_writes_over_no_configuration(trained, tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    text = "# my own words\n" + (trained / "config.toml").read_text()
    (folder / "config.toml").write_text(text)
    words = ["train", str(folder / "config.toml"), "--out", str(folder)]
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    assert "would be written: name another file" in capsys.readouterr().err
    assert (folder / "config.toml").read_text() == text
    (folder / "log").mkdir()
    corpus = (trained.parent / "corpus.h5").rename(folder / "log" / "rank-0000.h5")
    words[1:2] = [str(trained / "config.toml"), "--set", f"data.corpus={corpus}"]
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    assert f"{corpus} is read, and would be written" in capsys.readouterr().err
    corpus.rename(trained.parent / "corpus.h5")
