"""Lists and samples of logits, of heads, in tiles and on meshes."""

import operator as op
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import jaxkl
from jaxkl import distillation_loss, sampled_teacher, top_k_teacher
from jaxkl._engine import row_lists

from . import oracle
from .cases import rarely
from .helpers import assert_close
from .sources import exact_logits, make_function, make_head, rounded
from .test_meshes import SPECS


KEY = jax.random.key(3)
SHAPE, V, K = (13,), 37, 5


def make(rng, kind, shape=SHAPE, vocab=V, dtype="float32"):
    if kind == "logits":
        return rounded(rng, (*shape, vocab), dtype)
    if kind == "function":
        return make_function(rng, shape, 6, vocab, dtype)
    return make_head(rng, shape, 6, vocab, dtype, bias=True, softcap=3.0, scale=1.3)


def exact(logits, k, T=1.0):
    """Columns, log-probabilities and the log of the rest, in float64."""
    z = np.asarray(logits, np.float64) / np.asarray(T, np.float64)
    order = np.argsort(-z, axis=-1, kind="stable")
    z = np.take_along_axis(z, order, -1)
    z -= z[..., :1]
    with np.errstate(divide="ignore"):
        lse = np.log1p(np.exp(z[..., 1:]).sum(-1))
        rest = np.logaddexp.reduce(z[..., k:], axis=-1, initial=-np.inf) - lse
    return order[..., :k], z[..., :k] - lse[..., None], rest


def both(source, key=KEY, **options):
    """A list and samples, in one program."""
    listed = top_k_teacher(source, K, **options)
    return listed, sampled_teacher(key, source, 40, **options)


def assert_same(actual, expected, tol=1e-6):
    (listed, drawn), (whole, all_drawn) = actual, expected
    np.testing.assert_array_equal(listed.indices, whole.indices)
    np.testing.assert_array_equal(drawn.indices, all_drawn.indices)
    assert_close(listed.log_probs, whole.log_probs, tol)
    assert_close(listed.log_rest, whole.log_rest, tol)


def mesh_of(data, model, kind=AxisType.Auto):
    return jax.make_mesh((data, model), ("data", "model"), axis_types=(kind,) * 2)


LAYOUTS = {
    "tokens": (mesh_of(8, 1), dict(token_axes="data")),
    "vocabulary": (mesh_of(1, 8), dict(vocab_axis="model")),
    "both": (mesh_of(2, 4), dict(token_axes="data", vocab_axis="model")),
}


@pytest.fixture
def small_tiles(monkeypatch):
    """Of three tokens."""
    monkeypatch.setattr(row_lists, "_MAX_TILE", 3)


@pytest.mark.parametrize(
    "kind, dtype",
    [
        ("linear", "bfloat16"),
        ("function", "float64"),
        ("logits", "float32"),
        *rarely(("logits", "float64")),
        *rarely(("linear", "float32"), ("linear", "float64")),
        *rarely(("logits", "bfloat16"), ("function", "bfloat16")),
    ],
)
def test_top_k_matches_numpy(rng, kind, dtype):
    with jax.enable_x64(dtype == "float64"):
        source = make(rng, kind, (3, 4), dtype=dtype)
        T = jnp.asarray(rng.uniform(0.5, 3, (3, 4)), jnp.float32)
        listed = jax.jit(lambda x, T: top_k_teacher(x, K, temperature=T))(source, T)
    logits, _ = exact_logits(source)
    columns, log_probs, rest = exact(logits, K, np.asarray(T)[..., None])
    wide = "float64" if dtype == "float64" else "float32"
    assert listed.log_probs.dtype == listed.log_rest.dtype == wide
    assert listed.indices.dtype == jnp.int32 and listed.tail == "bucket"
    np.testing.assert_array_equal(listed.temperature, T)
    tol = {"float32": 2e-6, "float64": 1e-14, "bfloat16": 2e-6}[dtype]
    if kind == "function" and dtype == "bfloat16":
        tol = 2e-2  # its logits are rounded to bfloat16
    else:
        np.testing.assert_array_equal(listed.indices, columns)
    assert_close(listed.log_probs, log_probs, tol)
    assert_close(listed.log_rest, rest, tol)


