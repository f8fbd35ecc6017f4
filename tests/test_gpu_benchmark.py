"""The command for GPUs, run without one: its rows, and what makes it fail."""

import importlib.util
import inspect
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import jaxkl
from benchmarks import gpu, gpu_job, heads

from .helpers import run_python


ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def quick_compilation(monkeypatch):
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")


def run(output, *options, root=ROOT, code=0):
    """Runs the command; returns its rows, what it printed, and its errors."""
    program = root / "benchmarks" / "gpu.py"
    done = run_python(program, "--small", "--output", output, *options)
    assert done.returncode == code, done.stdout + done.stderr
    return json.loads(output.read_text())["rows"], done.stdout, done.stderr


def of(rows, **facts):
    found = [row for row in rows if facts.items() <= row.items()]
    assert found, facts
    return found


def peers(*names):
    return [x for name in names for x in ("--peer", name)]


@pytest.mark.slow
def test_every_row_is_there_and_right(tmp_path):
    names = peers("jaxkl", "plain JAX", "torch eager")
    rows, shown, _ = run(tmp_path / "gpu.json", *names)
    for divergence in gpu.DIVERGENCES:
        for form in ("heads", "dense"):
            for dtype in ("float32", "bfloat16"):
                case = dict(form=form, divergence=divergence, dtype=dtype)
                (row,) = of(rows, work="check", peer="jaxkl", **case)
                assert row["state"] == "ok"
                assert 0 < row["gradient_error"] <= gpu_job.TOLERANCES[dtype]
    assert all(row["state"] == "ok" for row in of(rows, peer="jaxkl, tile=16"))
    has_plans = "plan" in inspect.signature(jaxkl.distillation_loss).parameters
    for row in of(rows, peer="jaxkl, plan=lean"):
        assert row["state"] == ("ok" if has_plans else "skipped")
    assert all(row["ms"] > 0 for row in of(rows, work="ceilings", state="ok"))
    assert len(of(rows, work="ceilings", state="ok")) == 4
    for work in ("heads", "dense"):
        for peer in ("jaxkl", "jaxkl, tile=64", "plain JAX"):
            (row,) = of(rows, work=work, peer=peer)
            assert row["state"] == "ok"
            assert row["ms"] > 0 and row["ratio"] > 0
            assert row["temp_bytes"] > 0 and row["output_bytes"] > 0
            assert 0 < row["error_at_size"] <= gpu_job.TOLERANCES["bfloat16"]
        (row,) = of(rows, work=work, peer="torch eager")
        if importlib.util.find_spec("torch"):
            assert row["state"] == "ok" and row["ms"] > 0
        else:
            assert row["state"] == "skipped"
            assert row["reason"] == "No module named 'torch'"
    assert all(row["peer"] in shown for row in rows)


@pytest.mark.slow
@pytest.mark.torch
def test_torch_compile_is_right_and_liger_is_skipped_by_name(tmp_path):
    rows, _, _ = run(tmp_path / "gpu.json", *peers("torch.compile", "Liger"))
    for row in of(rows, peer="torch.compile"):
        assert row["state"] == "ok" and row["ms"] > 0
    (row,) = of(rows, peer="Liger")
    assert row["state"] == "skipped"
    assert row["reason"] == "No module named 'liger_kernel'"


@pytest.mark.slow
def test_a_peer_that_is_wrong_by_two_percent_makes_the_exit_code_1(tmp_path):
    shutil.copytree(ROOT / "benchmarks", tmp_path / "benchmarks")
    (tmp_path / "jaxkl").symlink_to(ROOT / "jaxkl")
    with open(tmp_path / "benchmarks" / "losses.py", "a") as file:
        file.write("\n\nright = with_plain_jax\n")
        file.write("with_plain_jax = lambda name: lambda *x: 1.02 * right(name)(*x)\n")
    output = tmp_path / "gpu.json"
    rows, shown, errors = run(output, *peers("plain JAX"), root=tmp_path, code=1)
    assert {row["state"] for row in of(rows, peer="plain JAX")} == {"WRONG"}
    assert "WRONG" in shown
    assert errors.endswith("WRONG: heads, plain JAX\nWRONG: dense, plain JAX\n")


def test_what_there_was_no_time_for_is_named(tmp_path):
    rows, _, errors = run(tmp_path / "gpu.json", "--seconds", "0", code=1)
    for name in ("jaxkl", "jaxkl, tile=64", "jaxkl, plan=lean", *gpu.PEERS):
        for row in of(rows, work="heads", peer=name):
            assert (row["state"], row["reason"]) == ("stopped", "0 s were used up")
    assert "stopped: check, jaxkl\n" in errors


@pytest.mark.parametrize(
    "work, state, required, bad",
    [
        ("heads", "ok", True, False),
        ("heads", "WRONG", False, True),
        ("heads", "failed", True, True),
        ("heads", "failed", False, False),
        ("heads", "out of memory", True, False),
        ("check", "out of memory", True, True),
        ("check", "stopped", True, True),
        ("check", "skipped", True, False),
    ],
)
def test_the_exit_code(work, state, required, bad):
    row = dict(work=work, state=state, required=required)
    assert gpu.failures([row]) == ([row] if bad else [])


def test_a_process_that_dies_is_a_failure():
    (row,) = gpu.run({"kind": "no such kind"}, 60, None)
    assert row["state"] == "failed"
    assert row["reason"].startswith("exit code 1: KeyError")


def test_a_process_that_takes_too_long_is_stopped():
    (row,) = gpu.run({"kind": "machine"}, 0.1, None)
    assert row == {"state": "stopped", "reason": "it was stopped after 0 s"}


class Fake:
    """Outputs at the size that is timed."""

    def __init__(self, form, transposed):
        arrays = heads.arrays(*gpu_job.ODD)
        if form == "dense":
            arrays = [arrays[0] @ arrays[1], arrays[2] @ arrays[3]]
        value, *gradients = gpu_job.in_float64(form, "forward-kl", arrays)
        self.transposed = transposed
        self.arguments = gpu_job.layout(self, arrays, (1, 3))
        self.outputs = gpu_job.layout(self, [value, *gradients], (2,))

    def error(self, form):
        value, *gradients = self.outputs
        return gpu_job.error_at_size(self, form, "forward-kl", value, gradients)

    to_numpy = staticmethod(np.asarray)


@pytest.mark.parametrize(
    "form, transposed", [("heads", False), ("heads", True), ("dense", False)]
)
def test_mistakes_at_the_timed_size_are_seen(form, transposed):
    fake = Fake(form, transposed)
    assert fake.error(form) < 1e-5
    for i, output in enumerate(fake.outputs):
        wrong = 1.02 * output if i else np.nan * output
        fake.outputs[i] = wrong
        assert not fake.error(form) < 0.01
        fake.outputs[i] = output
    last = np.array(fake.outputs[1])
    last[-1] *= 1.1
    fake.outputs[1] = last
    assert fake.error(form) > 0.01
