import subprocess
import sys

import numpy as np


# Tolerances of values and of gradients. Values have those of JAX's own tests, in
# jax/_src/public_test_util.py; gradients are tighter, as the oracle gets the rounded
# inputs.
TOLERANCE = {"float32": (1e-6, 1e-5), "bfloat16": (1e-2, 1e-2), "float16": (1e-3, 1e-3)}


def assert_close(actual, expected, tol, name="", floor=0.0):
    """Compares to `tol` of the largest entry, so a zero `actual` never passes."""
    actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
    scale = np.max(np.abs(expected), where=np.isfinite(expected), initial=0.0)
    atol = tol * scale + floor
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol, err_msg=name)


def run_python(*arguments):
    """Runs a program as a user does; its warnings are errors."""
    command = [sys.executable, "-W", "error", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=300)
