# Needs only make and a Python 3.11 to 3.13; everything else goes into .venv and .venv-test, in the versions of
# constraints.txt. PYTHON=/path/to/python chooses the interpreter that a new environment is made from.

SHELL := /bin/sh
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SECONDARY:

# The newest Python for what a user runs: with its version of JAX a training step takes half the time on a CPU.
VENV := .venv
# The oldest for the tests: with its version of JAX they compile in less time (see tests/conftest.py).
TEST_VENV := .venv-test
PARITY_VENV := .venv-parity
GPU_VENV := .venv-gpu
PINNED := pyproject.toml constraints.txt
INSTALL = -m pip install --quiet --disable-pip-version-check -c constraints.txt
PYTEST_ARGS ?=
GPU_ARGS ?=
# Tests run in as many processes as there are cores, four at most: each takes up to 4 GB of memory.
WORKERS ?= --numprocesses=auto --maxprocesses=4 --dist=loadscope
# Numbers are compared at LLVM's level 1. Level 0, at which the other tests compile, has no fused
# multiply-adds and so rounds more often.
PARITY_XLA_FLAGS := --xla_backend_optimization_level=1
DOCS ?=
SOURCES := .

.PHONY: help demo test lint pytest slow faults browser parity gpu docs pins clean

help:  ## List the targets
	@grep -E '^[a-z]+:.*## ' Makefile | sed -E 's/^([a-z]+):[^#]*## /\1|/' | awk -F'|' '{ printf "  make %-8s %s\n", $$1, $$2 }'

demo: $(VENV)/.demo  ## Train a small diffusion model on real digits and sample from it (CPU is enough)
	$(VENV)/bin/python launch.py --config=configs/mnist.py --workdir=runs/mnist
	$(VENV)/bin/python benchmarks/recognise_digits.py --workdir=runs/mnist
	@echo
	@echo "Next:"
	@echo "  $(VENV)/bin/python launch.py sample --workdir=runs/mnist --class=7 --n=16 --guidance_scale=3"
	@echo "  $(VENV)/bin/python launch.py report --workdir=runs/mnist"
	@echo "  $(VENV)/bin/python launch.py --config=configs/mnist.py --config.train.num_steps=4000"

test: lint pytest  ## Lint, then the default tests

lint: $(TEST_VENV)/.test  ## Format, style, types and import directions
	$(TEST_VENV)/bin/ruff format --check $(SOURCES)
	$(TEST_VENV)/bin/ruff check $(SOURCES)
	$(TEST_VENV)/bin/pyright --pythonpath $(TEST_VENV)/bin/python
	$(TEST_VENV)/bin/lint-imports --no-logo

pytest: $(TEST_VENV)/.test  ## The default tests alone: make pytest PYTEST_ARGS="tests/diffusion -x"
	$(TEST_VENV)/bin/python -m pytest $(WORKERS) $(PYTEST_ARGS)

slow: $(TEST_VENV)/.docs  ## The tests that take long: whole runs, faults under training, whole configs, notebooks
	$(TEST_VENV)/bin/python -m pytest -m "slow and not parity" $(WORKERS) $(PYTEST_ARGS)

faults: $(TEST_VENV)/.test  ## Try every bad input and fault, and count how many were answered and survived
	$(TEST_VENV)/bin/python -m pytest tests/faults -m "not parity" $(WORKERS) $(PYTEST_ARGS)

browser: $(TEST_VENV)/.browser  ## Look at the report and the playground in a headless Chromium, Debian's if there is none
	CHROMIUM="$$(tools/find_browser.sh)" && export CHROMIUM && \
	    $(TEST_VENV)/bin/python -m pytest -m browser $(PYTEST_ARGS)

parity: $(PARITY_VENV)/.parity  ## Compare numbers with PyTorch packages, in an environment of its own
	XLA_FLAGS="$(PARITY_XLA_FLAGS) $$XLA_FLAGS" $(PARITY_VENV)/bin/python -m pytest -m parity $(WORKERS) $(PYTEST_ARGS)

gpu: $(GPU_VENV)/.gpu  ## Compile every config for NVIDIA GPUs that are not here: make gpu GPU_ARGS="--full --configs sdxl"
	$(GPU_VENV)/bin/python -m pytest -m slow tests/plan/test_topology.py tests/plan/test_gpu.py
	$(GPU_VENV)/bin/python benchmarks/compile_for_gpus.py $(GPU_ARGS)

docs: $(VENV)/.docs  ## Run every block of the documentation (DOCS="README.md" for some pages), build site/
	$(VENV)/bin/python tools/run_docs.py $(DOCS)
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict --quiet

pins:  ## Write constraints.txt anew from pyproject.toml (needs uv)
	tools/pin.sh

clean:  ## Remove the environments and caches; runs/ and logs/ stay
	rm -rf $(VENV) $(TEST_VENV) $(PARITY_VENV) $(GPU_VENV) build dist site .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# An environment that already works is kept, whoever made it. A stamp says which extra was installed with which pins.
OLDEST_FIRST := $(TEST_VENV) $(PARITY_VENV)
%/.made:
	@$*/bin/python -m pip --version >/dev/null 2>&1 || { \
	    python=$$(tools/find_python.sh $(if $(filter $*,$(OLDEST_FIRST)),3.11 3.12 3.13)) && \
	    echo "Making $* with $$python" && "$$python" -m venv $*; }
	@touch $@

%/.demo: %/.made $(PINNED)
	@echo "Installing the pinned packages (about 1.5 GB on disk, a minute or two)"
	@$*/bin/python $(INSTALL) -e '.[demo]'
	@touch $@

%/.test: %/.made $(PINNED)
	@echo "Installing the pinned packages (about 1.5 GB on disk, a minute or two)"
	@$*/bin/python $(INSTALL) -e '.[test]'
	@touch $@ $*/.demo

%/.browser: %/.made $(PINNED)
	@echo "Installing the pinned packages (about 1.7 GB on disk, a minute or two)"
	@$*/bin/python $(INSTALL) -e '.[browser]'
	@touch $@ $*/.test $*/.demo

%/.docs: %/.made $(PINNED)
	@echo "Installing the pinned packages (about 1.6 GB on disk, a minute or two)"
	@$*/bin/python $(INSTALL) -e '.[docs]'
	@touch $@ $*/.test $*/.demo

# torch first and alone: whatever build of the pinned version this machine's pip prefers (a CPU one if it has one)
# is then kept, as the packages that follow find their requirement met.
$(PARITY_VENV)/.parity: $(PARITY_VENV)/.made $(PINNED)
	@echo "Installing the pinned packages and PyTorch (about 3 GB on disk, a few minutes)"
	@$(PARITY_VENV)/bin/python $(INSTALL) torch
	@$(PARITY_VENV)/bin/python $(INSTALL) -e '.[parity]'
	@$(PARITY_VENV)/bin/python -c 'import diffusers, torch, torchmetrics, transformers'
	@touch $@

$(GPU_VENV)/.gpu: $(GPU_VENV)/.made $(PINNED)
	@echo "Installing the pinned packages and those of CUDA (about 6 GB on disk, a few minutes)"
	@$(GPU_VENV)/bin/python $(INSTALL) -e '.[cuda,lpips,test]'
	@touch $@