def test_top_k_of_ties_and_of_all(rng):
    teacher = top_k_teacher(jnp.zeros((2, 7)), 3, tail="drop")
    assert teacher.tail == "drop"
    assert all(len(set(row)) == 3 for row in teacher.indices.tolist())
    assert_close(teacher.log_probs, np.full((2, 3), -np.log(7)), 1e-6)
    everything = top_k_teacher(rounded(rng, (2, 7), "bfloat16"), 7)
    assert everything.log_probs.dtype == jnp.float32
    assert_close(jnp.exp(everything.log_probs).sum(-1), np.ones(2), 1e-6)


@pytest.mark.parametrize("vocab_axis", ["model", *rarely(None)])
def test_a_small_rest_keeps_its_digits(rng, vocab_axis):
    t = np.full((6, V + 4), -np.inf, np.float32)
    t[:4, :V] = rng.normal(size=(4, V))
    t[1, [3, 30]] += 75  # the rest is some 1e-30
    t[2, [3, 30]] += 300  # and less than the lowest float
    t[3, 7] += 25
    t[4, 36] = 3  # one column has all
    t[5, :V] = t[0, :V] - 3e4
    t[:, V:] = np.nan  # padding
    mesh = {} if vocab_axis is None else dict(mesh=mesh_of(1, 8), vocab_axis="model")
    for k in (2, V):
        f = jax.jit(partial(top_k_teacher, k=k, vocab_size=V, **mesh))
        listed = f(t)
        columns, log_probs, rest = exact(t[:, :V], k)
        assert (listed.log_rest[4] == -np.inf) and (listed.indices < V).all()
        np.testing.assert_array_equal(listed.indices, columns)
        np.testing.assert_allclose(listed.log_probs, log_probs, rtol=2e-6)
        np.testing.assert_allclose(listed.log_rest, rest, rtol=2e-6)
    drawn = sampled_teacher(KEY, t, 50, vocab_size=V, **mesh).indices
    assert (drawn < V).all() and np.isin(drawn[1:3], [3, 30]).all()
    assert (drawn[4] == 36).all()


# Tiles, meshes and transformations.


@pytest.mark.parametrize(
    "kind, layout, dtype",
    [
        ("linear", "both", "float32"),
        *rarely(("logits", None, "float32"), ("linear", "both", "float64")),
        *rarely(("linear", "tokens", "float64")),
        *rarely(("logits", "both", "bfloat16"), ("logits", "vocabulary", "float32")),
        *rarely(("function", None, "float32"), ("function", "both", "float32")),
    ],
)
@pytest.mark.usefixtures("small_tiles")
def test_tiles_and_meshes_change_nothing(rng, monkeypatch, kind, layout, dtype):
    # Neither 13 tokens nor 37 columns are a multiple of anything, and groups of four
    # columns lie on two devices.
    mesh, axes = LAYOUTS.get(layout, (None, {}))
    with jax.enable_x64(dtype == "float64"):
        source = make(rng, kind, dtype=dtype)
        result = jax.jit(partial(both, temperature=1.5, mesh=mesh, **axes))(source)
        assert result[0].temperature == 1.5  # and no array
        monkeypatch.setattr(row_lists, "_MAX_TILE", 1000)
        assert_same(result, jax.jit(partial(both, temperature=1.5))(source))
    assert all(x.indices.dtype == jnp.int32 for x in result)
    columns, log_probs, _ = exact(exact_logits(source)[0], K, 1.5)
    np.testing.assert_array_equal(result[0].indices, columns)
    assert_close(result[0].log_probs, log_probs, 2e-6)


@pytest.mark.parametrize("kind", ["linear", *rarely("function")])
@pytest.mark.usefixtures("small_tiles")
def test_inside_shard_map(rng, kind):
    # The devices of "data" have tokens each, whose samples must differ.
    source = make(rng, kind, (8, 2), 36)
    specs = replace(source, hidden=P("data", None, None))
    if kind == "linear":
        specs = replace(specs, kernel=P(None, "model"), bias=P("model"))
    else:
        specs = replace(specs, params=SPECS)
    local = partial(both, axis_name="model", vocab_size=34)
    mesh = mesh_of(2, 4)
    f = jax.shard_map(local, mesh=mesh, in_specs=(specs,), out_specs=P("data"))
    f, whole = jax.jit(f), jax.jit(partial(both, vocab_size=34))
    assert_same(f(source), whole(source))
    alike = replace(source, hidden=jnp.broadcast_to(source.hidden[:1, :1], (8, 2, 6)))
    rows = f(alike)[1].indices.reshape(16, -1).tolist()
    assert len(set(map(tuple, rows))) == 16


