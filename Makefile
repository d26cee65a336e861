# `make demo` for a first look, `make test` for people, `make test-all` for CI. Everything lives in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO := runs/demo

.PHONY: demo test test-all lint clean

# Torch first and pinned: the build compiles against it, and a bare `torch` would bring gigabytes of CUDA.
$(READY): pyproject.toml setup.py constraints.txt $(wildcard csrc/*/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch numpy "setuptools>=77" wheel pybind11
	$(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation --editable ".[train,test]"
	touch $(READY)

demo: $(READY)
	$(BIN)/vqkernels demo --out $(DEMO)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/pytest -n auto -m "not slow"

test-all: lint
	$(BIN)/pytest -n auto

clean:
	rm -rf $(VENV) build dist *.egg-info vqkernels/*.so vqkernels/_build.json runs
