# Two commands do all the set-up: `make demo` and `make test`. Everything is installed into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK = 1

# Tests run side by side: many of them wait. `make test WORKERS=0` runs them one after the other.
WORKERS ?= 3
PYTEST = $(BIN)/python -m pytest -n $(WORKERS)

.PHONY: help demo test test-changed test-times lint format clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: $(VENV)/demo.stamp ## the whole pipeline on this machine; writes runs/demo/report.html
	$(BIN)/python -m pacl_scale.quickstart $(ARGS)

test: $(VENV)/dev.stamp ## all tests (ARGS="-k name" chooses some; WORKERS=0: one after the other)
	$(PYTEST) --junit-xml=runs/tests.xml $(ARGS)

test-changed: $(VENV)/dev.stamp ## tests that import what is changed and not committed (BASE=main: what the branch changed)
	$(PYTEST) --impacted --impacted-module=pacl_scale --impacted-tests-dir=tests \
	    $(if $(BASE),--impacted-git-mode=branch --impacted-base-branch=$(BASE)) $(ARGS)

test-times: $(VENV)/dev.stamp ## seconds of each test file in the newest `make test`, the slowest first
	$(BIN)/python tests/times.py runs/tests.xml

lint: $(VENV)/dev.stamp ## ruff (rules and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/dev.stamp ## rewrite the sources as ruff formats them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the environment and all runs
	rm -rf $(VENV) runs

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit("error: Python 3.11 or later is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo.stamp: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[demo]'
	touch $@

$(VENV)/dev.stamp: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[demo,dev]'
	touch $@
