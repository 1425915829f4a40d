# make train · make test · make bench · make lint — each sets up what it needs in .venv.
PYTHON ?= python3
NPROC ?= 2
ARGS ?=
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PEERS := .peers/deepspeed
MANIFESTS := requirements.txt pyproject.toml core/pyproject.toml $(wildcard plugins/*/pyproject.toml plugins/*/*/pyproject.toml)

.PHONY: train test lint bench setup clean

setup: $(READY)

$(READY): $(MANIFESTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Powertrain needs Python 3.10 or later; this is " + sys.version.split()[0] + ". Try: make PYTHON=python3.11 $(MAKECMDGOALS)")'
	@test -x $(BIN)/python || { echo "Creating $(VENV) …"; $(PYTHON) -m venv $(VENV); }
	@echo "Installing Powertrain and its tools into $(VENV) (about a minute the first time) …"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

train: $(READY)
	@$(BIN)/powertrain launch --nproc $(NPROC) examples/gpt/train.py $(ARGS)

# The kernels are built first: a test that waits for a compiler among others could run out of time.
test: $(READY)
	@$(BIN)/powertrain kernels build || echo "Without kernels: their references are tested."
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

lint: $(READY)
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/lint-imports --no-cache
	@$(BIN)/mypy

# Peers live in an environment of their own and are never a dependency.
$(PEERS)/.ready:
	@echo "Installing the peer that the benchmarks compare with into $(PEERS) …"
	@$(PYTHON) -m venv $(PEERS)
	@$(PEERS)/bin/python -m pip install --quiet torch==2.13.0 numpy setuptools wheel ninja
	@DS_BUILD_OPS=0 $(PEERS)/bin/python -m pip install --quiet --no-build-isolation deepspeed==0.19.8
	@touch $@

bench: $(READY) $(PEERS)/.ready
	@$(BIN)/python benchmarks/startup.py
	@$(BIN)/python benchmarks/engine_overhead.py
	@$(BIN)/python benchmarks/checkpoint_async.py
	@$(BIN)/python benchmarks/io.py .
	@$(BIN)/python benchmarks/checkpoint.py
	@$(BIN)/python benchmarks/offload.py
	@$(BIN)/python benchmarks/cpu_kernels.py
	@$(BIN)/python benchmarks/collectives.py
	@$(BIN)/python benchmarks/zero.py --precision fp32 --accumulation 1

clean:
	rm -rf $(VENV) .peers
