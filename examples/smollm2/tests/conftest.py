"""Fixtures: a tiny teacher, a short text, and the programs run on them."""

import os
import sys
import tempfile
from pathlib import Path


os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of the time goes into compiling, and the same programs again and again.
os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp()
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
import pytest

import data
import tiny


jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(scope="session")
def teacher_path(tmp_path_factory):
    return tiny.write_gguf(tmp_path_factory.mktemp("teacher") / "tiny.gguf")


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(data.language_reference()[5000:8000])
    return path


@pytest.fixture(scope="session")
def common(teacher_path, text):
    """Returns the options that cache.py and train.py share."""
    options = {"teacher": teacher_path, "text": text, "length": 32, "held-out": 3}
    return [f"--{name}={value}" for name, value in options.items()]


@pytest.fixture(scope="session")
def run():
    """Returns a function that runs a module's `main`."""

    def run(module, *arguments):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [module.__file__, *map(str, arguments)])
            module.main()

    return run
