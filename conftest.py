"""What doctests find defined, and what must be said before JAX is imported."""

import os


# Unless it is said: else JAX, where libtpu is installed, seeks a TPU, for up to a
# minute, and libtpu prints errors.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import pytest

import jaxkl


@pytest.fixture(autouse=True)
def _doctest_names(doctest_namespace):
    doctest_namespace["jaxkl"] = jaxkl
