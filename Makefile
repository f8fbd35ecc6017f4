# Every target sets up what it needs, once; nothing has to be installed first.
PYTHON ?= python3
BIN := .venv/bin
BENCH := .venv-bench/bin
FLOOR := .venv-floor/bin
JAX_FLOOR := $(shell sed -n 's/.*"jax>=\([0-9.]*\)".*/\1/p' pyproject.toml)
WORKERS ?= 2
CORE := tests/test_kl_div.py tests/test_divergences.py tests/test_distillation_singular.py

.PHONY: bench distill test test-slow test-floor lint clean

distill: .venv/.train  ## train a teacher, distil a student: table and picture
	$(BIN)/python examples/digits.py $(ARGS)

test: .venv/.test  ## the test suite and the doctests
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow" $(ARGS)

test-slow: .venv/.test  ## the rare heavy cases
	$(BIN)/python -m pytest -n $(WORKERS) -m slow $(ARGS)

test-floor: .venv-floor/.done  ## the core tests on the oldest JAX that is supported
	$(FLOOR)/python -m pytest -n $(WORKERS) -m "not slow" $(CORE) $(ARGS)

bench: .venv-bench/.done  ## time and memory beside other libraries: tables, pictures
	$(BENCH)/python -m benchmarks $(ARGS)

lint: .venv/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean:
	rm -rf .venv .venv-bench .venv-floor

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.train: pyproject.toml | .venv/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[train]"
	touch $@

.venv/.test: pyproject.toml | .venv/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[train,test]"
	touch $@

.venv/.lint: .venv/.test
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[lint]"
	touch $@

.venv-floor/.done: pyproject.toml
	$(PYTHON) -m venv .venv-floor
	$(FLOOR)/pip install --quiet --disable-pip-version-check -e . \
	  "jax==$(JAX_FLOOR)" "jaxlib==$(JAX_FLOOR)" pytest pytest-xdist scipy
	touch $@

# Apart, because JAX looks for a TPU wherever libtpu is installed.
.venv-bench/.done: pyproject.toml
	$(PYTHON) -m venv .venv-bench
	$(BENCH)/pip install --quiet --disable-pip-version-check -e ".[bench]"
	# Without its dependencies: triton is for GPUs, and torch is there.
	$(BENCH)/pip install --quiet --disable-pip-version-check --no-deps liger-kernel
	touch $@
