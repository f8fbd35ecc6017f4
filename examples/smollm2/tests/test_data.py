import numpy as np
import pytest

import data
import model
import options


@pytest.fixture(scope="module")
def tokenizer(teacher_path):
    return model.load(teacher_path).tokenizer


def test_windows_cover_the_text(tmp_path, tokenizer):
    path = tmp_path / "text"
    path.write_text("the ü in\n" * 30)
    corpus = data.load(path, tokenizer, 16, 2)
    tokens = np.concatenate([x.tokens.ravel() for x in corpus[:2]])
    labels = np.concatenate([x.labels.ravel() for x in corpus[:2]])
    counted = labels >= 0
    assert 0 < np.sum(~counted) < 16 and counted[: counted.sum()].all()
    whole = [*tokens[counted], labels[counted][-1]]
    assert tokenizer.decode(whole) == path.read_text()
    np.testing.assert_array_equal(tokens[counted][1:], labels[counted][:-1])


def test_a_text_that_is_not_utf8(tmp_path, tokenizer):
    path = tmp_path / "text"
    path.write_bytes(b"\xff" * 1000)
    with pytest.raises(ValueError, match=f"{path} is not UTF-8"):
        data.load(path, tokenizer, 16, 2)


def test_no_paragraph_of_the_reference_is_there_twice():
    paragraphs = data.language_reference().split("\n\n")
    assert len(paragraphs) > 1000 and len(set(paragraphs)) == len(paragraphs)


def test_each_epoch_takes_each_window_once():
    batches = [data.batch_indices(3, step, 4, 10) for step in range(5)]
    epochs = np.concatenate(batches).reshape(2, 10)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), [range(10)] * 2)
    assert np.any(epochs[0] != epochs[1])
    np.testing.assert_array_equal(data.batch_indices(3, 2, 4, 10), batches[2])
    assert np.any(data.batch_indices(4, 0, 10, 10) != epochs[0])


@pytest.mark.parametrize("shape, middle", [("linear", 2.5), ("cosine", 2.5)])
def test_schedules_run_over_all_steps(shape, middle):
    schedule = options.schedule(options.positive)(f"{shape}:4:1").over(10)
    values = [float(schedule(step)) for step in (0, 5, 10)]
    np.testing.assert_allclose(values, [4, middle, 1], rtol=1e-6)
