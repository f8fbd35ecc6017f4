"""A single test can be run without noise, and each test with its first cases."""

import pathlib

import pytest

from .helpers import run_python


ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.slow
def test_a_single_doctest_is_quiet(monkeypatch):
    """JAX does not look for a TPU where libtpu is installed: nothing is printed."""
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    # libtpu would also be quiet if another process held it.
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    monkeypatch.chdir(ROOT)
    shown = run_python(
        "-m", "pytest", "-n0", "-q", "-s", "jaxkl/_source/linear_head.py"
    )
    assert shown.returncode == 0, shown.stdout
    assert "1 passed" in shown.stdout
    assert shown.stderr == ""


def test_the_first_cases_of_each_test(tmp_path):
    """Of those that `-m` leaves; and all cases that are marked `newest`."""
    (tmp_path / "conftest.py").write_text((ROOT / "conftest.py").read_text())
    (tmp_path / "test_it.py").write_text(
        "import pytest\n"
        "slow = pytest.param(0, marks=pytest.mark.slow)\n"
        "@pytest.mark.parametrize('x', [slow, 1, 2, 3, 4])\n"
        "def test_some(x): pass\n"
        "@pytest.mark.newest\n"
        "@pytest.mark.parametrize('x', [1, 2, 3])\n"
        "def test_all(x): pass\n"
        "def test_one(): pass\n"
    )
    options = ["-p", "no:cacheprovider", "-c", ROOT / "pyproject.toml", "-q"]
    options += ["--collect-only", "--rootdir", tmp_path, "-m", "not slow", "--cases=2"]
    shown = run_python("-m", "pytest", *options, tmp_path)
    assert shown.returncode == 0, shown.stdout + shown.stderr
    found = [x.split("::")[1] for x in shown.stdout.splitlines() if "::" in x]
    want = [f"test_some[{x}]" for x in "12"] + [f"test_all[{x}]" for x in "123"]
    assert found == [*want, "test_one"]
