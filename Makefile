# Manyhats. `make` lists the targets; `make serve` and `make test` do their own set-up.

# Bytecode is made by the first import (see INSTALL): without it every start takes as long as the first.
unexport PYTHONDONTWRITEBYTECODE

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
MAKEFLAGS += --no-print-directory

# Any of these can be given on the command line, e.g. make install PYTHON=python3.12
PYTHON ?= python3
TORCH ?= 2.13.0
# For the tests where torch brings no triton of its own: its CPU build. The CUDA build names the version it needs.
TRITON ?= 3.9.0
# Where the CPU build of torch is taken from on a machine without an NVIDIA GPU, but only if plain pip
# would bring the CUDA build there (several GB). Empty: plain pip, whatever it brings.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
# Added to the command of `make serve`, e.g. make serve ARGS="--port 9000"
ARGS ?=
# Added to the command of `make test`, e.g. make test TESTS="tests/api -x"
TESTS ?=
# Processes that `make test` spreads the test files over; 0: none but its own
WORKERS ?= 2
# Added to the command of `make bench`, e.g. make bench BENCH="--quick --rounds 1"
BENCH ?=
# What `make loadtest` runs, and what it gives to Locust
SCENARIO ?= steady
LOADTEST ?= --host http://127.0.0.1:8000

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMPS := $(VENV)/.stamps
# Bytecode is left to the first import of what is really imported: a minute less on two cores.
INSTALL := $(PIP) install --no-compile -c constraints.txt
# pip's chatter as one paragraph of names; what it says on stderr stays, less complaints about its index
BRIEF := awk '/^(Collecting|Processing)/ { sub(/.*\//, "", $$2); sub(/[-=<>~!;][0-9<>=~!].*/, "", $$2); printf " %s", $$2; fflush() } \
  /^Installing collected/ { print "\n    installing " NF - 3 " packages"; fflush() }'
HUSH := 2> >(grep -v '^WARNING: Location' >&2)

.PHONY: help install serve test test-ray lint format check bench loadtest demo-adapters api-docs constraints clean

help: ## List the targets
	@sed -nE 's/^([a-z-]+):.* ## (.*)/\1|\2/p' Makefile | awk -F'|' '{ printf "  make %-14s %s\n", $$1, $$2 }'

install: $(STAMPS)/base $(STAMPS)/kernels ## Make .venv with the `manyhats` command

serve: install ## Serve the default model and the demo adapters on 127.0.0.1:8000
	@exec $(BIN)/manyhats serve --adapter-root examples/adapters --register-roots $(ARGS)

test: $(STAMPS)/dev $(STAMPS)/kernels ## Run the test suite
	@$(BIN)/manyhats fetch-default >/dev/null
	@{ command -v prometheus && command -v promtool; } >/dev/null || deploy/prometheus/fetch-tools "$${MANYHATS_HOME:-$$HOME/.manyhats}/tools" || true
	@$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(TESTS)

test-ray: .venv-ray/.stamp ## Run the tests behind Ray Serve (Ray, 400 MB, gets an environment of its own)
	@.venv-ray/bin/python -m pytest -W default -o log_cli=true -o log_cli_level=INFO tests/fleet/test_ray_serve.py $(TESTS)

# Its packages lie before those of .venv, which it sees too, with the checkout that .venv points to.
.venv-ray/.stamp: pyproject.toml $(STAMPS)/dev
	@$(BIN)/python -m venv .venv-ray
	@$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
	  >"$$(.venv-ray/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/shared.pth"
	@$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["ray"])' \
	  | xargs .venv-ray/bin/python -m pip --disable-pip-version-check install -q $(HUSH)
	@touch $@

lint: $(STAMPS)/dev ## Check style, types and the direction of imports
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: $(STAMPS)/dev ## Format the code and repair what ruff can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

check: lint test ## lint, then test

bench: $(STAMPS)/dev $(STAMPS)/kernels ## Measure serving beside PEFT and transformers (about an hour)
	@$(BIN)/manyhats fetch-default >/dev/null
	@$(BIN)/python loadtests/run_serve_bench.py $(BENCH)

