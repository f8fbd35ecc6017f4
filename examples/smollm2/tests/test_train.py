"""Tests training in every mode on a tiny teacher, and recovery from a SIGKILL."""

import functools
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from matplotlib.image import imread

import cache
import data
import log
import train


slow = functools.partial(pytest.param, marks=pytest.mark.slow)
SHORT = ["--steps=2", "--evaluate-every=1", "--layers=0,3", "--batch=4"]


def losses(out, way="distilled", split="train", name="loss"):
    steps, values = log.curve(out / way / "metrics.csv", split, name)
    return np.array(values)


@pytest.fixture(scope="module")
def online(run, common, tmp_path_factory):
    """Trains with the defaults, for other runs to compare with."""
    out = tmp_path_factory.mktemp("online")
    run(train, *common, *SHORT, "--output", out)
    return out


@pytest.fixture
def distil(run, common, tmp_path):
    """Returns a function that trains with options and returns the folder."""

    def distil(*options, ways="distilled"):
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        run(train, *common, *SHORT, "--output", out, *options, "--ways", *ways.split())
        return out

    return distil


@pytest.fixture
def cached(run, common, tmp_path):
    def cached(*options):
        out = tmp_path / f"cache{len(list(tmp_path.iterdir()))}"
        run(cache, *common, "--output", out, *options)
        return out

    return cached


def test_all_ways_online(distil, capsys):
    """With seed 1, the second of two steps is on the student's own text."""
    assert [data.is_own_text(1, i, 0.5) for i in range(2)] == [False, True]
    ways = ("distilled", "on-policy", "labels")
    options = ["--on-policy=0.5", "--seed=1", "--prompt-length=8", "--alpha=0.5"]
    out = distil(*options, ways=" ".join(ways))
    printed = capsys.readouterr().out
    for way in ways:
        assert losses(out, way).size + losses(out, way, "own-text").size == 2
        for name in ("kl", "cross_entropy", "top1_agreement", "own_kl"):
            values = losses(out, way, "held-out", name)
            assert values.shape == (3,) and np.all(np.isfinite(values))
            assert values[0] == losses(out, "distilled", "held-out", name)[0]
            shown = f"{values[-1]:.3f}" if name != "top1_agreement" else ""
            assert shown in printed
        assert list((out / way).glob("events.out.tfevents.*"))
    assert losses(out, "labels", "train", "kl").size == 0  # there is no teacher
    for name in ("teacher", "untrained", "distilled", "on-policy", "labels alone"):
        assert f"\n  {name} " in printed
    assert 0.5 < np.mean(imread(out / "curves.png")[..., :3] == 1) < 0.99
    np.testing.assert_allclose(
        losses(out, "labels"), losses(out, "labels", name="cross_entropy"), rtol=1e-5
    )
    own = lambda name: losses(out, "on-policy", "own-text", name)
    assert losses(out, "on-policy") == losses(out, "distilled")[0]
    assert losses(out, "on-policy", name="tokens") == 4 * 32
    assert 0 < own("tokens") <= 4 * 25
    # Own text has no labels, so that all of its loss is the divergence.
    assert own("cross_entropy").size == 0
    np.testing.assert_allclose(own("loss"), own("divergence"), rtol=1e-5)


@pytest.mark.parametrize("share, expected", [(0, 0), (0.5, 500), (1, 1000)])
def test_the_share_of_own_text(share, expected):
    found = sum(data.is_own_text(0, step, share) for step in range(1000))
    assert abs(found - expected) < 5 * (share * (1 - share) * 1000) ** 0.5 + 1


def test_without_on_policy_no_text_is_written(online):
    assert losses(online, "distilled", "held-out", "kl").size == 3
    for split, name in ("held-out", "own_kl"), ("own-text", "loss"):
        assert losses(online, "distilled", split, name).size == 0


def test_each_step_has_its_own_samples(distil):
    # It is always the same window, and the student stays as it is.
    options = ["--on-policy=1", "--learning-rate=1e-30", "--windows=1", "--batch=1"]
    out = distil(*options, "--policy-gradient", ways="on-policy")
    first, second = losses(out, "on-policy", "own-text")
    assert np.isfinite([first, second]).all() and first != second


def test_a_cache_of_hidden_states_is_as_good_as_the_teacher(online, distil, cached):
    exact = cached("--dtype=float32", "--shard-windows=16")
    expected = losses(online)
    np.testing.assert_allclose(losses(distil("--cache", exact)), expected, rtol=1e-5)
    rounded = distil("--cache", cached())
    np.testing.assert_allclose(losses(rounded), expected, rtol=1e-3)


