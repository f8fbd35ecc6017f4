"""The example of a head that is spread over devices, as a user runs it."""

from pathlib import Path

import numpy as np
import pytest

from .cases import rarely
from .helpers import run_python, run_with


EXAMPLE = Path(__file__).parent.parent / "examples" / "sharded_head.py"


@pytest.mark.parametrize(
    "options, part",
    [
        *rarely(("--vocab 1024 --tokens 64 --steps 2", "(128, 256)")),
        ("--data 4 --model 2 --vocab 1002 --tokens 68 --steps 2", "(128, 501)"),
    ],
)
def test_same_losses_as_on_one_device(options, part):
    result = run_python(EXAMPLE, *options.split())
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].startswith("8 cpu devices") and "same" in lines[-1]
    assert part in lines[1]
    steps = np.array([x.split() for x in lines if x[:4].strip().isdigit()], float)
    assert steps.shape == (2, 4)
    np.testing.assert_allclose(steps[:, 2], steps[:, 1], rtol=1e-5)
    assert steps[1, 1] < steps[0, 1]


@pytest.mark.slow
def test_it_fails_if_the_losses_differ():
    patch = (
        "import jaxkl;"
        "loss = jaxkl.sharded_distillation_loss;"
        "jaxkl.sharded_distillation_loss = lambda *x, **y: 1.001 * loss(*x, **y)"
    )
    result = run_with(patch, EXAMPLE, *"--vocab 64 --tokens 16 --steps 1".split())
    assert result.returncode == 1, result.stdout + result.stderr
    assert "NOT the same" in result.stderr
