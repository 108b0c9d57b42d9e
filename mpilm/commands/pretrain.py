"""`mpilm pretrain`."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from mpilm.commands.prepare import progress_bar

if TYPE_CHECKING:
    from mpilm.config import Config


def pretrain(
    config: tyro.conf.Positional[Path],
    /,
    *,
    out: Path,
    set_: Annotated[
        tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(name="set")
    ] = (),
) -> int:
    """Train a stack of RBMs; write the first weights of the DNN that [model] names.

    Under mpirun the ranks train each RBM together, as [strategy] says. Afterwards
    `mpilm train CONFIG --set model.init=OUT` begins with these weights; the softmax
    layer is drawn at random.

    Args:
        config: TOML file, the one to train with
        out: HDF5 file to write
        set_: override a setting: section.key=value
    """
    from mpilm.config import read_config
    from mpilm.storage.files import require_apart
    from mpilm.train.pretrain import Pretrainer, write_layers
    from mpilm.world.mpi import MpiWorld, abort_on_error

    settings: Config | None = None
    with MpiWorld() as world, abort_on_error(world):
        with world.all_or_none():
            settings = read_config(config, set_)
            require_apart([out], settings.inputs(config))
            world.configure(faults=settings.faults, silence_s=settings.world.silence_s)
        assert settings is not None
        speaks = world.rank == 0
        shown: Any = progress_bar() if speaks else nullcontext(lambda done, total: None)
        with shown as progress:
            show = print if speaks else lambda line: None
            layers = Pretrainer(settings, world, progress=progress, show=show).run()
        with world.all_or_none():
            if speaks:
                write_layers(out, layers)
                print(f"{out}: {len(layers)} layers; use it as model.init")
    return 0
