.DEFAULT_GOAL := help
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
# DeepSpeed picks a GPU where it sees one; tests and demo run on CPU ranks everywhere.
export DS_ACCELERATOR ?= cpu

.PHONY: help setup ops demo test test-full check bench

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	# The CPU build of PyTorch first: DeepSpeed would pull the CUDA one.
	$(BIN)/pip install -q torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu --retries 0 2>/dev/null \
		|| $(BIN)/pip install -q torch==2.13.0
	$(BIN)/pip install -q -e '.[dev]'
	touch $@

setup: $(VENV)/installed  ## make the virtual environment

ops: setup  ## build DeepSpeed's C++ ops (CPU Adam, CPU Adagrad, async I/O), once a machine
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/python scripts/build_ops.py

demo: setup  ## train the example on two CPU ranks with ZeRO-2
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/zeroaccel launch --cpu --num_processes 2 --zero_stage 2 examples/nlp_example.py

test: ops  ## the tests
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/python -m pytest

test-full: ops  ## the tests with their exhaustive matrices
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/python -m pytest --full

bench: setup  ## what the loop costs beside raw DeepSpeed and Accelerate
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/python benchmarks/loop.py

check: setup  ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
