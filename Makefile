# Two commands do all the set-up: `make demo` and `make test`. Everything is installed into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A pip before 23.1, as Debian 12 has it, would run deepspeed's setup.py by itself, with a page of warnings.
PIP = $(BIN)/python -m pip install --quiet --use-pep517 --constraint constraints.txt --editable
NOT_INSTALLED = { echo "error: packages are not installed, for the reason above: a package index and 8 GB of room" \
	"are needed; the same command goes on here" >&2; exit 2; }
export PIP_DISABLE_PIP_VERSION_CHECK = 1

# Tests run side by side: many of them wait. `make test WORKERS=0` runs them one after the other.
WORKERS ?= 3
PYTEST = $(BIN)/python -m pytest -n $(WORKERS)

# An environment that was half made is made again.
.DELETE_ON_ERROR:

.PHONY: help demo test test-changed test-times lint audit format docs clean

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

audit: $(VENV)/dev.stamp ## known vulnerabilities of the installed packages (pip-audit; needs a network)
	$(BIN)/python -m pip_audit --local --skip-editable --strict

format: $(VENV)/dev.stamp ## rewrite the sources as ruff formats them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/dev.stamp ## the documentation as a site in site/, every warning an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet $(ARGS)

clean: ## remove the environment, all runs and the site
	rm -rf $(VENV) runs site

$(BIN)/python:
	@test -w . || { echo "error: this checkout cannot be written to, and everything is installed into it;" \
		"clone it to a folder of your own" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or later is needed," \
		"and $(PYTHON) is $$($(PYTHON) --version 2>&1); say which to take: make PYTHON=python3.12 ..." >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' || { echo "error: $(PYTHON) cannot make virtual environments;" \
		"on Debian and Ubuntu: apt install python3-venv" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo.stamp: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into $(VENV): torch and what the demo needs, some minutes and 8 GB"
	@$(PIP) '.[demo]' || $(NOT_INSTALLED)
	touch $@

$(VENV)/dev.stamp: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into $(VENV): torch and what the tests need, some minutes and 8 GB"
	@$(PIP) '.[demo,dev,docs]' || $(NOT_INSTALLED)
	touch $@
