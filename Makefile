# `make demo` and `make test` set up .venv themselves; both need Python 3.11 or 3.12 with venv, and a package index.

PYTHON ?= $(shell for p in python3.11 python3.12 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# One thread of torch in each of the two test processes, or they fight for the cores.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

# Not the default, whose searched scales and sweeps want a GPU.
DEMO_RECIPE := atom-w4a4
# Fewer than the recipe's 128 and the evaluation's 20: on two cores each of them takes half a minute.
DEMO_SAMPLES := 8
DEMO_WINDOWS := 6
DEMO_OUT := build/demo-w4a4

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint types pytest docs clean

help:
	@echo 'make demo   set up .venv, compress the demo model to 4 bits, print it beside its parent'
	@echo 'make test   set up .venv, run the linter, the type checker and the tests'
	@echo 'make docs   build the manual into build/docs'
	@echo 'make clean  remove what demo and test wrote (.venv stays)'

setup: $(STAMP)

# torch is named with its pin in the same line as everything else: pip then takes one build of it and keeps it.
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo 'atom needs Python 3.11 or 3.12; none found (set PYTHON=/path/to/python)' >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0 -e '.[dev]'
	@touch $@

demo: $(STAMP)
	@echo 'calibrating on $(DEMO_SAMPLES) sequences instead of 128, to be quick; measuring on $(DEMO_WINDOWS) held-out windows'
	$(BIN)/atom quantize demo --recipe $(DEMO_RECIPE) --samples $(DEMO_SAMPLES) -o $(DEMO_OUT) --force
	$(BIN)/atom eval kld $(DEMO_OUT) --against demo --windows $(DEMO_WINDOWS)

test: lint types pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

pytest: $(STAMP)
	$(ONE_THREAD) $(BIN)/python -m pytest -q -n 2 --durations 10

docs: $(STAMP)
	$(BIN)/sphinx-build -W -q -b html docs build/docs
	@echo 'build/docs/index.html'

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache
