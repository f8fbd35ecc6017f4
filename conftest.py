"""What doctests find defined, what must be said before JAX is imported, an option."""

import gc
import os
from collections import Counter
from importlib.metadata import version


# Unless it is said: else JAX, where libtpu is installed, seeks a TPU, for up to a
# minute, and libtpu prints errors.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Where compilation is to be quick, the first takes half of the rest, and the second a
# tenth more: a small program is not worth its parts. Newer versions of XLA lack the
# first, and XLA ends a program that gives it an unknown flag.
if os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS") == "1" and tuple(
    map(int, version("jaxlib").split(".")[:2])
) < (0, 11):
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "")
        + " --xla_cpu_use_fusion_emitters=false"
        + " --xla_cpu_parallel_codegen_split_count=1"
    )

import pytest

import jaxkl


def pytest_addoption(parser):
    text = "run the first N of the parameters of each test, and all if it is `newest`"
    parser.addoption("--cases", type=int, metavar="N", help=text)


@pytest.hookimpl(trylast=True)  # of those that `-m` has left
def pytest_collection_modifyitems(config, items):
    most = config.getoption("--cases")
    if most is None:
        return
    count, taken, others = Counter(), [], []
    for item in items:
        test = item.nodeid.partition("[")[0]
        count[test] += 1
        is_taken = count[test] <= most or item.get_closest_marker("newest")
        (taken if is_taken else others).append(item)
    config.hook.pytest_deselected(items=others)
    items[:] = taken


def pytest_collection_finish():
    # What is imported by now stays. To go over it again and again, and over the graphs
    # of traced programs, takes a twentieth of the time of the tests.
    gc.freeze()
    gc.set_threshold(50_000, 20, 1000)


@pytest.fixture(autouse=True)
def _doctest_names(doctest_namespace):
    doctest_namespace["jaxkl"] = jaxkl
