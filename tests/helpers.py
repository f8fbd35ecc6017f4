import subprocess
import sys

import numpy as np


# (value, gradient). Values as in jax/_src/public_test_util.py; gradients are tighter,
# because the oracle is given the rounded inputs.
TOLERANCE = {"float32": (1e-6, 1e-5), "bfloat16": (1e-2, 1e-2), "float16": (1e-3, 1e-3)}


def assert_close(actual, expected, tol, name="", floor=0.0):
    """Checks to `tol` of the largest entry, so a zero `actual` never passes."""
    actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
    scale = np.max(np.abs(expected), where=np.isfinite(expected), initial=0.0)
    atol = tol * scale + floor
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol, err_msg=name)


def run_python(*arguments):
    """A program as a user runs it; its warnings are errors."""
    command = [sys.executable, "-W", "error", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=300)
