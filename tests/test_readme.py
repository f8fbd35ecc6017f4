"""The code in the README runs, and says the truth."""

import pathlib
import re

import numpy as np
import pytest


README = pathlib.Path(__file__).parent.parent / "README.md"


@pytest.fixture(scope="module")
def names():
    """What the README's code defines, run as one program."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert blocks
    names = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    return names


def test_both_forms_of_the_first_example_agree(names):
    np.testing.assert_allclose(names["same"], names["T"] ** 2 * _kl(names), rtol=1e-5)
    assert names["gradient"].shape == names["student_logits"].shape


def test_the_fused_gradients_are_there(names):
    assert names["d_hidden"].shape == names["hidden"].shape
    assert names["d_kernel"].shape == names["kernel"].shape


def _kl(names):
    s, t = (
        np.asarray(names[name], np.float64) / names["T"]
        for name in ("student_logits", "teacher_logits")
    )
    log_q, log_p = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (s, t))
    return np.sum(np.exp(log_p) * (log_p - log_q), -1).mean()