@pytest.mark.slow
def test_a_function_whose_columns_are_split(rng):
    source = make(rng, "function", vocab=40)
    mesh, axes = LAYOUTS["both"]
    spread = jax.jit(partial(both, mesh=mesh, **axes))
    assert_same(spread(replace(source, param_specs=SPECS)), jax.jit(both)(source))


@pytest.mark.slow
def test_explicit_axes(rng):
    t, mesh = make(rng, "logits", (8,), 40), mesh_of(2, 4, AxisType.Explicit)
    spread = jax.device_put(t, NamedSharding(mesh, P("data", "model")))
    _, axes = LAYOUTS["both"]
    with jax.set_mesh(mesh):
        result = jax.jit(partial(both, mesh=mesh, **axes))(spread)
        with pytest.raises(ValueError, match="`mesh` must be given"):
            top_k_teacher(spread, 2)
    assert_same(result, jax.jit(both)(t))


def test_no_array_of_all_logits():
    tokens, vocab = 65536, 16000
    shape = lambda *x: jax.ShapeDtypeStruct(x, jnp.float32)
    head = jaxkl.LinearHead(shape(tokens, 8), shape(8, vocab))
    f = lambda head: (top_k_teacher(head, 8), sampled_teacher(KEY, head, 8))
    stats = jax.jit(f).lower(head).compile().memory_analysis()
    assert 0 < stats.temp_size_in_bytes < 0.1 * tokens * vocab * 4


@pytest.mark.slow
@pytest.mark.usefixtures("small_tiles")
def test_transforms(rng):
    source, T = make(rng, "linear", (2, 3, 4)), jnp.array([0.5, 2.0])
    keys = jax.random.split(KEY)

    def one(hidden, T, key):
        return both(replace(source, hidden=hidden), key, temperature=T)

    @jax.jit
    def all_ways(*batch):
        scanned = jax.lax.scan(lambda _, x: (None, one(*x)), None, batch)[1]
        loss = lambda *x: sum(map(jnp.sum, jax.tree.leaves(one(*x)[0].log_probs)))
        slopes = jax.grad(loss, (0, 1))(*(x[0] for x in batch))
        return jax.vmap(one)(*batch), scanned, slopes

    mapped, scanned, slopes = all_ways(source.hidden, T, keys)
    assert not any(np.any(x) for x in slopes)
    for i in range(2):
        alone = one(source.hidden[i], T[i], keys[i])
        for result in (mapped, scanned):
            assert_same(jax.tree.map(op.itemgetter(i), result), alone)
        assert mapped[0].temperature[i] == T[i]


@pytest.mark.slow
def test_a_key_of_another_kind(rng, monkeypatch):
    # Of rbg keys, `vmap` draws other numbers than for each alone.
    t, key = make(rng, "logits"), jax.random.key(0, impl="rbg")
    whole = sampled_teacher(key, t, 9).indices
    old = sampled_teacher(jax.random.PRNGKey(0), t, 9).indices
    np.testing.assert_array_equal(old, sampled_teacher(jax.random.key(0), t, 9).indices)
    monkeypatch.setattr(row_lists, "_MAX_TILE", 2)
    np.testing.assert_array_equal(sampled_teacher(key, t, 9).indices, whole)


@pytest.mark.slow
def test_no_token():
    mesh, axes = LAYOUTS["both"]
    for options in ({}, dict(mesh=mesh, **axes)):
        listed, drawn = both(np.zeros((0, V), np.float32), **options)
        assert listed.indices.shape == (0, K) and drawn.indices.shape == (0, 40)
        assert listed.temperature == drawn.temperature == 1


# What samples are drawn from.


def deviation(drawn, p):
    """How many standard deviations χ² is above its mean; of p = 0 none is drawn."""
    counts = np.bincount(np.ravel(drawn), minlength=len(p))
    assert len(counts) == len(p) and not counts[p == 0].any()
    counts, p = counts[p > 0], p[p > 0]
    expected, freedom = counts.sum() * p, len(p) - 1
    statistic = np.sum((counts - expected) ** 2 / expected)
    return (statistic - freedom) / np.sqrt(2 * freedom)


def softmax(logits):
    return np.exp(oracle.log_softmax(np.asarray(logits, np.float64))).astype(float)


