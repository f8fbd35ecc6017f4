"""The examples as a user runs them: exit codes, and that what they say is true."""

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
    # Not as part of the `make` that may run these tests, whose ARGS it would take.
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


def run(*arguments):
    command = [sys.executable, "-W", "error", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=300)


@pytest.fixture(scope="module")
def digits():
    spec = importlib.util.spec_from_file_location("digits", EXAMPLES / "digits.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_digits(result, out):
    """Checks the files against the printed table; returns the numbers."""
    assert result.returncode == 0, result.stderr
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
    assert 0.5 < np.mean(np.all(picture == 1, -1)) < 0.95  # neither blank nor covered
    for half in np.array_split(picture, 2, axis=1):
        for colour in colours:  # every curve is there, in both panels
            near = np.all(np.abs(half - np.array(to_rgb(colour))) < 0.02, -1)
            assert near.sum() > 50, colour


@pytest.mark.newest
@pytest.mark.slow
def test_digits_small(tmp_path, digits):
    out = tmp_path / "deep" / "out"
    options = "--steps 30 --seeds 2 --seed 7 --labels 60".split()
    numbers = check_digits(run(EXAMPLES / "digits.py", *options, "--output", out), out)
    assert numbers["settings"]["labels"] == 60 and numbers["settings"]["seed"] == 7
    assert [row["labels"] for row in numbers["rows"].values()] == [1297, 60, 60, 60]
    assert [row["images"] for row in numbers["rows"].values()] == [1297, 60, 60, 1297]
    assert numbers["rows"]["teacher"]["accuracy"]["mean"] > 95
    check_picture(out / "digits.png", digits.COLOURS.values())


@pytest.mark.slow
@pytest.mark.parametrize("divergence", ["forward-kl", "reverse-kl", "jensen-shannon"])
def test_digits_shows_the_known_effect(tmp_path, divergence):
    options = ("--divergence", divergence, "--output", tmp_path)
    result = run(EXAMPLES / "digits.py", *options)
    numbers = check_digits(result, tmp_path)
    difference = numbers["differences"]["distilled, all images - labels alone"]
    assert difference["accuracy"]["mean"] > 3
    assert difference["kl"]["mean"] < 0
    assert '"distilled, all images" beats "labels alone"' in result.stdout


@pytest.mark.slow
def test_digits_without_weight_for_the_teacher_is_labels_alone(tmp_path):
    options = "--alpha 0 --steps 30 --seeds 2".split()
    result = run(EXAMPLES / "digits.py", *options, "--output", tmp_path)
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


@pytest.mark.parametrize(
    "option, value",
    [
        ("--temperature", "0"),
        ("--temperature", "nan"),
        ("--temperature", "inf"),
        ("--temperature", "warm"),
        ("--alpha", "-0.1"),
        ("--alpha", "1.1"),
        ("--alpha", "nan"),
        ("--labels", "0"),
        ("--labels", "1298"),
        ("--labels", "2.5"),
        ("--steps", "0"),
        ("--seed", "-1"),
        ("--seeds", "1"),
        ("--divergence", "kl"),
    ],
)
def test_digits_bad_option(digits, monkeypatch, capsys, tmp_path, option, value):
    out = tmp_path / "out"
    arguments = ["digits.py", f"{option}={value}", "--output", str(out)]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as exit:
        digits.main()
    assert exit.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert f"argument {option}: " in message and repr(value) in message
    assert not out.exists()


def test_digits_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    result = run(EXAMPLES / "digits.py", "--output", tmp_path / "file" / "out")
    assert result.returncode == 2
    assert "argument --output: cannot write there" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.torch
def test_from_pytorch_agrees():
    result = run(EXAMPLES / "from_pytorch.py")
    assert result.returncode == 0, result.stdout + result.stderr
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
    code = (
        "import jaxkl, runpy;"
        "off = lambda f: lambda *args, **kwargs: 1.0001 * f(*args, **kwargs);"
        "jaxkl.kl_div = off(jaxkl.kl_div);"
        "jaxkl.distillation_loss = off(jaxkl.distillation_loss);"
        f"runpy.run_path({str(EXAMPLES / 'from_pytorch.py')!r}, run_name='__main__')"
    )
    result = run("-c", code)
    assert result.returncode == 1, result.stdout + result.stderr
    message = result.stdout.split("NOT the same:")[1]
    for what in ("kl_div_loss", "distillation_loss"):
        assert f"step 1, {what}: " in message
        assert f"step 5, gradient of {what} to kernel1: " in message
    assert "the mean over N" not in message  # the module was left as it is
    assert "kl_div at target 1: " in message


def test_from_pytorch_without_pytorch():
    code = (
        "import runpy, sys; sys.modules['torch'] = None;"
        f"runpy.run_path({str(EXAMPLES / 'from_pytorch.py')!r}, run_name='__main__')"
    )
    result = run("-c", code)
    assert result.returncode == 2
    assert 'pip install "torch==2.13.0"' in result.stderr
    assert "Traceback" not in result.stderr
