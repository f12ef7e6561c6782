# SPDX-License-Identifier: Apache-2.0
# Everything starts here: `make demo` shows the machine, `make test` checks it. Both set up .venv first, once.
#
# PYTHON=python3.12 make setup    another interpreter (>= 3.11)
# CC=clang make setup             another C compiler

PYTHON ?= python3
ifneq ($(filter default undefined,$(origin CC)),)
CC := $(shell for c in cc gcc clang; do command -v $$c && break; done 2>/dev/null)
endif
ifneq ($(strip $(CC)),)
export CC
endif

VENV    := .venv
PIP     := $(VENV)/bin/python -m pip --quiet --disable-pip-version-check --no-input
NATIVE  := $(wildcard shm/native/*.c shm/native/*.h verify/explorer/native/*.c verify/explorer/native/*.h)
SETUP   := $(VENV)/.setup-done
# The requirements of one extra of pyproject.toml, a line each, without building the project a second time.
EXTRA    = $(VENV)/bin/python -c 'import sys, tomllib; \
	print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"][sys.argv[1]], sep="\n")'

.PHONY: help setup test lint conformance barriers demo bench clean
help:
	@echo "make setup | demo | test | lint | conformance | barriers | bench | clean"

setup: $(SETUP)

# ------------------------------------------------------------------------------------------------------ setting up
# Each check is one sentence that says what is missing and what to install; the first that fails ends the set-up.

define CHECKS
@test -n "$(strip $(CC))" && printf 'int main(void) { return 0; }\n' | $(CC) -x c -o /dev/null - 2>/dev/null || { \
	echo "pvbus needs a C compiler and found none that works: install one, for example with 'apt-get install gcc libc6-dev' or 'dnf install gcc'." >&2; exit 3; }
@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	echo "pvbus needs Python 3.11 or newer and '$(PYTHON)' is not: install one and name it, for example 'make setup PYTHON=python3.12'." >&2; exit 3; }
@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
	echo "pvbus needs the venv module of '$(PYTHON)': install it, for example with 'apt-get install python3-venv'." >&2; exit 3; }
@"$(PYTHON)" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))' || { \
	echo "pvbus needs the C headers of '$(PYTHON)': install them, for example with 'apt-get install python3-dev'." >&2; exit 3; }
endef

$(SETUP): pyproject.toml $(NATIVE)
	$(CHECKS)
	@test -x $(VENV)/bin/python || { echo "making $(VENV)"; "$(PYTHON)" -m venv $(VENV); }
	@echo "building pvbus into $(VENV)"
	@rm -f shm/_core*.so verify/explorer/_engine*.so
	@$(PIP) install --editable '.[explorer]'
	@$(VENV)/bin/python -c 'import pvbus.shm._core, pvbus.shm._core_explored, pvbus.shm._core_gated'
	@touch $@

$(VENV)/.extra-%-done: pyproject.toml $(SETUP)
	@echo "installing what '$*' needs"
	@$(EXTRA) $* > $(VENV)/extra-$*.txt
	@$(PIP) install --requirement $(VENV)/extra-$*.txt
	@touch $@

# --------------------------------------------------------------------------------------------------------- running

lint: $(VENV)/.extra-dev-done
	$(VENV)/bin/ruff check --quiet .
	$(VENV)/bin/mypy --no-error-summary
	PYTHONPATH=.dev $(VENV)/bin/lint-imports --no-logo

test: lint
	$(VENV)/bin/python -m pytest -q

conformance: $(VENV)/.extra-dev-done
	PYTHONPATH=.dev $(VENV)/bin/python tests/tidy/conformance.py

# docs/barriers.md, by some hundred searches: minutes
barriers: setup
	PYTHONPATH=.dev $(VENV)/bin/python -m pvbus.verify.barriers

demo: setup
	$(VENV)/bin/pvbus demo

bench: $(SETUP) $(VENV)/.extra-bench-done
	$(VENV)/bin/python benchmarks/run.py
	$(VENV)/bin/python benchmarks/device.py

clean:
	rm -rf $(VENV) build dist pvbus.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache artifacts
	rm -f shm/_core*.so verify/explorer/_engine*.so
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