@pytest.mark.parametrize("vocab", [1000, *rarely(1, 2, 7)])
def test_samples_follow_the_softmax(rng, vocab):
    t, n = rounded(rng, (vocab,), scale=1.5), 400_000
    teacher = sampled_teacher(jax.random.key(1), t, n, temperature=2.0)
    assert teacher.indices.shape == (n,) and teacher.indices.dtype == jnp.int32
    assert teacher.tail == "renormalize"
    assert_close(jnp.exp(teacher.log_probs) * n, np.ones(n), 1e-5)
    p = softmax(np.asarray(t) / 2)
    if vocab == 1:
        assert not teacher.indices.any()
        return
    assert deviation(teacher.indices, p) < 4
    assert deviation(teacher.indices, np.roll(p, 1)) > 40


def test_samples_of_slices_follow_the_softmax(rng):
    # Columns of 0.4 to 2e-4, on eight devices, whose groups do not end where theirs do.
    p = np.exp(rng.normal(size=V) * 2)
    p[8] = 0
    p /= p.sum()
    rows = np.tile(np.log(p, out=np.full(V, -np.inf), where=p > 0), (30, 1))
    mesh, axes = LAYOUTS["vocabulary"]
    draw = partial(sampled_teacher, KEY, num_samples=1000, mesh=mesh, **axes)
    drawn = np.asarray(jax.jit(draw)(rows.astype(np.float32)).indices)
    assert abs(deviation(drawn, p)) < 4
    # Tokens are independent: the variance over tokens is that of their draws.
    of_token = (drawn == p.argmax()).mean(-1)
    ratio = of_token.var() / (p.max() * (1 - p.max()) / 1000)
    assert 0.4 < ratio < 2


def test_rows_are_independent_and_have_their_own_temperature(rng):
    t, n = jnp.tile(rounded(rng, (5,)), (2, 2, 1)), 50_000
    T = jnp.array([[0.5, 1.0], [1.0, 4.0]])
    draw = jax.jit(partial(sampled_teacher, num_samples=n))
    indices = np.asarray(draw(jax.random.key(2), t, temperature=T).indices)
    assert indices.shape == (2, 2, n)
    for at in np.ndindex(2, 2):
        assert deviation(indices[at], softmax(np.asarray(t[at]) / T[at])) < 4
    # Two rows of one distribution agree as often as by chance.
    p = softmax(t[0, 0])
    agree, chance = (indices[0, 1] == indices[1, 0]).mean(), np.sum(p * p)
    assert abs(agree - chance) < 5 * np.sqrt(chance * (1 - chance) / n)
    # So do neighbours in a row, and other keys draw other columns.
    assert abs((indices[0, 1, 1:] == indices[0, 1, :-1]).mean() - chance) < 0.02
    other = draw(jax.random.key(3), t, temperature=T).indices
    assert abs((indices[0, 1] == np.asarray(other[0, 1])).mean() - chance) < 0.02


@pytest.mark.slow
def test_expected_gradient_is_the_dense_one(rng):
    # The rare column matters, as a top-k list never has it.
    rows, s = 40_000, rounded(rng, (6,))
    t = jnp.log(jnp.array([0.6, 0.2, 0.1, 0.08, 0.019, 0.001]))
    many, of_many = jnp.tile(s, (rows, 1)), jnp.tile(t, (rows, 1))
    teacher = sampled_teacher(jax.random.key(4), of_many, 3)
    f = lambda s, t: distillation_loss(s, t, reduction="sum")
    grad = jax.jit(jax.grad(f))
    grads = np.asarray(grad(many, teacher), np.float64)
    error = grads.std(0) / np.sqrt(rows)
    expected = oracle.distillation_loss(s, t).student
    assert (np.abs(grads.mean(0) - expected) < 4 * error).all()
    biased = grad(many, top_k_teacher(of_many, 3, tail="renormalize"))[0]
    assert (np.abs(np.asarray(biased) - expected) > 20 * error).any()


@pytest.mark.parametrize("vocab", [9, *rarely(70_000)])
def test_a_column_without_mass_is_never_drawn(rng, vocab):
    kept = rng.random(vocab) < 0.5
    kept[1], kept[-1] = True, False
    logits = np.where(kept, rng.normal(size=vocab), -np.inf).astype(np.float32)
    draw = jax.jit(partial(sampled_teacher, num_samples=100_000))
    indices = np.asarray(draw(jax.random.key(5), logits).indices)
    assert indices.min() >= 0 and indices.max() < vocab
    assert kept[indices].all()
    one = np.full(vocab, -np.inf, np.float32)
    one[3] = 80
    assert (sampled_teacher(jax.random.key(6), one, 100).indices == 3).all()


