# SPDX-License-Identifier: Apache-2.0
# `make demo` and `make test` work on a fresh machine that has make and Python 3.11 or newer.

VENV ?= .venv
# The first interpreter that is new enough; `make PYTHON=/path/to/python3 ...` takes another.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN = $(VENV)/bin

.PHONY: help demo test test-beam lint format test-lmms-eval

help:
	@echo "make demo    install into $(VENV), then make videos, train and evaluate in runs/demo"
	@echo "make test    install into $(VENV), then run the tests"
	@echo "make test-beam  test preparing with Apache Beam, in an environment of its own"
	@echo "make test-lmms-eval  compare with lmms-eval, in an environment of its own (3 GB)"
	@echo "make lint    formatting, lint and types"
	@echo "make format  rewrite the files as lint wants them"

demo: $(VENV)/.installed
	$(BIN)/slowfast demo --workdir runs/demo

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Beam holds other packages back, so it does not share an environment with the rest.
test-beam: $(VENV)-beam/.installed
	$(VENV)-beam/bin/python -m pytest tests/data/check_beam.py

$(VENV)-beam/.installed: pyproject.toml
	$(MAKE) --no-print-directory VENV=$(VENV)-beam $(VENV)-beam/bin/pip
	$(VENV)-beam/bin/python -m pip install --quiet -e ".[dev,beam]"
	@touch $@

# It pins an older PyAV than this package needs, so it comes first. Its torchvision does not load
# beside a PyTorch without CUDA, and nothing here needs it.
test-lmms-eval: $(VENV)-lmms/.installed
	$(VENV)-lmms/bin/python tests/eval/lmms_proof.py

$(VENV)-lmms/.installed: pyproject.toml
	$(MAKE) --no-print-directory VENV=$(VENV)-lmms $(VENV)-lmms/bin/pip
	$(VENV)-lmms/bin/python -m pip install --quiet torch==2.13.0 torchvision==0.28.0 lmms-eval==0.7.3
	$(VENV)-lmms/bin/python -m pip uninstall --quiet --yes torchvision
	$(VENV)-lmms/bin/python -m pip install --quiet -e ".[eval]"
	@touch $@

lint: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# pip and not python: without ensurepip, venv fails but leaves a python behind.
$(BIN)/pip:
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer found; install one, or name it:" \
	  "make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "On Debian and Ubuntu this needs the package of the same" \
	  "Python, for instance python3.11-venv." >&2; exit 1; }

# Editable: a changed source is in effect at once, so only pyproject.toml asks for a new install.
$(VENV)/.installed: pyproject.toml | $(BIN)/pip
	$(BIN)/python -m pip install --quiet -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/pip
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	@touch $(VENV)/.installed $@

# With PyTorch, which some tests compare with; no test is left out for want of it.
$(VENV)/.installed-test: pyproject.toml | $(BIN)/pip
	$(BIN)/python -m pip install --quiet -e ".[dev,parity]"
	@touch $(VENV)/.installed $(VENV)/.installed-dev $@
