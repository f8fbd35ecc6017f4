"""The example of a loss from hidden states, as a user runs it."""

from pathlib import Path

import numpy as np
import pytest

from .helpers import run_python, run_with


EXAMPLE = Path(__file__).parent.parent / "examples" / "fused_head.py"
SMALL = "--length 128 --steps 2".split()


@pytest.mark.newest
@pytest.mark.slow
def test_fused_head():
    result = run_python(EXAMPLE, *SMALL)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    steps = np.array([x.split() for x in lines if x[:4].strip().isdigit()], float)
    assert steps.shape == (2, 4) and np.isfinite(steps).all()
    np.testing.assert_allclose(steps[:, 2], steps[:, 1], rtol=1e-5)
    assert steps[0, 1] > 0.01 and steps[0, 1] != steps[1, 1]
    logits, heads = (float(x.split()[1]) for x in lines if "MiB" in x)
    # One array of logits is 128 MiB.
    assert logits > 2 * 128 and heads < logits - 128


@pytest.mark.slow
def test_fused_head_fails_if_the_forms_differ():
    patch = (
        "import jaxkl;"
        "Head = jaxkl.LinearHead;"
        "jaxkl.LinearHead = lambda hidden, kernel: Head(1.001 * hidden, kernel)"
    )
    result = run_with(patch, EXAMPLE, *"--vocab 256 --length 16 --steps 1".split())
    assert result.returncode == 1, result.stdout + result.stderr
    assert "NOT the same" in result.stderr
