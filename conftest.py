"""What doctests find defined, what must be said before JAX is imported, options."""

import os
from importlib.metadata import version


# Unless it is said: else JAX, where libtpu is installed, seeks a TPU, for up to a
# minute, and libtpu prints errors.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Where compilation is to be quick, this takes half of the rest. Newer versions of XLA
# have no such flag, and XLA ends a program that gives it an unknown one.
if os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS") == "1" and tuple(
    map(int, version("jaxlib").split(".")[:2])
) < (0, 11):
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_cpu_use_fusion_emitters=false"
    )

import pytest

import jaxkl


def pytest_addoption(parser):
    text = "run at most N of the parameters of each test, unless it is `newest`"
    parser.addoption("--cases", type=int, metavar="N", help=text)
    text = "which ones: other numbers, other parameters"
    parser.addoption("--cases-from", type=int, default=0, metavar="I", help=text)


@pytest.hookimpl(trylast=True)  # of those that `-m` has left
def pytest_collection_modifyitems(config, items):
    most, first = config.getoption("--cases"), config.getoption("--cases-from")
    if most is None:
        return
    tests = {}
    for item in items:
        if not item.get_closest_marker("newest"):
            tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
    others = set()
    for cases in tests.values():
        number = min(most, len(cases))
        chosen = {
            (first + i * len(cases) // number) % len(cases) for i in range(number)
        }
        others.update(case for i, case in enumerate(cases) if i not in chosen)
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if item not in others]


@pytest.fixture(autouse=True)
def _doctest_names(doctest_namespace):
    doctest_namespace["jaxkl"] = jaxkl
