# `make demo` and `make test` need Python 3.11+, a C++ compiler and make; everything else they install into .venv.
PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: demo test soak bench gpu lint build wheel-test clean

demo: build
	$(BIN)/pymape demo

test: build
	$(BIN)/python -m pytest -n auto --dist worksteal tests

soak: build
	$(BIN)/python -m pytest tests -m soak -s

bench: build
	$(BIN)/python -m benchmarks all
	$(BIN)/python -m benchmarks.pages

# On a GPU machine, with the torch that it has: no .venv, no network. Parts that passed are skipped: run it again to go on.
gpu:
	$(PYTHON) -m benchmarks.gpu $(PARTS)

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

build: .venv/.installed
	mkdir -p build
	flock build/.lock $(BIN)/pip install -q --no-build-isolation --no-deps -e .

.venv/.installed: requirements-dev.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q -r requirements-dev.txt
	touch $@

wheel-test: .venv/.installed
	$(BIN)/python tests/wheel/run.py

clean:
	rm -rf build dist *.egg-info pymape/_C*.so
