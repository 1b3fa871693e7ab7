# Every target installs missing packages, so any of them can be the first command on a fresh machine.
# Needs: make, git, and a Python 3.11 or 3.12 (`make PYTHON=python3.12 ...` picks one).

.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
RAY_TOKEN := .build/ray/auth_token

CONFIG ?= deployments/tiny.yaml
export PROMPT ?= def add(a, b):
ARGS ?=

# Looked up only when a virtual environment has to be made.
PYTHON ?= $(shell for python in python3 python3.12 python3.11; do \
	"$$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null \
	&& { echo "$$python"; break; }; done)

# The tests of a file share expensive fixtures, so they stay in one process; files run in order, because the slow ones
# come early then.
IN_PARALLEL = $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

# Two ranks and a drafter share the cores of a laptop: one thread each is fastest.
export OMP_NUM_THREADS ?= 1

.PHONY: help install serve generate test check test-clients lint format bench bench-schedule bench-controller bench-kernels chaos gpu-day docs clean

help: ## Show the targets.
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 16

install: $(INSTALLED) ## Make .venv and install everything into it.

# torch is installed first and alone, so that an existing build (for CPUs, for example) stays.
$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or 3.12 found: install one, or run make PYTHON=/path/to/python"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[serve,cli,dev,docs]'
	@touch $@

# A local Ray cluster takes commands from every holder of its token. This token lives in the checkout, so that other
# machines cannot send commands (unlike RAY_AUTH_MODE=disabled) and the home folder stays unchanged.
$(RAY_TOKEN):
	@mkdir -p $(@D)
	@umask 077 && od -An -N32 -tx1 /dev/urandom | tr -d ' \n' > $@

serve: $(INSTALLED) $(RAY_TOKEN) ## Start a local Ray and the application of CONFIG, until Ctrl-C.
	RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$(CURDIR)/$(RAY_TOKEN) \
		exec $(BIN)/python -m deployments.launch.local --with-parent $(CONFIG)

generate: $(INSTALLED) ## Continue PROMPT in the terminal, without Ray.
	$(BIN)/dspark-ray generate "$$PROMPT" $(ARGS)

# Tests with a Ray cluster come after the others, one at a time: beside them, its processes would wait for cores.
test: $(INSTALLED) ## Run all tests; with ARGS, pytest with these arguments.
ifeq ($(strip $(ARGS)),)
	$(IN_PARALLEL) -m "not ray"
	$(BIN)/python -m pytest -m ray
else
	$(BIN)/python -m pytest $(ARGS)
endif

check: lint ## Before every commit: style, types and the fast tests.
	$(IN_PARALLEL) -q -m "not ray and not slow" tests/unit tests/golden tests/serve

test-clients: $(INSTALLED) ## Run client libraries and schemathesis against an echoing server (ARGS: --help).
	$(BIN)/python tests/clients $(ARGS)

lint: $(INSTALLED) ## Check style, formatting and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED) ## Rewrite the code in the project's format.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(INSTALLED) ## Build the documentation in .build/site; links, anchors and generated tables are checked.
	$(BIN)/python docs/generate_reference.py --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: $(INSTALLED) $(RAY_TOKEN) ## Measure; writes benchmarks/results/ and the tables of README.md and docs/performance.md.
	$(BIN)/python -m benchmarks.first_light --readme $(ARGS)

bench-schedule: $(INSTALLED) ## Measure the schedules against fixed lengths; writes benchmarks/results/schedule*.
	$(BIN)/python -m benchmarks.schedule --readme $(ARGS)

bench-controller: $(INSTALLED) ## Simulate load control and autoscaling; writes benchmarks/results/controller*.
	$(BIN)/python -m benchmarks.controller --readme $(ARGS)

bench-kernels: $(INSTALLED) ## Measure every kernel against its floor and a compiled reference (needs a GPU).
	$(BIN)/python -m benchmarks.gpu.kernels $(ARGS)

chaos: $(INSTALLED) ## Kill, stop and break every process while streams run; writes benchmarks/results/chaos*; continues an interrupted run.
	$(BIN)/python -m benchmarks.chaos $(ARGS)

# Where the machine's own Python has torch with CUDA, nothing is installed: such machines often reach no package index.
gpu-day: ## All checks and measurements that need a GPU, in nine minutes (ARGS=--dry-run runs them on a CPU).
	@if $(PYTHON) -c 'import torch, triton; assert torch.cuda.is_available()' 2>/dev/null; then python="$(PYTHON)"; \
	else $(MAKE) --no-print-directory install; python=$(BIN)/python; fi; \
	PYTHONPATH=kernels:. "$$python" -m benchmarks.gpu_day $(ARGS)

clean: ## Remove the virtual environment and caches; scratch work in .build stays.
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