loadtest: .venv-loadtest/.stamp ## Run a Locust scenario (SCENARIO, LOADTEST) against a running server
	@.venv-loadtest/bin/python loadtests/run_locust.py $(SCENARIO) $(LOADTEST)

# Locust replaces parts of the standard library as it is imported: it gets an environment of its own.
.venv-loadtest/.stamp: pyproject.toml
	@$(PYTHON) -m venv .venv-loadtest
	@.venv-loadtest/bin/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["loadtest"])' \
	  | xargs .venv-loadtest/bin/python -m pip --disable-pip-version-check install -q
	@touch $@

demo-adapters: $(STAMPS)/dev ## Train the demo adapters of examples/ again
	@$(BIN)/manyhats fetch-default >/dev/null
	@$(BIN)/python examples/train_demo_adapters.py

api-docs: $(STAMPS)/dev ## Write docs/api.md from the routes
	@$(BIN)/python docs/generate_api.py

constraints: $(STAMPS)/dev ## Pin in constraints.txt what is installed in .venv
	@{ sed -n '/^#/p' constraints.txt; $(PIP) freeze --exclude-editable --exclude triton \
	  | sed -E '/^(torch==|nvidia-|cuda-)/d'; } >constraints.new
	@mv constraints.new constraints.txt

clean: ## Remove .venv and the caches; what is in MANYHATS_HOME stays
	rm -rf $(VENV) .venv-loadtest .venv-ray build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache .grimp_cache
	find server kernels tests examples loadtests -name __pycache__ -type d -prune -exec rm -rf {} +

# Set-up. Each step leaves a stamp and is done again when what it was made from is newer.

$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "Manyhats needs Python 3.11 or newer, and '$(PYTHON)' is $$($(PYTHON) --version 2>&1 || true)." \
	    "Name another one, e.g. make install PYTHON=python3.12" >&2; exit 1; }
	@echo "==> Virtual environment in $(VENV) ($$($(PYTHON) --version))"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install -q --upgrade 'pip>=25'
	@mkdir -p $(STAMPS)
	@touch $@

$(STAMPS)/torch: constraints.txt | $(STAMPS)/venv
	@if [ "$$($(PIP) show torch 2>/dev/null | sed -nE 's/^Version: ([0-9.]+).*/\1/p')" = '$(TORCH)' ]; then \
	  exit 0; \
	elif [ -e /dev/nvidia0 ] || nvidia-smi -L >/dev/null 2>&1; then \
	  echo "==> torch $(TORCH) with CUDA: an NVIDIA GPU is here"; \
	  $(INSTALL) 'torch==$(TORCH)' $(HUSH); \
	elif [ -n '$(TORCH_CPU_INDEX)' ] && $(PIP) install --dry-run --ignore-installed -q --report - \
	    'torch==$(TORCH)' 2>/dev/null | grep '"name": "nvidia-' >/dev/null; then \
	  echo "==> torch $(TORCH) for the CPU from $(TORCH_CPU_INDEX): no NVIDIA GPU is here"; \
	  $(INSTALL) --no-deps --index-url '$(TORCH_CPU_INDEX)' 'torch==$(TORCH)'; \
	else \
	  echo "==> torch $(TORCH)"; \
	  $(INSTALL) 'torch==$(TORCH)' $(HUSH); \
	fi
	@touch $@

$(STAMPS)/base: pyproject.toml $(STAMPS)/torch
	@echo "==> Manyhats and what it needs"
	@$(INSTALL) -e . $(HUSH) | $(BRIEF)
	@touch $@

$(STAMPS)/dev: pyproject.toml $(STAMPS)/torch
	@echo "==> Manyhats and what it needs, with its tests and linters"
	@told=$$($(PIP) show torch); pin=; [[ $$told =~ Requires:[^$$'\n']*triton ]] || \
	  pin="triton==$(TRITON); platform_system == 'Linux' and platform_machine == 'x86_64'"; \
	$(INSTALL) -e '.[dev]' $${pin:+"$$pin"} $(HUSH) | $(BRIEF)
	@touch $(STAMPS)/base $@

$(STAMPS)/kernels: $(wildcard kernels/manyhats_kernels/native/*.[ch]) | $(STAMPS)/base
	@echo "==> CPU kernels"
	@$(BIN)/manyhats build-kernels
	@touch $@
