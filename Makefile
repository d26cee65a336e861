# `make demo` for a first look, `make quick` while you edit, `make test` before you push, `make test-all` for everything, once.
# All lives in .venv; the tests of the Triton kernels, which need its interpreter, an older numpy and no GPU, run from the
# source tree in .venv-triton. The times are those of two cores.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
COMMA := ,
DEMO_READY := $(VENV)/.ready-demo
TRITON_VENV := .venv-triton
TRITON_BIN := $(TRITON_VENV)/bin
TRITON_READY := $(TRITON_VENV)/.ready
TRITON_TESTS := tests/backends/triton $(shell grep -l 'importorskip("triton")' tests/benchmarks/test_*.py)
# The tests in which torch's own convolutions and matrix products compute, which round differently from CPU to CPU; but for
# those of tracing, exporting, killing and ranks, which take long and compute nothing else.
ROUNDING_TESTS := -m "not slow" -k "not (graphs or export or compil or kill or ranks)" \
	tests/models tests/training tests/cli tests/nn tests/dropin
# Operators, layers and models on the CPU and the pages: what an edit breaks first.
QUICK_TESTS := -m "not slow" -k "not (graphs or export or compil or graph or ranks or recomputation or matrix or collapse or onnx)" \
	tests/ops tests/nn tests/docs
# Two other CPUs than this one, by the instructions that torch and its libraries may use. What Inductor has compiled for one
# is no code for another, but its cache does not tell them apart.
AVX2 := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 \
	TORCHINDUCTOR_CACHE_DIR=$(CURDIR)/$(VENV)/compiled-avx2
OLDEST := ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_CBWR=COMPATIBLE OMP_NUM_THREADS=1 \
	TORCHINDUCTOR_CACHE_DIR=$(CURDIR)/$(VENV)/compiled-oldest
DEMO := runs/demo
# With nvcc at hand the CUDA kernels are built too, for one GPU: the tests' torch is without CUDA, and the library must
# load and compute on the CPU all the same. FORCE_CUDA=0 leaves them out.
NVCC := $(firstword $(wildcard $(CUDA_HOME)/bin/nvcc /usr/local/cuda/bin/nvcc) $(shell command -v nvcc))
export FORCE_CUDA ?= $(if $(NVCC),1,0)
export TORCH_CUDA_ARCH_LIST ?= 9.0a

.PHONY: demo quick test test-slow test-cpus test-all test-triton test-triton-slow lint instructions clean
.NOTPARALLEL:

# Torch first and pinned: the build compiles against it, and a bare `torch` would bring gigabytes of CUDA.
define install
	@echo "== $(VENV): torch and $(1), then the kernels are compiled; about $(2) minutes"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch numpy "setuptools>=77" wheel ninja
	$(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation --editable ".[$(1)]"
	touch $@
endef
SOURCES := pyproject.toml setup.py cuda_toolkit.py constraints.txt $(wildcard csrc/*.h csrc/*/*)

$(READY): $(SOURCES)
	$(call install,train$(COMMA)test,8)
	touch $(DEMO_READY)

# What training needs, and the kernels of the CPU alone.
$(DEMO_READY): export FORCE_CUDA = 0
$(DEMO_READY): $(SOURCES)
	$(call install,train,3)

# The kernels' instruction budget is counted with this Triton; its interpreter needs numpy below 2.4.
$(TRITON_READY): Makefile constraints.txt
	@echo "== $(TRITON_VENV): torch and Triton; about 2 minutes"
	test -x $(TRITON_BIN)/python || $(PYTHON) -m venv $(TRITON_VENV)
	$(TRITON_BIN)/pip install --quiet --constraint constraints.txt torch "triton==3.6.0" "numpy<2.4" pytest pytest-xdist hypothesis
	touch $(TRITON_READY)

demo: $(DEMO_READY)
	@echo "== a VQ-VAE and its prior on scanned digits; about a minute"
	$(BIN)/vqkernels demo --out $(DEMO)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

quick: $(READY)
	@echo "== the tests that an edit breaks first; about 90 seconds"
	$(BIN)/pytest -n auto $(QUICK_TESTS)

test: lint test-triton
	@echo "== the whole suite but for its slow tests; about 10 minutes"
	$(BIN)/pytest -n auto -m "not slow"

test-slow: test-triton-slow
	@echo "== the slow tests; about 12 minutes"
	$(BIN)/pytest -n auto -m slow

test-cpus: $(READY)
	@echo "== what rounds differently on another CPU, on two of them; about 8 minutes"
	$(AVX2) $(BIN)/pytest -n auto $(ROUNDING_TESTS)
	$(OLDEST) $(BIN)/pytest -n auto $(ROUNDING_TESTS)

test-all: test test-slow test-cpus

# One worker per file: the files that compile share what they compiled. Triton has wheels for Linux alone.
ifeq ($(shell uname -s),Linux)
test-triton: $(READY) $(TRITON_READY)
	@echo "== the Triton kernels, interpreted; about 4 minutes"
	PYTHONPATH=$(CURDIR) $(TRITON_BIN)/pytest -n auto --dist loadfile -m "not slow" $(TRITON_TESTS)

test-triton-slow: $(READY) $(TRITON_READY)
	PYTHONPATH=$(CURDIR) $(TRITON_BIN)/pytest -n auto --dist loadfile -m slow $(TRITON_TESTS)
else
test-triton test-triton-slow:
	@echo "the Triton tests run on Linux: skipped"
endif

# Records the instruction counts of the C++ kernels, which tests/native compares; needs valgrind, but no torch.
instructions:
	PYTHONPATH=tests $(PYTHON) -m native.callgrind

clean:
	rm -rf $(VENV) $(TRITON_VENV) build dist *.egg-info vqkernels/*.so vqkernels/_build.json runs
