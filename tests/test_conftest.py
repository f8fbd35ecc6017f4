"""A single test can be run without noise."""

import pathlib

from .helpers import run_python


ROOT = pathlib.Path(__file__).parent.parent


def test_a_single_doctest_is_quiet(monkeypatch):
    """JAX does not look for a TPU where libtpu is installed: nothing is printed."""
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    # libtpu would also be quiet if another process held it.
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    monkeypatch.chdir(ROOT)
    shown = run_python("-m", "pytest", "-n0", "-q", "-s", "jaxkl/_linear_head.py")
    assert shown.returncode == 0, shown.stdout
    assert "1 passed" in shown.stdout
    assert shown.stderr == ""
