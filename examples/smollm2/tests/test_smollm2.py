"""Tests that the real teacher is read correctly, and runs each program on it."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest

import cache
import data
import log
import model
import report
import sample
import train


@pytest.fixture(scope="module")
def teacher():
    return model.load(model.teacher_file())


@pytest.mark.parametrize(
    "prompt, continues",
    [
        ("The capital of France is", " Paris."),
        ("def fibonacci(n):", "\n    if n == 0:\n        return 1\n"),
        ("Water boils at", " 100°C"),
    ],
)
def test_greedy_continuations(teacher, prompt, continues):
    text = sample.continuation(teacher, teacher.model, prompt, 12)
    assert text.startswith(continues)


TEXT = """\
The Sun is the star at the center of the Solar System. It is a massive, nearly perfect
sphere of hot plasma, heated to incandescence by nuclear fusion reactions in its core,
radiating the energy from its surface mainly as visible light and infrared radiation.
It is by far the most important source of energy for life on Earth.
"""


def test_perplexity(teacher, tmp_path):
    ids = np.array(teacher.tokenizer.encode(TEXT.replace("\n", " ")).ids)
    structure, state = cache.nnx.split(teacher.model)
    hidden = train.hidden_states(structure, state, teacher.embedding, ids[None, None])
    log_probs = jax.nn.log_softmax(hidden[0, 0] @ teacher.embedding.T)
    nats = -log_probs[np.arange(len(ids) - 1), ids[1:]].mean()
    assert 10 < np.exp(nats) < 16  # 13.3 when this was written


def test_the_tokenizer(teacher):
    text = data.language_reference()[:20000] + " 12345 naïve 漢字 <|im_end|>"
    ids = teacher.tokenizer.encode(text).ids
    assert teacher.tokenizer.decode(ids, skip_special_tokens=False) == text
    hello = teacher.tokenizer.encode("Hello world 42").ids
    assert [teacher.tokenizer.decode([i]) for i in hello] == [
        "Hello", " world", " ", "4", "2",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(data.language_reference()[9000:12000])
    return path


def programs(text):
    """Runs the two programs as a user does, on a short text."""
    shared = ["--text", text, "--length", "64", "--held-out", "2"]

    def program(module, *options):
        command = [sys.executable, module.__file__, *shared, *options]
        command = list(map(str, command))
        # A program of this size takes longer to run than to compile.
        env = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0", "XLA_FLAGS": ""}
        return subprocess.run(command, capture_output=True, encoding="utf-8", env=env)

    return program


@pytest.mark.parametrize(
    "kind", ["on-policy", "top-k", pytest.param("hidden", marks=pytest.mark.slow)]
)
def test_two_steps(tmp_path, text, kind):
    program, options = programs(text), ["--steps=2", "--output", tmp_path / "out"]
    way, split = kind, "own-text"
    if kind == "on-policy":
        options += ["--on-policy=1", "--ways", way]
    else:
        way, split = "distilled", "train"
        written = program(cache, "--kind", kind, "--output", tmp_path / "cache")
        assert written.returncode == 0, written.stderr
        options += ["--cache", tmp_path / "cache", "--ways", way]
    result = program(train, *options)
    assert result.returncode == 0, result.stderr
    rows = report.held_out(tmp_path / "out", way)
    assert [row["step"] for row in rows] == ["0", "2"]
    if way == "distilled":  # two steps on its own text need not help
        assert float(rows[-1]["kl"]) < float(rows[0]["kl"])
    assert f"{float(rows[-1]['kl']):.3f}" in result.stdout
    assert "\x1b" not in result.stdout
    steps, loss = log.curve(tmp_path / "out" / way / "metrics.csv", split, "loss")
    assert steps == [1, 2] and np.all(np.isfinite(loss))


@pytest.mark.slow
def test_two_steps_on_eight_devices(tmp_path, text):
    program = programs(text)
    options = ["--steps=2", "--batch=4", "--ways=distilled"]
    alone = program(train, *options, "--output", tmp_path / "alone")
    options += ["--mesh=data=4,model=2"]
    mesh = program(train, *options, "--output", tmp_path / "mesh")
    assert alone.returncode == mesh.returncode == 0, alone.stderr + mesh.stderr
    found, expected = (
        log.curve(tmp_path / name / "distilled/metrics.csv", "train", "loss")[1]
        for name in ("mesh", "alone")
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4)