@pytest.mark.slow
def test_rare_columns_are_not_lost_to_float32(rng):
    # Half of the columns have 2e-8 each, which is below the spacing of float32 uniforms
    # and of a float32 sum near 1.
    vocab, n = 50_000, 200_000
    rare = rng.permutation(vocab) < vocab // 2
    p = np.where(rare, 2e-8, (1 - 2e-8 * rare.sum()) / (~rare).sum())
    draw = jax.jit(partial(sampled_teacher, num_samples=n))
    indices = np.asarray(draw(jax.random.key(7), np.log(p).astype(np.float32)).indices)
    mean, is_rare = n * p[rare].sum(), rare[indices]
    assert mean > 90 and abs(is_rare.sum() - mean) < 5 * np.sqrt(mean)
    assert deviation(indices[~is_rare], np.where(rare, 0, 1 / (~rare).sum())) < 4


# What they refuse.

LOGITS = np.zeros((2, V), np.float32)
HIDDEN = np.zeros((2, 3), np.float32)
T0, T3 = dict(temperature=0.0), dict(temperature=np.ones(3))


@pytest.mark.parametrize(
    "given, options, error, match",
    [
        (LOGITS, dict(k=V + 1), ValueError, "`k` must be at most the vocabulary, 37"),
        (LOGITS, dict(k=9, vocab_size=8), ValueError, "`k` must be at most .* 8"),
        (LOGITS, dict(k=0), ValueError, "`k`"),
        (LOGITS, dict(k=2.0), TypeError, "`k`"),
        (LOGITS, T0, ValueError, "`temperature`"),
        (LOGITS, T3, ValueError, "`temperature`"),
        (LOGITS, dict(tail="none"), ValueError, "`tail`"),
        (LOGITS, dict(vocab_size=V + 1), ValueError, "`vocab_size`.*`logits_or_head`"),
        (LOGITS, dict(vocab_axis="model"), ValueError, "`vocab_axis` must be None"),
        (LOGITS, dict(mask=1), TypeError, "`mask`"),
        (LOGITS, dict(axis_name="model"), ValueError, "`axis_name`"),
        (LOGITS.astype(int), {}, TypeError, "`logits_or_head` must be floating-point"),
        (np.zeros(()), {}, ValueError, "`logits_or_head`"),
        (jaxkl.SparseTeacher([[1]], [[0.0]]), {}, TypeError, "SparseTeacher.*already"),
        ((HIDDEN, HIDDEN), {}, TypeError, r"`logits_or_head`.*got a tuple.*LinearHead"),
        (len, {}, TypeError, "got builtin_function.*FunctionHead"),
        (jaxkl.LinearHead(HIDDEN, HIDDEN), {}, ValueError, "`logits_or_head.hidden`"),
    ],
)  # fmt: skip
def test_errors_of_top_k(given, options, error, match):
    with pytest.raises(error, match=match):
        top_k_teacher(given, **dict(k=2) | options)


@pytest.mark.parametrize(
    "key, given, options, error, match",
    [
        (KEY, LOGITS, dict(num_samples=0), ValueError, "`num_samples`"),
        (KEY, LOGITS.astype(int), {}, TypeError, "`logits_or_head`"),
        (KEY, LOGITS, dict(temperature=-1.0), ValueError, "`temperature`"),
        (0, LOGITS, {}, TypeError, "`key` must be a JAX random key, got 0"),
    ],
)
def test_errors_of_samples(key, given, options, error, match):
    with pytest.raises(error, match=match):
        sampled_teacher(key, given, **dict(num_samples=3) | options)


def test_errors_inside_shard_map():
    def f(x, **options):
        return jax.shard_map(
            lambda x, key: sampled_teacher(key, x, 2, axis_name="model", **options),
            mesh=mesh_of(1, 8), in_specs=(P(None, x), P()), out_specs=P(),
        )(np.zeros((2, 40), np.float32), KEY)  # fmt: skip

    with pytest.raises(ValueError, match="`logits_or_head` must hold a slice"):
        f(None)
    with pytest.raises(ValueError, match="`vocab_size` must be at most the 40 col"):
        f("model", vocab_size=41)
