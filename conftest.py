"""What doctests find defined."""

import pytest

import jaxkl


@pytest.fixture(autouse=True)
def _doctest_names(doctest_namespace):
    doctest_namespace["jaxkl"] = jaxkl
