"""The tests themselves, run one at a time."""

import pathlib

from .helpers import run_python


ROOT = pathlib.Path(__file__).parent.parent


def test_a_single_doctest_is_quiet(monkeypatch):
    """libtpu, where it is installed, is not asked for a TPU, and prints no errors."""
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    # Other processes may hold it, and then it would be quiet for a reason of its own.
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    monkeypatch.chdir(ROOT)
    shown = run_python("-m", "pytest", "-n0", "-q", "-s", "jaxkl/_linear_head.py")
    assert shown.returncode == 0, shown.stdout
    assert "1 passed" in shown.stdout
    assert shown.stderr == ""
