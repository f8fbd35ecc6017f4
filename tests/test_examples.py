"""The examples as a user runs them: they exit as they should, and tell the truth."""

import argparse
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from .cases import rarely
from .helpers import run_python


EXAMPLES = Path(__file__).parent.parent / "examples"
WAYS = ("labels alone", "distilled, same images", "distilled, all images")
ROWS = ("teacher", *WAYS)
PROGRAMS = [x for x in EXAMPLES.rglob("*.py") if "__main__" in x.read_text()]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda x: x.name)
def test_first_line_says_how_to_run_it(program):
    first = program.read_text().splitlines()[0]
    command = re.match("# `(make .+)` builds (an environment and runs)?", first)
    assert command, first
    make, *arguments = shlex.split(command[1])
    assert shutil.which(make)
    # If `make` runs these tests, the inner `make` must not take the outer one's ARGS.
    outer = "MAKEFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "MFLAGS", "ARGS", "PYTHON"
    environment = {k: v for k, v in os.environ.items() if k not in outer}
    dry = [make, "--dry-run", *arguments]
    options = dict(cwd=EXAMPLES.parent, env=environment)
    shown = subprocess.run(dry, **options, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    python, started = shown.stdout.splitlines()[-1].split()
    assert re.fullmatch(r"\.venv[-a-z]*/bin/python", python)
    if command[2]:
        assert started == str(program.relative_to(EXAMPLES.parent))
    else:
        assert python.split("/")[0] in first


def run(program, *options, patch=None, code=0):
    """Runs an example that must exit with `code`, after a line of Python if given."""
    path = EXAMPLES / program
    start = [path]
    if patch:
        then = f"import runpy; runpy.run_path({str(path)!r}, run_name='__main__')"
        start = ["-c", f"{patch}; {then}"]
    result = run_python(*start, *options)
    assert result.returncode == code, result.stdout + result.stderr
    return result


def losses_of(lines):
    """The printed table of steps: its number, two losses that must agree, and time."""
    return np.array([x.split() for x in lines if x[:4].strip().isdigit()], float)


@pytest.fixture(scope="module")
def digits():
    spec = importlib.util.spec_from_file_location("digits", EXAMPLES / "digits.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_digits(result, out):
    """Checks the files against the printed table, and returns the numbers."""
    assert "\x1b" not in result.stdout  # piped: no control characters, no wide lines
    table = result.stdout.split(" held-out images;")[1].split("Wrote")[0]
    assert max(map(len, table.splitlines())) <= 80
    assert str(out / "metrics.json") in result.stdout
    assert str(out / "digits.png") in result.stdout

    numbers = json.loads((out / "metrics.json").read_text())
    assert tuple(numbers["rows"]) == ROWS
    seeds = numbers["settings"]["seeds"]
    for name, row in numbers["rows"].items():
        (line,) = (x for x in table.splitlines() if x.startswith(f"  {name}  "))
        assert ("kl" in row) == (name != "teacher")
        for key, digits_shown, highest in (("accuracy", 2, 100), ("kl", 4, 50)):
            if key not in row:
                continue
            values = np.array(row[key]["per_seed"])
            assert values.shape == (seeds,)
            assert np.all(np.isfinite(values) & (values >= 0) & (values <= highest))
            np.testing.assert_allclose(row[key]["mean"], values.mean())
            np.testing.assert_allclose(row[key]["std"], values.std(ddof=1), atol=1e-12)
            shown = f"{row[key]['mean']:.{digits_shown}f} ± "
            assert shown + f"{row[key]['std']:.{digits_shown}f}" in line
        assert line.split()[-1] == "-" or "kl" in row
    for pair, difference in numbers["differences"].items():
        first, second = (numbers["rows"][way] for way in pair.split(" - "))
        for key in ("accuracy", "kl"):
            values = np.subtract(first[key]["per_seed"], second[key]["per_seed"])
            error = values.std(ddof=1) / seeds**0.5
            np.testing.assert_allclose(difference[key]["mean"], values.mean())
            np.testing.assert_allclose(difference[key]["standard_error"], error)
            form = {
                "accuracy": "{:+.2f} ± {:.2f} points",
                "kl": "{:+.4f} ± {:.4f} nats",
            }
            shown = difference[key]["mean"], difference[key]["standard_error"]
            assert form[key].format(*shown) in table
    return numbers


def check_picture(path, colours):
    from matplotlib.colors import to_rgb
    from matplotlib.image import imread

    picture = imread(path)[..., :3]
    height, width, _ = picture.shape
    assert height >= 300 and width >= 800
    assert (
        0.5 < np.mean(np.all(picture == 1, -1)) < 0.95
    )  # it is neither blank nor covered
    for half in np.array_split(picture, 2, axis=1):
        for colour in colours:  # both panels have every curve
            near = np.all(np.abs(half - np.array(to_rgb(colour))) < 0.02, -1)
            assert near.sum() > 50, colour


@pytest.mark.newest
@pytest.mark.slow
def test_digits_small(tmp_path, digits):
    out = tmp_path / "deep" / "out"
    options = "--steps 30 --seeds 2 --seed 7 --labels 60".split()
    numbers = check_digits(run("digits.py", *options, "--output", out), out)
    assert numbers["settings"]["labels"] == 60 and numbers["settings"]["seed"] == 7
    assert [row["labels"] for row in numbers["rows"].values()] == [1297, 60, 60, 60]
    assert [row["images"] for row in numbers["rows"].values()] == [1297, 60, 60, 1297]
    assert numbers["rows"]["teacher"]["accuracy"]["mean"] > 95
    check_picture(out / "digits.png", digits.COLOURS.values())


@pytest.mark.slow
@pytest.mark.parametrize("divergence", ["forward-kl", "reverse-kl", "jensen-shannon"])
def test_digits_shows_the_known_effect(tmp_path, divergence):
    result = run("digits.py", "--divergence", divergence, "--output", tmp_path)
    numbers = check_digits(result, tmp_path)
    difference = numbers["differences"]["distilled, all images - labels alone"]
    assert difference["accuracy"]["mean"] > 3
    assert difference["kl"]["mean"] < 0
    assert '"distilled, all images" beats "labels alone"' in result.stdout


@pytest.mark.slow
def test_digits_without_weight_for_the_teacher_is_labels_alone(tmp_path):
    options = "--alpha 0 --steps 30 --seeds 2".split()
    result = run("digits.py", *options, "--output", tmp_path)
    rows = check_digits(result, tmp_path)["rows"]
    assert rows["labels alone"]["kl"] == rows["distilled, same images"]["kl"]
    assert "distillation did NOT beat labels alone" in result.stdout


@pytest.mark.parametrize(
    "gain, words",
    [(5, "beats"), (0, "does not clearly differ from"), (-5, "does WORSE than")],
)
def test_digits_words_follow_the_numbers(digits, capsys, gain, words):
    rng = np.random.default_rng(0)
    accuracy = np.full((3, 8), 80.0) + rng.uniform(-1, 1, (3, 8))
    accuracy[2] += gain
    if gain == 0:
        accuracy[2] = accuracy[0] + [1, -1] * 4
    args = argparse.Namespace(labels=100, seeds=8)
    numbers = digits.report(args, np.full(8, 97.0), accuracy, np.ones((3, 8)))
    printed = capsys.readouterr().out
    assert f'"{WAYS[2]}" {words} "{WAYS[0]}"' in printed
    assert ("did NOT beat labels alone" in printed) == (gain <= 0)
    difference = numbers["differences"][f"{WAYS[2]} - {WAYS[0]}"]
    assert difference["accuracy"]["sign"] == np.sign(gain)
    assert difference["kl"] == {"mean": 0.0, "standard_error": 0.0, "sign": 0}


BAD_OPTIONS = """
    --temperature=0 --temperature=nan --temperature=inf --temperature=warm --alpha=-0.1
    --alpha=1.1 --alpha=nan --labels=0 --labels=1298 --labels=2.5 --steps=0 --seed=-1
    --seeds=1 --divergence=kl
"""


@pytest.mark.parametrize("given", BAD_OPTIONS.split())
def test_digits_bad_option(digits, monkeypatch, capsys, tmp_path, given):
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["digits.py", given, "--output", str(out)])
    with pytest.raises(SystemExit) as exit:
        digits.main()
    assert exit.value.code == 2
    option, value = given.split("=")
    message = capsys.readouterr().err.splitlines()[-1]
    assert f"argument {option}: " in message and repr(value) in message
    assert not out.exists()


@pytest.mark.slow
def test_digits_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    result = run("digits.py", "--output", tmp_path / "file" / "out", code=2)
    assert "argument --output: cannot write there" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.torch
@pytest.mark.slow
def test_from_pytorch_agrees():
    result = run("from_pytorch.py")
    assert result.stderr == ""
    assert "All the same to 1e-05" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80
    step = next(x for x in result.stdout.splitlines() if x.startswith("   5"))
    torch_loss, kl_div_loss, distillation_loss, worst = map(float, step.split()[1:])
    assert torch_loss > 0.1 and worst < 1e-5
    np.testing.assert_allclose([kl_div_loss, distillation_loss], torch_loss, rtol=1e-5)


@pytest.mark.torch
@pytest.mark.slow
def test_from_pytorch_fails_if_something_differs():
    patch = (
        "import jaxkl;"
        "off = lambda f: lambda *args, **kwargs: 1.0001 * f(*args, **kwargs);"
        "jaxkl.kl_div = off(jaxkl.kl_div);"
        "jaxkl.distillation_loss = off(jaxkl.distillation_loss)"
    )
    message = run("from_pytorch.py", patch=patch, code=1).stdout
    message = message.split("NOT the same:")[1]
    for what in ("kl_div_loss", "distillation_loss"):
        assert f"step 1, {what}: " in message
        assert f"step 5, gradient of {what} to kernel1: " in message
    assert "the mean over N" not in message  # the module was left as it is
    assert "kl_div at target 1: " in message


def test_from_pytorch_without_pytorch():
    patch = "import sys; sys.modules['torch'] = None"
    result = run("from_pytorch.py", patch=patch, code=2)
    assert 'pip install "torch==2.13.0"' in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.newest
@pytest.mark.slow
def test_fused_head():
    lines = run("fused_head.py", *"--length 128 --steps 2".split()).stdout.splitlines()
    assert max(map(len, lines)) <= 80
    steps = losses_of(lines)
    assert steps.shape == (2, 4) and np.isfinite(steps).all()
    np.testing.assert_allclose(steps[:, 2], steps[:, 1], rtol=1e-5)
    assert steps[0, 1] > 0.01 and steps[0, 1] != steps[1, 1]
    logits, heads = (float(x.split()[1]) for x in lines if "MiB" in x)
    # One array of logits is 128 MiB.
    assert logits > 2 * 128 and heads < logits - 128


@pytest.mark.slow
@pytest.mark.parametrize(
    "options, part",
    [
        *rarely(("--vocab 1024 --tokens 64 --steps 2", "(128, 256)")),
        ("--data 4 --model 2 --vocab 1002 --tokens 68 --steps 2", "(128, 501)"),
    ],
)
def test_sharded_head_has_the_losses_of_one_device(options, part):
    lines = run("sharded_head.py", *options.split()).stdout.splitlines()
    assert lines[0].startswith("8 cpu devices") and "same" in lines[-1]
    assert part in lines[1]
    steps = losses_of(lines)
    assert steps.shape == (2, 4)
    np.testing.assert_allclose(steps[:, 2], steps[:, 1], rtol=1e-5)
    assert steps[1, 1] < steps[0, 1]


@pytest.mark.newest
@pytest.mark.slow
def test_linen_loop():
    lines = run("linen_loop.py").stdout.splitlines()
    numbers, losses = np.array([x.split()[1::2] for x in lines], float).T
    np.testing.assert_array_equal(numbers, np.arange(1, 21))
    assert np.isfinite(losses).all() and 0 < losses[-1] < 0.5 * losses[0]


STUDENTS = "NNX", "Linen", "LoRA", "8-bit"


@pytest.mark.slow
def test_any_head():
    lines = run("any_head.py", *"--tokens 512 --steps 3".split()).stdout.splitlines()
    assert max(map(len, lines)) <= 80 and lines[-1] == "The gradients are the same."
    rows = [line for line in lines if line.startswith(STUDENTS)]
    assert len(rows) == len(STUDENTS)
    for row in rows:
        first, last, mine, plain, differ = map(float, row.split()[-5:])
        assert 0 < last < first
        assert mine < plain and differ < 1e-4


@pytest.mark.slow
def test_policy_gradient():
    result = run("policy_gradient.py", *"--steps 20 --vocab 16".split())
    assert max(map(len, result.stdout.splitlines())) <= 80
    # The printed numbers: exact, k1, k3 and the deviations of both.
    rows = {x.split()[0]: x.split()[1:] for x in result.stdout.splitlines() if x}
    before, after = (np.array(rows[x], float) for x in ("before", "after"))
    assert 0 < after[0] < before[0] / 2
    for exact, k1, k3, of_k1, of_k3 in (before, after):
        # Of 16384 places: they are in 256 sequences, and so are nearly independent.
        assert abs(k1 - exact) < 5 * of_k1 / 128
        assert abs(k3 - exact) < 5 * of_k3 / 128


@pytest.mark.parametrize(
    "program, option, value",
    [
        ("any_head.py", "--steps", "0"),
        ("policy_gradient.py", "--vocab", "1"),
        *rarely(("any_head.py", "--vocab", "many")),
        *rarely(("policy_gradient.py", "--learning-rate", "nan")),
    ],
)
def test_bad_options_of_heads_and_policies(program, option, value):
    result = run(program, f"{option}={value}", code=2)
    assert f"argument {option}: expected" in result.stderr
    assert repr(value) in result.stderr and "Traceback" not in result.stderr


LOSS = "import jaxkl; loss = jaxkl.distillation_loss; jaxkl.distillation_loss = "


@pytest.mark.slow
@pytest.mark.parametrize(
    "program, options, patch, says",
    [
        (
            "fused_head.py",
            "--vocab 256 --length 16 --steps 1",
            "import jaxkl; Head = jaxkl.LinearHead; "
            "jaxkl.LinearHead = lambda hidden, kernel: Head(1.001 * hidden, kernel)",
            "NOT the same",
        ),
        (
            "sharded_head.py",
            "--vocab 64 --tokens 16 --steps 1",
            f"{LOSS}lambda *x, **y: (1 + 1e-3 * ('mesh' in y)) * loss(*x, **y)",
            "NOT the same",
        ),
        (
            "any_head.py",
            "--vocab 64 --tokens 16 --steps 1",
            f"{LOSS}lambda *x, **y: 1.001 * loss(*x, **y)",
            "NOT the same",
        ),
        (
            "policy_gradient.py",
            "--steps 5 --vocab 16",
            "import optax; adam = optax.adam; optax.adam = lambda rate: adam(-rate)",
            "did NOT come nearer",
        ),
    ],
)
def test_fail_if_the_numbers_are_wrong(program, options, patch, says):
    result = run(program, *options.split(), patch=patch, code=1)
    assert says in result.stderr
