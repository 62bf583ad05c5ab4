# Everything runs inside .venv, which the first target that needs it creates.
#
#   make demo     the example from start to end      make check    style, types, import rule
#   make test     tests and the examples in docs     make bench    measurements
#   make docs     generated pages, examples          make format   let ruff rewrite the files
#   make bench-runtime   sparse models against dense ones
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
#   CXX           the C++ compiler. Without one, everything but the sparse runtime works.

PYTHON ?= python3
TORCH_INDEX ?=
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TORCH := $(shell sed -n '/^torch==/p' requirements.lock)
LIBRARY := src/secateur/runtime/libsecateur.so
NATIVE := $(shell find native -path native/inplace -prune -o -path native/tests -prune -o -type f -print)

# make sets CXX to g++ itself; cmake would take that for a wish and look for no other.
ifneq ($(origin CXX),default)
export CXX
endif
# Both are in requirements.lock.
CMAKE := CMAKE_GENERATOR=Ninja PATH="$(CURDIR)/$(BIN):$$PATH" cmake
COMPILER := $(shell command -v $(CXX) c++ clang++ 2>/dev/null | head -n 1)

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_PROGRESS_BAR := off
# Many containers set it; then each of the many processes of the tests and of the demo compiles the
# whole package anew, which takes longer than importing it.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install native check-native demo test check bench bench-runtime docs format lock clean distclean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

install: $(STAMP) $(LIBRARY)

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
	$(BIN)/pip install --no-deps --no-build-isolation --config-settings=wheel.cmake=false --editable .
	@touch $@

# Built beside its Python loader, where an editable install looks for it. Without a compiler this
# says so and goes on; a compiler that fails is an error.
native $(LIBRARY): $(STAMP) $(NATIVE)
ifeq ($(COMPILER),)
	@echo "No C++ compiler was found: the sparse runtime is left out. On Debian: apt install g++"
else
	@mkdir -p build
	@$(CMAKE) -S native -B build/native -DSECATEUR_INPLACE=ON >build/native.log 2>&1 || { \
	  cat build/native.log; exit 1; }
	@$(CMAKE) --build build/native
	@touch $(LIBRARY)
endif

check-native: $(STAMP)
	CMAKE_GENERATOR=Ninja PATH="$(CURDIR)/$(BIN):$$PATH" native/tests/check.sh build/native-check

demo: $(STAMP) $(LIBRARY)
	PATH="$(CURDIR)/$(BIN):$$PATH" sh examples/fashion_mnist/demo.sh

test: $(STAMP) $(LIBRARY)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

check: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

bench-runtime: $(STAMP) $(LIBRARY)
	$(BIN)/python -m bench gemv patterns speed chains --threads 2

bench: $(STAMP) $(LIBRARY)
	$(BIN)/python -m bench

docs: $(STAMP) $(LIBRARY)
	$(BIN)/python docs/generate.py
	$(BIN)/python -m pytest -n $(WORKERS) README.md CONTRIBUTING.md docs tests/test_docs.py

format: $(STAMP)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

lock: $(STAMP)
	$(BIN)/python .ci/lock.py

clean:
	rm -rf build dist out docs/_build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache \
	  .hypothesis src/*.egg-info $(LIBRARY)
	find native/inplace -mindepth 1 ! -path native/inplace/CMakeLists.txt -delete
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
