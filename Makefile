# SPDX-License-Identifier: Apache-2.0
# Everything from a fresh clone: each target makes the environment and the build it needs.
#
#   make test     the test suite                      (PYTEST_ARGS="-m slow" for the slow part)
#   make train    Fashion-MNIST, end to end, plots    (TRAIN_ARGS="--set ..." to change the recipe)
#   make bench    the benchmarks, then the report     (BENCH_ARGS="-k resnet18" for a part,
#                                                      --all-shapes --scaling for everything)
#   make lint     what the checks say about style;    make format  puts it right
#   make clean    removes the environment and everything built
#
# TORCH names another torch: make test TORCH="torch==2.10.0 torchvision==0.25.0"

VENV ?= .venv
PYTHON ?= python3
TORCH ?= torch==2.14.1 torchvision==0.29.1
PYTEST_ARGS ?=
TRAIN_ARGS ?=
BENCH_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
LINTERS := ruff==0.17.6 clang-format==23.1.5  # the versions of .pre-commit-config.yaml
SOURCES := setup.py pyproject.toml README.md $(shell find csrc fastresnet -name '*.cpp' -o -name '*.h' \
	-o -name '*.cu' -o -name '*.cuh' -o -name '*.map' -o -name '*.py')
CPP_SOURCES := $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: test train bench lint format clean
.DELETE_ON_ERROR:

# The installed commands are run, not `python -m ...`, which would put this folder on sys.path and
# its fastresnet/, without the compiled libraries, before the installed one.
# In two processes, which take three fifths of the time of one. Their threads then outnumber small
# machines' cores, and where they wait for each other by spinning, it takes longer than in one.
test: $(VENV)/.installed
	@echo "==> testing"
	OMP_WAIT_POLICY=passive $(BIN)/pytest -n 2 --dist worksteal $(PYTEST_ARGS)

train: $(VENV)/.installed $(VENV)/.data
	@echo "==> training on Fashion-MNIST"
	$(BIN)/fastresnet train fashion-mnist $(TRAIN_ARGS)

bench: $(VENV)/.installed
	@echo "==> benchmarking: leave the machine alone meanwhile"
	$(BIN)/pytest benchmarks $(BENCH_ARGS)
	$(BIN)/python benchmarks/report.py

$(VENV)/.torch:
	@echo "==> making $(VENV) with $(TORCH)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH) "setuptools>=77" ninja
	@touch $@

$(VENV)/.installed: $(VENV)/.torch $(SOURCES)
	@echo "==> building and installing fastresnet"
	$(PIP) --no-build-isolation ".[test,bench]"
	@touch $@

# Debian carries the data set. Where this does not work, the command finds the data another way.
$(VENV)/.data: | $(VENV)/.torch
	@echo "==> looking for the data set"
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		install="apt-get install -y --no-install-recommends dataset-fashion-mnist"; \
		export DEBIAN_FRONTEND=noninteractive; \
		$$install >/dev/null 2>&1 || { apt-get update >/dev/null 2>&1 && $$install >/dev/null 2>&1; } \
			|| echo "    no Debian package; the command looks elsewhere"; \
	fi
	@touch $@

$(BIN)/ruff: | $(VENV)/.torch
	@echo "==> installing $(LINTERS)"
	$(PIP) $(LINTERS)

lint: $(BIN)/ruff
	@echo "==> checking style"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP_SOURCES)

format: $(BIN)/ruff
	@echo "==> formatting"
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_SOURCES)

clean:
	@echo "==> removing $(VENV) and everything built"
	rm -rf $(VENV) build dist *.egg-info fastresnet/_C*.so fastresnet/_build.json
