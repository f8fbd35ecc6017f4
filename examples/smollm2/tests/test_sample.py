"""Tests that a model with a key-value cache writes what it would without one."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import model
import sample


@pytest.fixture(scope="module")
def teacher(teacher_path):
    return model.load(teacher_path)


@pytest.fixture
def even(teacher):
    """A model with all logits 0: each token is as likely."""
    copy = model.student_of(teacher, (0,))
    copy.output_norm.scale[...] = jnp.zeros_like(copy.output_norm.scale)
    return copy


def draw(teacher, shape):
    return jax.random.randint(jax.random.key(1), shape, 0, len(teacher.embedding))


def write(model, *arguments):
    return jax.jit(partial(sample.write, model), static_argnums=2)(*arguments)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 3e-2)])
def test_a_cache_does_not_change_the_logits(teacher_path, dtype, tolerance):
    teacher = model.load(teacher_path, dtype)
    apply = jax.jit(lambda *arguments: teacher.model(*arguments))
    x = teacher.embedding[draw(teacher, (3, 16))]
    parts, cache = [], sample.empty_cache(teacher.model, 3, 20)
    for start, stop in [(0, 7), *((i, i + 1) for i in range(7, 16))]:
        part, cache = apply(x[:, start:stop], cache, start)
        parts.append(part)
    assert cache[0].dtype == dtype
    logits = [
        np.float32(hidden) @ np.float32(teacher.embedding).T
        for hidden in (jnp.concatenate(parts, axis=1), apply(x))
    ]
    np.testing.assert_allclose(*logits, rtol=0, atol=tolerance * abs(logits[1]).max())


def test_greedy_decoding_is_that_without_a_cache(teacher):
    prompts = draw(teacher, (3, 9))
    tokens = jnp.pad(prompts, ((0, 0), (0, 15)))
    apply = jax.jit(lambda x: teacher.model(x) @ teacher.embedding.T)
    for i in range(9, 24):  # what follows has no influence
        logits = apply(teacher.embedding[tokens])[:, i - 1]
        tokens = tokens.at[:, i].set(jnp.argmax(logits, axis=-1))
    found = write(teacher.model, teacher.embedding, prompts, 15)
    np.testing.assert_array_equal(found, tokens[:, 9:])


def test_frequencies_are_the_softmax(teacher):
    draws, small, temperature = 20_000, 0.5 * teacher.embedding, 0.7
    student = model.student_of(teacher, (0,))
    prompts = draw(teacher, (1, 2))
    logits = small @ jax.jit(student)(small[prompts])[0, -1]
    expected = draws * jax.nn.softmax(logits / temperature)
    many = jnp.tile(prompts, (draws, 1))
    own = write(student, small, many, 1, jax.random.key(0), temperature)
    found = jnp.bincount(own[:, 0], length=len(small))
    chi_squared = jnp.sum((found - expected) ** 2 / expected)
    freedom = len(small) - 1
    assert abs(chi_squared - freedom) < 5 * (2 * freedom) ** 0.5


def test_each_place_has_its_own_noise(teacher, even):
    prompts = draw(teacher, (100, 2))
    own = write(even, teacher.embedding, prompts, 20, jax.random.key(0))
    same, places = np.sum(own[:, 1:] == own[:, :-1]), own[:, 1:].size
    assert abs(same - places / 264) < 5 * (places / 264) ** 0.5


def test_own_text(teacher, even):
    length, end, shape = 5, 3, (2, 40, 30)
    labels = np.zeros(shape, int)
    labels[1, -1, 4:] = -100  # the text of this window ends with its prompt
    batches = {"tokens": draw(teacher, shape), "labels": labels}
    own = jax.jit(partial(sample.own_text, even), static_argnums=2)(
        teacher.embedding, batches, length, end, jax.random.key(0)
    )
    own = jax.tree.map(np.asarray, own)
    prompts = own["tokens"][..., :length]
    np.testing.assert_array_equal(prompts, batches["tokens"][..., :length])
    assert np.all(own["labels"][..., : length - 1] == -100)
    assert np.all(own["labels"][1, -1] == -100)
    ended = 0
    for i in range(79):
        tokens, labels = (own[x].reshape(-1, 30)[i] for x in ("tokens", "labels"))
        row = labels[length - 1 :].tolist()
        count = row.index(end) + 1 if end in row else len(row)
        assert min(row[:count]) >= 0 and set(row[count:]) <= {-100}
        np.testing.assert_array_equal(tokens[length:][:count], row[:-1][:count])
        ended += count < len(row)
    assert ended > 3
