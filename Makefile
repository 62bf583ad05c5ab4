# Everything runs inside .venv, which the first target that needs it creates.
#
#   make demo     the example from start to end      make check    style, types, import rule
#   make test     tests and the examples in docs     make bench    measurements
#   make docs     generated pages, examples          make format   let ruff rewrite the files
#   make lock     write requirements.lock anew       make clean    remove what was generated
#   make distclean   the same, and .venv
#
# Variables:
#   PYTHON        the interpreter that makes .venv (3.11 or newer)
#   TORCH_INDEX   where torch comes from. On Linux, PyPI's torch brings GPU libraries of several
#                 gigabytes. Without a GPU, take PyTorch's own CPU build:
#                     make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
#                 Left empty, torch comes from wherever pip is configured to look.
#   WORKERS       test processes

PYTHON ?= python3
TORCH_INDEX ?=
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TORCH := $(shell sed -n '/^torch==/p' requirements.lock)

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_PROGRESS_BAR := off

.DEFAULT_GOAL := help
.PHONY: help install demo test check bench docs format lock clean distclean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

install: $(STAMP)

# torch goes first, because only it may come from another index. --no-deps everywhere else: the
# lock is complete, so pip installs what it lists and nothing more.
$(STAMP): requirements.lock pyproject.toml
	@command -v $(PYTHON) >/dev/null || { \
	  echo "$(PYTHON) was not found. Name a Python 3.11 or newer: make PYTHON=/path/to/python3"; \
	  exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "$$($(PYTHON) -V) is too old: secateur needs 3.11 or newer. Try make PYTHON=python3.11"; \
	  exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$(PYTHON) cannot make virtual environments. On Debian: apt install python3-venv"; \
	  exit 1; }
	$(PYTHON) -m venv $(VENV)
ifeq ($(TORCH_INDEX),)
	$(BIN)/pip install --constraint requirements.lock $(TORCH)
else
	$(BIN)/pip install --no-deps --index-url $(TORCH_INDEX) $(TORCH)
endif
	$(BIN)/pip install --no-deps --requirement requirements.lock
	$(BIN)/pip install --no-deps --no-build-isolation --editable .
	@touch $@

demo: $(STAMP)
	PATH="$(CURDIR)/$(BIN):$$PATH" sh examples/fashion_mnist/demo.sh

test: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS)

check: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(STAMP)
	$(BIN)/python -m bench

docs: $(STAMP)
	$(BIN)/python docs/generate.py
	$(BIN)/python -m pytest -n $(WORKERS) README.md CONTRIBUTING.md docs tests/test_docs.py

format: $(STAMP)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

lock: $(STAMP)
	$(BIN)/python .ci/lock.py

clean:
	rm -rf build dist out docs/_build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache \
	  .hypothesis src/*.egg-info
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
