"""The examples in tunix, Keras and Equinox train, with the trainers' own losses."""

import re
import sys

import equinox_loop
import jax
import keras_distiller
import numpy as np
import pytest
import tunix_trainer
from tunix.distillation.distillation_trainer import TrainingInput

import jaxkl


# tunix 0.1.7 and its dependencies use what JAX and Python deprecate.
pytestmark = pytest.mark.filterwarnings("default")
SMALL = "--vocab 8192 --batch 2 --length 128 --steps 2".split()
TINY = "--vocab 64 --batch 2 --length 5 --steps 1".split()


@pytest.fixture
def main(monkeypatch, capsys):
    """Returns a function that runs an example, and returns its printed lines."""

    def run(module, *options):
        monkeypatch.setattr(sys, "argv", [module.__name__, *options])
        module.main()
        return capsys.readouterr().out.splitlines()

    return run


@pytest.fixture
def quickly():
    """Compiles quickly, where neither memory nor time matter."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def numbers_of(lines, name):
    """Returns the numbers of the rows that begin with `name`."""
    rows = [line.split(name)[1] for line in lines if line.strip().startswith(name)]
    return np.array([row.split() for row in rows], float)


@pytest.mark.parametrize("example", [tunix_trainer, keras_distiller])
def test_the_losses_are_those_of_the_trainer(main, example):
    lines = main(example, *SMALL)
    assert max(map(len, lines)) <= 80
    theirs, ours, padded = numbers_of(lines, "loss")
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    assert np.all(np.diff(ours) < 0) and np.all(np.diff(padded) < 0)
    assert ours[-1] > 0.01 and padded[0] != pytest.approx(ours[0], rel=1e-4)
    temp = [float(x) for x in re.findall(r"([\d.]+) MiB", "\n".join(lines))]
    logits = 2 * 127 * 8192 * 4 / 2**20
    assert temp[0] > 3 * logits and temp[1] < temp[0] - 2 * logits
    assert "25% of the tokens are padding" in "\n".join(lines)
    if example is tunix_trainer:  # It logs metrics.
        for kl in numbers_of(lines, "KL to teacher"):
            assert np.all(np.diff(kl) < 0) and kl[-1] > 0.01


@pytest.mark.usefixtures("quickly")
@pytest.mark.parametrize("example", [tunix_trainer, keras_distiller])
def test_other_losses_are_seen(main, monkeypatch, example):
    head = jaxkl.LinearHead
    scaled = lambda hidden, kernel: head(1.01 * hidden, kernel)
    if example is tunix_trainer:
        strategy = tunix_trainer.HeadStrategy
        loss = strategy.compute_loss

        def changed(self, student_output, teacher_output, labels):
            student = scaled(student_output.hidden, student_output.kernel)
            return loss(self, student, teacher_output, labels)

        monkeypatch.setattr(strategy, "compute_loss", changed)
    else:
        monkeypatch.setattr(jaxkl, "LinearHead", scaled)
    with pytest.raises(SystemExit, match="NOT the same"):
        main(example, *TINY)


@pytest.mark.usefixtures("quickly")
@pytest.mark.parametrize("name", ["HeadStrategy", "LogitStrategy"])
def test_padding_does_not_count_in_tunix(name):
    tokens = np.random.default_rng(0).integers(0, 64, (2, 2, 9), np.int32)
    mask = np.arange(9) < np.array([[9], [4]])
    losses = []
    for padding in tokens:
        padded = np.where(mask, tokens[0], padding)
        trainer = tunix_trainer.make_trainer(name, 64)
        batch = TrainingInput(input_tokens=padded, input_mask=mask)
        trainer.train([batch] * 2)
        losses.append(tunix_trainer.history(trainer, "loss"))
    counts = np.max(np.abs(losses[0] - losses[1])) > 1e-3
    assert counts == (name == "LogitStrategy")
    if not counts:
        np.testing.assert_allclose(losses[0], losses[1], rtol=1e-6)


@pytest.mark.usefixtures("quickly")
def test_tunix_evaluates():
    tokens = np.random.default_rng(0).integers(0, 64, (2, 9), np.int32)
    mask = np.arange(9) < np.array([[9], [4]])
    batch = TrainingInput(input_tokens=tokens, input_mask=mask)
    trainer = tunix_trainer.make_trainer("HeadStrategy", 64)
    head = trainer.model(tokens)
    logits = np.asarray(head.hidden @ head.kernel, np.float64)
    log_q = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    ce = -np.take_along_axis(log_q, tokens[:, 1:, None], -1)[..., 0]
    trainer.train([batch], [batch])
    first = trainer.metrics_logger.get_metric_history("", "loss", "eval")[0]
    np.testing.assert_allclose(first, ce[mask[:, 1:]].mean(), rtol=1e-5)


@pytest.mark.usefixtures("quickly")
@pytest.mark.parametrize("name", ["HeadDistillation", "LogitsDistillation"])
def test_padding_does_not_count_in_keras(name):
    """The padding of one sequence: the loss of the others, and none of its own."""
    tokens = np.random.default_rng(0).integers(1, 64, (3, 8), np.int32)
    tokens[2] = 0
    losses = []
    for batch in tokens, tokens[:2]:
        distiller = keras_distiller.make_distiller(name, 64, 8)
        losses.append(keras_distiller.train(distiller, batch, 2))
    counts = np.max(np.abs(losses[0] - losses[1])) > 1e-3
    assert counts == (name == "LogitsDistillation")


@pytest.mark.usefixtures("quickly")
def test_equinox_loop(main):
    lines = main(equinox_loop)
    steps, losses = np.array([line.split()[1::2] for line in lines], float).T
    np.testing.assert_array_equal(steps, np.arange(1, equinox_loop.STEPS + 1))
    assert np.isfinite(losses).all() and 0 < losses[-1] < 0.5 * losses[0]
