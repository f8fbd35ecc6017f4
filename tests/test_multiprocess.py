"""Two processes of four CPU devices, over loopback: the loss, and the example."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.tree_util import keystr

from .alone import assert_gradients, expected_cross_entropy, expected_log_probs
from .cases import assert_gradient, assert_source_gradient, FLOATS
from .helpers import assert_close
from .multiprocess_worker import (
    ALONE_MESH,
    make_alone_cases,
    make_cases,
    MESHES,
    prefix,
    PROCESSES,
)
from .sources import expected_of


ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "multihost.py"
pytestmark = [pytest.mark.slow, pytest.mark.newest]


def run(folder, *commands, timeout):
    """Runs programs side by side: `(status, output)` of each. None outlives this.

    One that is killed for the time it takes has a status, and its output, too.
    """
    running, deadline = [], time.monotonic() + timeout
    try:
        for i, command in enumerate(commands):
            with open(folder / f"{i}.txt", "wb") as output:
                process = subprocess.Popen(
                    [sys.executable, "-u", *map(str, command)],
                    cwd=ROOT,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            running.append(process)
        with contextlib.suppress(subprocess.TimeoutExpired):
            for process in running:
                process.wait(max(0, deadline - time.monotonic()))
    finally:
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # it, and what it started
            process.wait()
    texts = [(folder / f"{i}.txt").read_text("utf-8") for i in range(len(commands))]
    return [(x.returncode, text) for x, text in zip(running, texts, strict=True)]


def test_loss_and_gradients_in_two_processes(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    file = tmp_path / "results.npz"
    worker = ("-m", "tests.multiprocess_worker", address)
    commands = [(*worker, i, file) for i in range(PROCESSES)]
    for status, text in run(tmp_path, *commands, timeout=240):
        assert status == 0, text

    with np.load(file) as npz:
        results = dict(npz)

    def take(name, mesh, like):
        """The results of a case, in the places of the arrays of `like`."""
        of = lambda path, _: results.pop(prefix(name, mesh) + keystr(path))
        return jax.tree.map_with_path(of, like)

    for name, (student, teacher, divergence, arguments) in make_cases().items():
        inputs = dict(student=student, teacher=teacher)
        inputs |= {k: arguments[k] for k in FLOATS if k in arguments}
        expected = expected_of(student, teacher, divergence=divergence[1], **arguments)
        for mesh in MESHES[name]:
            case = prefix(name, mesh)
            got = take(name, mesh, dict(inputs, value=0.0))
            assert_close(got.pop("value"), expected.loss, 5e-6, case)
            for model in ("student", "teacher"):
                wanted = getattr(expected, model)
                assert_source_gradient(
                    inputs[model], got.pop(model), wanted, case + model, 1e-5
                )
            for k, grad in got.items():
                assert_gradient(k, grad, expected, 1e-5)
    for name, (floats, others, g, options) in make_alone_cases().items():
        got = take(name, ALONE_MESH, dict(floats, value=g))
        if name == "cross_entropy":
            smoothed = dict(floats, **others, **options)
            expected = expected_cross_entropy(cotangent=g, **smoothed)
            want = expected.loss
        else:
            sizes = {k: v for k, v in options.items() if k != "with_entropy"}
            expected = expected_log_probs(**floats, **others, cotangents=g, **sizes)
            want = expected.log_probs, expected.entropy
        for x, y in zip(*map(jax.tree.leaves, (got["value"], want)), strict=True):
            assert_close(x, y, 5e-6, name)
        assert_gradients(floats, got, expected, 1e-5)
    assert not results


def losses_of(text):
    lines = [x.split("]")[-1].split() for x in text.splitlines() if " loss " in x]
    assert lines[-1][:2] == ["final", "loss"] and text.endswith(lines[-1][-1] + "\n")
    return [float(x[-1]) for x in lines]


def test_example_prints_the_same_losses_in_any_number_of_processes(tmp_path):
    losses = []
    for options, processes in (
        (("--launch=2",), 2),
        (("--devices-per-process=8",), 1),
        (("--devices-per-process=1",), 1),
    ):
        command = (EXAMPLE, "--steps=3", *options)
        ((status, text),) = run(tmp_path, command, timeout=240)
        assert status == 0, text
        assert f"processes: {processes} with" in text
        losses.append(losses_of(text))
    assert len(losses[0]) == 4 and losses[0][-1] < losses[0][0]
    for other in losses[1:]:  # printed to the fifth digit
        np.testing.assert_allclose(other, losses[0], rtol=0, atol=1.5e-5)


def test_example_ends_when_a_process_dies(tmp_path):
    command = (EXAMPLE, "--launch=2", "--die-at=2")
    ((status, text),) = run(tmp_path, command, timeout=120)
    assert status == 1, text
    assert "step   1" in text and "step   2" not in text
    assert "Process 1 died first (SIGKILL)." in text
    # The other noticed by itself, before the launcher killed it: so it does anywhere.
    assert "[0] Process 0 stops: " in text or "tasks are unhealthy" in text, text
