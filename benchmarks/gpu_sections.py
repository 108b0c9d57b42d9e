"""One section of gpu.py, which starts it; or by hand:

python benchmarks/gpu_sections.py single rows.jsonl --device cuda
"""

from __future__ import annotations

import argparse
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from gpu_common import Add, Rows

# section -> module:function; of those the functions that see to ranks themselves
ALONE = {
    "environment": "gpu_sections:environment",
    "peak": "gpu_models:peak",
    "single": "gpu_models:single",
    "sampled": "gpu_models:sampled",
    "resume": "gpu_models:resume",
    "autocast": "gpu_models:autocast",
    "ng": "gpu_models:ng",
    "softmax": "gpu_parts:softmax",
    "optimiser": "gpu_parts:optimiser",
}
OTHER = {
    "strategies-2": "gpu_ranks:strategies",
    "strategies-4": "gpu_ranks:strategies",
    "messages": "gpu_ranks:messages",
    "train": "gpu_programs:train",
    "deaths": "gpu_programs:deaths",
    "checkpoints": "gpu_programs:checkpoints",
    "tests": "gpu_programs:tests",
}


def environment(args: Any, add: Add) -> None:
    """What the figures depend on."""
    from mpi4py import MPI

    from mpilm.doctor.cuda_aware import cuda_verdict, name_of

    found = {"python": sys.version.split()[0], "torch": torch.__version__}
    found["mpi"] = name_of(MPI.Get_library_version())
    found["mpirun"] = Path(os.environ.get("MPILM_MPIRUN") or "none").name
    if args.device == "cuda":
        about = torch.cuda.get_device_properties(0)
        found["gpu"] = about.name
        found["memory (GB)"] = f"{about.total_memory / 1e9:.1f}"
        found["multiprocessors"] = str(about.multi_processor_count)
        found["CUDA"] = str(torch.version.cuda)
        found["cuDNN"] = str(torch.backends.cudnn.version())
        found["CUDA-aware MPI"] = cuda_verdict(MPI).why
    for what, value in found.items():
        add(what=what, value=value)


def main() -> None:
    """Run one section."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("section", choices=(*ALONE, *OTHER))
    parser.add_argument("rows", type=Path)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1 if args.smoke else 4)
    module, _, name = {**ALONE, **OTHER}[args.section].partition(":")
    function = getattr(import_module(module), name)
    function(args, Rows(args.rows) if args.section in ALONE else args.rows)


if __name__ == "__main__":
    main()