@pytest.mark.parametrize(
    "tail", ["bucket", slow("renormalize"), slow("uniform"), slow("drop")]
)
def test_a_cache_of_top_k(distil, cached, tail):
    few = cached("--kind=top-k", "--k=8")
    assert np.all(np.isfinite(losses(distil("--cache", few, "--tail", tail))))


def test_a_cache_of_all_columns_is_as_good_as_the_teacher(online, distil, cached):
    every = cached("--kind=top-k", "--k=264", "--dtype=float32")
    found = losses(distil("--cache", every, "--tail=uniform"))
    np.testing.assert_allclose(found, losses(online), rtol=1e-4)


def test_a_cache_of_samples(distil, cached):
    found = distil("--cache", cached("--kind=sampled", "--k=8"))
    assert np.all(np.isfinite(losses(found)))


def test_a_mesh_has_the_losses_of_one_device(distil, capsys):
    ways = "on-policy labels"
    options = ["--accumulate=2", "--on-policy=0.5", "--seed=1", "--prompt-length=28"]
    alone = distil(*options, ways=ways)
    mesh = distil(*options, "--mesh=data=4,model=2", "--real", ways=ways)
    np.testing.assert_allclose(
        losses(mesh, "on-policy", "own-text"),
        losses(alone, "on-policy", "own-text"),
        rtol=1e-4,
    )
    for way in ways.split():
        expected = losses(alone, way)
        np.testing.assert_allclose(losses(mesh, way), expected, rtol=1e-4)
        expected = losses(alone, way, "held-out", "kl")
        np.testing.assert_allclose(losses(mesh, way, "held-out", "kl"), expected, 1e-4)


def test_a_mesh_streams_a_cache(distil, cached):
    folder = cached("--kind=top-k", "--k=8")
    alone = losses(distil("--cache", folder))
    mesh = losses(distil("--cache", folder, "--mesh=data=2,model=4", "--real"))
    np.testing.assert_allclose(mesh, alone, rtol=1e-4)


def test_accumulated_batches_are_one_large_batch(distil):
    # There are 84 windows. The last is short, and 21 steps see it in one of the parts.
    whole = losses(distil("--steps=21", "--evaluate-every=21"))
    parts = ["--steps=21", "--evaluate-every=21", "--batch=1", "--accumulate=4"]
    np.testing.assert_allclose(losses(distil(*parts)), whole, rtol=1e-4)


def test_bfloat16_is_close(online, distil):
    rounded = distil("--dtype=bfloat16")
    np.testing.assert_allclose(losses(rounded), losses(online), rtol=0.05)
    assert np.any(losses(rounded) != losses(online))


@pytest.mark.parametrize(
    "options",
    [
        ["--divergence=jensen-shannon:beta=0.3", "--temperature=linear:4:1"],
        slow(["--divergence=reverse-kl", "--alpha=cosine:1:0.5", "--temperature=2"]),
    ],
)
def test_other_divergences_and_schedules(online, distil, options):
    expected, found = losses(online), losses(distil(*options))
    assert np.all(np.isfinite(found)) and np.all(found != expected)


def test_alpha_0_is_the_cross_entropy(online, distil):
    found, expected = losses(distil("--alpha=0")), losses(online, "labels")
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_finished_run_has_nothing_to_do(run, common, tmp_path, capsys):
    command = [*common, *SHORT, "--output", tmp_path, "--ways", "labels"]
    run(train, *command)
    first = capsys.readouterr().out.split("held-out tokens")[1]
    content = (tmp_path / "labels" / "metrics.csv").read_bytes()
    run(train, *command)
    assert capsys.readouterr().out.split("held-out tokens")[1] == first
    assert (tmp_path / "labels" / "metrics.csv").read_bytes() == content


@pytest.mark.parametrize(
    "saving, way",
    [
        pytest.param(True, "distilled", id="a save"),
        slow(False, "on-policy", id="anything"),
    ],
)
def test_killed_during(saving, way, common, tmp_path):
    def command(out):
        options = [*common, "--output", out, "--ways", way, "--layers", "0,3"]
        options += ["--on-policy=0.5"] if way == "on-policy" else []
        steps = 6 if saving else 4
        options += [f"--steps={steps}", f"--evaluate-every={steps - 1}"]
        options += ["--save-every=1"]
        return [sys.executable, train.__file__, *map(str, options)]

    whole, out = tmp_path / "whole", tmp_path / "out"
    quiet = dict(stdout=subprocess.DEVNULL)
    subprocess.run(command(whole), check=True, timeout=300, **quiet)
    expected = (whole / way / "metrics.csv").read_bytes()
    assert (b"own-text" in expected) == (way == "on-policy")

    rng, killed, unfinished = random.Random(0), 0, 0
    checkpoints = out / way / "checkpoints"

    def state():
        names = [path.name for path in checkpoints.glob("*")]
        steps = {int(name) for name in names if name.isdecimal()}
        return max(steps, default=0), any("tmp" in name for name in names)

    for attempt in range(20):
        child = subprocess.Popen(command(out), **quiet)
        # The first run never saves. Each later run gets one step further.
        goal = state()[0] + (attempt > 0)
        while child.poll() is None:
            step, in_save = state()
            if step >= goal and (in_save or not saving and step > goal):
                time.sleep(0 if saving else rng.uniform(0, 0.3))
                break
            time.sleep(0.0005)
        child.kill()
        if child.wait() == 0:
            break
        assert child.returncode == -signal.SIGKILL
        killed += 1
        unfinished += state()[1]
    assert child.returncode == 0 and killed >= 2
    assert unfinished >= 2 or not saving
    assert (out / way / "metrics.csv").read_bytes() == expected


