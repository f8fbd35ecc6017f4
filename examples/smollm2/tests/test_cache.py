"""Tests what teacher caches contain, resume from and reject."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import cache
import data
import jaxkl
import model
import tiny
import train


SHARDS = 11


@pytest.fixture(scope="module")
def teacher(teacher_path):
    return model.load(teacher_path)


@pytest.fixture
def corpus(teacher, text):
    return data.load(text, teacher.tokenizer, 32, 3)


@pytest.fixture
def hidden(tmp_path, run, common):
    """Writes a complete cache of hidden states."""
    out = tmp_path / "hidden"
    run(cache, *common, "--output", out, "--shard-windows", 8)
    return out


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_hidden_states_come_back_window_by_window(hidden, teacher, corpus):
    opened = cache.Cache.open(hidden, teacher, corpus)
    windows = len(corpus.train.tokens)
    assert len(opened.manifest["shards"]) == -(-windows // 8) == SHARDS
    indices = np.array([windows - 1, 0, 9, 0])
    read = opened.read(indices)["hidden"]
    apply = cache.nnx.split(teacher.model)
    expected = cache.compute(
        *apply, teacher.embedding, corpus.train.tokens[indices], None, None,
        "hidden", None, "float32",
    )["hidden"]  # fmt: skip
    assert read.dtype == np.float16
    np.testing.assert_allclose(read, expected, rtol=1e-3, atol=1e-3)
    assert 2 * tiny.WIDTH < opened.bytes_per_token < 2.2 * tiny.WIDTH


@pytest.mark.parametrize("kind, per_slot", [("top-k", 4), ("sampled", 2)])
def test_lists_of_columns(tmp_path, run, common, teacher, corpus, kind, per_slot):
    run(cache, *common, "--output", tmp_path, "--kind", kind, "--k", 8)
    opened = cache.Cache.open(tmp_path, teacher, corpus)
    batch = opened.read(np.array([3, 1]))
    source = opened.source(None, batch, None)
    assert source.indices.shape == source.log_probs.shape == (2, 32, 8)
    total = np.exp(np.asarray(source.log_probs, np.float64)).sum(-1)
    assert np.all(total < 1.001)
    if kind == "sampled":
        np.testing.assert_allclose(total, 1, rtol=1e-5)
    assert 8 * per_slot <= opened.bytes_per_token < 8 * per_slot * 1.1


def test_written_again_only_what_is_missing_is_made(hidden, run, common):
    before = {path.name: path.read_bytes() for path in hidden.iterdir()}
    times = {path.name: path.stat().st_mtime_ns for path in hidden.iterdir()}
    (hidden / "00001.safetensors").unlink()
    run(cache, *common, "--output", hidden, "--shard-windows", 8)
    assert {path.name: path.read_bytes() for path in hidden.iterdir()} == before
    rewritten = {
        path.name for path in hidden.iterdir()
        if path.stat().st_mtime_ns != times[path.name]
    }  # fmt: skip
    assert rewritten == {"00001.safetensors", "manifest.json"}


def test_killed_at_any_moment_it_goes_on(tmp_path, run, common):
    options = [*common, "--kind", "sampled", "--k", "4", "--shard-windows", "1"]
    whole, out = tmp_path / "whole", tmp_path / "out"
    run(cache, *options, "--output", whole)
    killed = 0
    for goal in (1, 20, 40, 60):
        command = [sys.executable, cache.__file__, *options, "--output", str(out)]
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while child.poll() is None:
            if len(list(out.glob("*.safetensors"))) >= goal:
                child.kill()
                break
            time.sleep(0.001)
        killed += child.wait() == -signal.SIGKILL
    assert killed >= 2
    run(cache, *options, "--output", out)
    assert names(out) == names(whole)
    for path in whole.iterdir():
        assert path.read_bytes() == (out / path.name).read_bytes()


def altered(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def truncated(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    "damage, words",
    [(altered, "was altered"), (truncated, "bytes, not"), (Path.unlink, "is missing")],
)
def test_a_damaged_file_is_refused_by_name(hidden, teacher, corpus, damage, words):
    path = hidden / "00002.safetensors"
    damage(path)
    with pytest.raises(ValueError, match=words) as error:
        cache.Cache.open(hidden, teacher, corpus)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("damage", [altered, truncated])
def test_a_damaged_file_is_not_built_upon(hidden, run, common, capsys, damage):
    damage(hidden / "00002.safetensors")
    with pytest.raises(SystemExit) as exit:
        run(cache, *common, "--output", hidden, "--shard-windows", 8)
    assert exit.value.code == 1
    message = capsys.readouterr().err
    assert str(hidden / "00002.safetensors") in message and "Delete it" in message


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"shards": {}}'])
def test_a_damaged_manifest_is_refused(hidden, teacher, corpus, content):
    (hidden / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match="manifest.json is damaged"):
        cache.Cache.open(hidden, teacher, corpus)


def test_no_cache(tmp_path, teacher, corpus):
    with pytest.raises(ValueError, match="manifest.json does not exist"):
        cache.Cache.open(tmp_path, teacher, corpus)


def test_an_incomplete_cache_is_refused(hidden, teacher, corpus):
    path = hidden / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["shards"]["00003.safetensors"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="lists 10 of 11 files") as error:
        cache.Cache.open(hidden, teacher, corpus)
    assert str(path) in str(error.value)


def test_of_another_teacher(hidden, tmp_path, corpus):
    other = model.load(tiny.write_gguf(tmp_path / "other.gguf", seed=1))
    with pytest.raises(ValueError, match="manifest.json is of another teacher"):
        cache.Cache.open(hidden, other, corpus)


def test_of_another_tokenizer(hidden, teacher, corpus, tmp_path):
    merges = [*tiny.MERGES[:-1], "o n"]
    other = model.load(tiny.write_gguf(tmp_path / "other.gguf", merges=merges))
    other = cache.dataclasses.replace(teacher, tokenizer=other.tokenizer)
    with pytest.raises(ValueError, match="manifest.json is of another tokenizer"):
        cache.Cache.open(hidden, other, corpus)


def test_of_another_text(hidden, teacher, corpus, tmp_path):
    (tmp_path / "text").write_text("Another text. " * 100)
    other = data.load(tmp_path / "text", teacher.tokenizer, 32, 3)
    with pytest.raises(ValueError, match="manifest.json is of another text"):
        cache.Cache.open(hidden, teacher, other)


def test_cut_into_other_windows(hidden, teacher, text):
    other = data.load(text, teacher.tokenizer, 32, 4)
    with pytest.raises(ValueError, match="manifest.json is of another windows"):
        cache.Cache.open(hidden, teacher, other)


@pytest.mark.parametrize("options", [["--kind=top-k"], ["--dtype=float32"]])
def test_another_cache_in_the_same_folder(hidden, run, common, capsys, options):
    with pytest.raises(SystemExit) as exit:
        run(cache, *common, *options, "--output", hidden, "--shard-windows", 8)
    assert exit.value.code == 1
    assert "manifest.json is of another" in capsys.readouterr().err


def test_the_files_are_safetensors(hidden):
    copied = shutil.copy(hidden / "00000.safetensors", hidden / "copy")
    assert load_file(copied)["hidden"].shape == (8, 32, tiny.WIDTH)


def test_a_list_is_at_its_own_temperature(tmp_path, run, common, teacher, corpus):
    options = ["--kind", "top-k", "--k", 4, "--temperature", 2, "--output", tmp_path]
    run(cache, *common, *options)
    opened = cache.Cache.open(tmp_path, teacher, corpus)
    schedule = cache.options.Schedule
    opened.check(jaxkl.ForwardKL(), schedule("constant", 2.0, 2.0))
    for other in (schedule("constant", 1.0, 1.0), schedule("linear", 2.0, 1.0)):
        with pytest.raises(ValueError, match="is at temperature 2"):
            opened.check(jaxkl.ForwardKL(), other)


def test_a_divergence_that_a_list_does_not_serve(run, common, tmp_path, capsys):
    options = ["--kind", "sampled", "--k", 4, "--output", tmp_path / "sampled"]
    run(cache, *common, *options)
    command = [*common, "--layers=0", "--divergence=reverse-kl"]
    command += ["--output", tmp_path / "out"]
    with pytest.raises(SystemExit) as exit:
        run(train, *command, "--cache", tmp_path / "sampled")
    assert exit.value.code == 1
    assert "`divergence` ReverseKL() is not finite" in capsys.readouterr().err
    assert not (tmp_path / "out" / "distilled").exists()
