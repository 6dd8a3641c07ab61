# Every target that needs the environment makes it first, so on a fresh machine one command is enough.

PYTHON ?= python3
VENV   ?= .venv
JOBS   ?= 2
ifeq ($(origin CXX),default)
  CXX := c++
endif

BIN         := $(abspath $(VENV))/bin
PIP         := $(BIN)/python -m pip --disable-pip-version-check
# Exactly what the lock lists, file for file: nothing is resolved, built or run.
LOCKED      := install --progress-bar off --require-hashes --only-binary :all: --no-deps
TORCH        = $(shell grep -o '^torch==[0-9.]*' requirements/torch.txt)
WANTS_CUDA  := import importlib.metadata as m, sys; sys.exit('cuda' not in str(m.requires('torch')))
TOOLS       := build/tools
NATIVE      := $(wildcard CMakeLists.txt setup.py) $(shell find cmake csrc -type f 2>/dev/null)
CPP_FILES    = $(shell git ls-files --cached --others --exclude-standard '*.h' '*.cpp' '*.cu' '*.cuh')

# cmake and ninja come with the environment; the system's are not needed.
export PATH := $(BIN):$(PATH)

.PHONY: help setup test test-gpu mutate check-cuda check-triton sanitize tidy wheel check-wheel lint format docs docs-serve bench demo lock audit licences clean
.DEFAULT_GOAL := help

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F '\t' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: $(VENV)/.installed  ## make .venv with everything in it and build the native libraries (CUDA where nvcc is)

test: $(VENV)/.installed  ## run every test this machine can run
	$(BIN)/python -m pytest -n $(JOBS) $(PYTEST_ARGS)

test-gpu: $(VENV)/.installed  ## run the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu $(PYTEST_ARGS)

mutate: $(VENV)/.installed  ## make small wrong edits in a copy, one at a time: tests have to catch each (JOBS lists at a time)
	$(BIN)/python -m tests.mutations --jobs $(JOBS) $(MUTATE_ARGS)

check-cuda: $(VENV)/.installed  ## registers, spills, width of memory accesses, occupancy of every CUDA kernel
	$(BIN)/python scripts/check_cuda.py

check-triton: $(VENV)/.installed  ## compile every Triton kernel for every architecture; registers, spills, access widths
	$(BIN)/python scripts/check_triton.py

sanitize: $(VENV)/.installed  ## the native code under AddressSanitizer, UBSan, ThreadSanitizer and LeakSanitizer
	$(BIN)/python -m tests.sanitised

tidy: $(VENV)/.installed  ## clang-tidy over the C++ and CUDA kernels
	$(BIN)/python scripts/tidy.py

wheel: $(VENV)/.installed  ## the wheel in dist/, for every Python and PyTorch, with the CUDA kernels where nvcc is
	PYTHON=$(BIN)/python scripts/build_wheel.sh

check-wheel: $(VENV)/.installed  ## test that wheel beside several Pythons and PyTorches, without a compiler; downloads much
	$(BIN)/python scripts/check_wheel.py

lint: $(VENV)/.installed  ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(if $(CPP_FILES),$(BIN)/clang-format --dry-run -Werror $(CPP_FILES))

format: $(VENV)/.installed  ## rewrite the sources in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(if $(CPP_FILES),$(BIN)/clang-format -i $(CPP_FILES))

# The theme's makers advertise their next tool in every build.
docs docs-serve: export NO_MKDOCS_2_WARNING := 1

docs: $(VENV)/.installed  ## build the site into build/site, a warning being an error
	$(BIN)/mkdocs build --strict

docs-serve: $(VENV)/.installed  ## show the site, and again after every change
	$(BIN)/mkdocs serve

bench: $(VENV)/.installed  ## time the op on this machine's CPU and print the table
	$(BIN)/python -m benchmarks run --suite op --device cpu

demo: $(VENV)/.installed  ## train the tiny model with and without AttBalance; writes demo/report.html
	$(BIN)/attbalance demo

lock: $(TOOLS)/.installed  ## pin what pyproject.toml asks for, with hashes; newer versions with LOCK_ARGS=--upgrade
	PATH=$(abspath $(TOOLS))/bin:$$PATH $(TOOLS)/bin/python scripts/lock.py $(LOCK_ARGS)

# --strict: a package that the service does not know is an error; without it such a run would call itself clean.
audit: $(TOOLS)/.installed  ## ask PyPI for known vulnerabilities of every pinned version
	$(TOOLS)/bin/pip-audit --strict --require-hashes --disable-pip $(AUDIT_ARGS) $(foreach file,torch cuda lock tools,-r requirements/$(file).txt)

licences: $(VENV)/.installed  ## write the table of docs/supply-chain.md: under which licence everything is that is pinned
	$(BIN)/python -m scripts.licences

clean:  ## remove the environment, builds and caches
	rm -rf $(VENV) build dist *.egg-info attbalance_ext/kernels/lib/*.so
	rm -rf .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Three steps, each with a stamp: the environment, everything in the lock, the package itself.

$(VENV)/.created:
	@command -v $(PYTHON) >/dev/null || { echo "No '$(PYTHON)' found: install Python >= 3.10, or name one with 'make setup PYTHON=...'."; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(not ((3, 10) <= v < (3, 11) or (3, 11, 5) <= v < (3, 15)))' || { \
	  echo "The lock is for Python 3.10 and 3.11.5 to 3.14; '$(PYTHON)' is $$($(PYTHON) -V 2>&1). Name another with 'make setup PYTHON=python3.12'."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.platform != "linux")' || { \
	  echo "The lock is for Linux. Elsewhere: pip install -e '.[train,transformers,dev,docs,examples]'."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "'$(PYTHON)' cannot make virtual environments: install its venv package (Debian, Ubuntu: apt install python3-venv)."; exit 1; }
	@command -v $(CXX) >/dev/null || { \
	  echo "No C++ compiler '$(CXX)' found: install one (Debian, Ubuntu: apt install g++) or name one with CXX=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# PyTorch is whichever build pip finds here, of CUDA or for the CPU alone; once it is here, its hash must be listed.
# The build for CUDA asks for NVIDIA's libraries, 3 GB.
$(VENV)/.locked: requirements/torch.txt requirements/cuda.txt requirements/lock.txt | $(VENV)/.created
	rm -rf $(VENV)/torch
	$(PIP) download --progress-bar off --only-binary :all: --no-deps -d $(VENV)/torch $(TORCH)
	$(PIP) $(LOCKED) --no-index --find-links $(VENV)/torch -r requirements/torch.txt
	rm -rf $(VENV)/torch
	if $(BIN)/python -c "$(WANTS_CUDA)"; then $(PIP) $(LOCKED) -r requirements/cuda.txt; fi
	$(PIP) $(LOCKED) -r requirements/lock.txt
	@touch $@

# ATTBALANCE_CPU=1: in a checkout C++ kernels that cannot be built are an error. CUDA: see setup.py.
$(VENV)/.installed: $(VENV)/.locked pyproject.toml $(NATIVE)
	ATTBALANCE_CPU=1 $(PIP) install --progress-bar off --no-deps --no-build-isolation -e .
	$(PIP) check
	@touch $@

# What makes and audits the lock needs another environment: it would decide versions of ours.
$(TOOLS)/.installed: requirements/tools.txt
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip --disable-pip-version-check $(LOCKED) -r requirements/tools.txt
	@touch $@