def test_a_row_that_was_cut_off_is_written_again(tmp_path):
    with log.Log(tmp_path, 0) as first:
        for step in (1, 2, 3):
            first.write(step, "train", {"loss": step / 3})
    path = tmp_path / "metrics.csv"
    whole = path.read_text()
    path.write_text(whole[:-9])
    with log.Log(tmp_path, 2):
        pass
    assert path.read_text() == "".join(whole.splitlines(keepends=True)[:3])


@pytest.mark.parametrize("option", ["--seed=1", "--learning-rate=0.1", "--length=16"])
def test_another_run_in_the_same_folder(run, common, tmp_path, capsys, option):
    command = [*common, *SHORT, "--output", tmp_path, "--ways", "labels"]
    run(train, *command)
    with pytest.raises(SystemExit) as exit:
        run(train, *command, option)
    assert exit.value.code == 1
    message = capsys.readouterr().err
    name = option[2:].split("=")[0].replace("-", "_")
    assert f"settings.json is of another {name}" in message


@pytest.mark.parametrize(
    "option, words",
    [
        ("--divergence=kl", "expected one of forward-kl, reverse-kl"),
        ("--divergence=jensen-shannon:alpha=1", "jensen-shannon has beta"),
        ("--divergence=jensen-shannon:beta=2", "`beta` must be in"),
        ("--divergence=jensen-shannon:beta=x", "expected a number for beta"),
        ("--divergence=alpha", "expected alpha:alpha=NUMBER"),
        ("--prompt=", "expected some text"),
        ("--temperature=0", "expected a number above 0"),
        ("--temperature=linear:4:0", "expected a number above 0"),
        ("--temperature=step:4:1", "linear:FROM:TO or cosine:FROM:TO"),
        ("--alpha=1.1", "expected a number from 0 to 1"),
        ("--mesh=data=3", "data=3 does not divide --batch 4"),
        ("--mesh=model=x", "expected data=N,model=M"),
        ("--mesh=model=5 --real", "model=5 does not divide the vocabulary, 264"),
        ("--layers=1,b", "expected layers as 0,1,8"),
        ("--layers=0,4", "the teacher has 4 layers"),
        ("--steps=0", "expected an integer from 1"),
        ("--dtype=float16", "invalid choice"),
        ("--tail=none", "invalid choice"),
        ("--on-policy=2", "--on-policy: expected a number from 0 to 1"),
        (
            "--on-policy=1 --cache=x",
            "argument --on-policy: cannot be used with --cache",
        ),
        ("--ways on-policy", "argument --ways: on-policy needs --on-policy above 0"),
        ("--policy-gradient", "argument --policy-gradient: needs --on-policy above 0"),
        (
            "--on-policy=1 --policy-gradient --sample-temperature=2",
            "argument --policy-gradient: needs --sample-temperature 1",
        ),
        ("--prompt-length=9", "argument --prompt-length: needs --on-policy above 0"),
        (
            "--on-policy=1 --prompt-length=33",
            "argument --prompt-length: is above --length 32",
        ),
        ("--text=nowhere", "expected a file"),
        ("--teacher=nowhere", "expected a file"),
        ("--held-out=1000", "too few for 1000 held-out windows"),
    ],
)
def test_bad_option(run, common, tmp_path, capsys, option, words):
    with pytest.raises(SystemExit) as exit:
        run(train, *common, *SHORT, "--output", tmp_path, *option.split())
    assert exit.value.code in (1, 2)
    message = capsys.readouterr().err
    assert words in message and "Traceback" not in message


def test_a_teacher_that_is_no_gguf_file(run, common, text, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(train, *common, "--output", tmp_path, f"--teacher={text}")
    assert f"{text} is not a GGUF file" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_the_run(distil):
    with pytest.raises(SystemExit, match="the loss of step . is not finite"):
        distil("--learning-rate=1e30")
