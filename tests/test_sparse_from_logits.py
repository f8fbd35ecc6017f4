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
from jaxkl import sampled_teacher, top_k_teacher
from jaxkl._engine import row_lists

from .cases import rarely
from .helpers import assert_close
from .sources import exact_logits, make_function, make_head, rounded


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


def both(source, **options):
    """A list and samples, in one program."""
    listed = top_k_teacher(source, K, **options)
    return listed, sampled_teacher(KEY, source, 40, **options)


def assert_same(actual, expected, tol=1e-6):
    (listed, drawn), (whole, all_drawn) = actual, expected
    np.testing.assert_array_equal(listed.indices, whole.indices)
    np.testing.assert_array_equal(drawn.indices, all_drawn.indices)
    assert_close(listed.log_probs, whole.log_probs, tol)
    assert_close(listed.log_rest, whole.log_rest, tol)


@pytest.fixture
def small_tiles(monkeypatch):
    """Of three tokens."""
    monkeypatch.setattr(row_lists, "_MAX_TILE", 3)


@pytest.mark.parametrize(
    "kind, dtype",
    [
        ("linear", "bfloat16"),
        ("function", "float64"),
        *rarely(("logits", "float32"), ("logits", "float64")),
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


def mesh_of(data, model, kind=AxisType.Auto):
    return jax.make_mesh((data, model), ("data", "model"), axis_types=(kind,) * 2)


LAYOUTS = {
    "tokens": (mesh_of(8, 1), dict(token_axes="data")),
    "vocabulary": (mesh_of(1, 8), dict(vocab_axis="model")),
    "both": (mesh_of(2, 4), dict(token_axes="data", vocab_axis="model")),
}


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
    mesh, rows = mesh_of(2, 4), P("data", None, None)
    specs = dict(kernel=P(None, "model"), bias=P("model"), scale=P(), absent=None)
    if kind == "linear":
        in_specs = jaxkl.LinearHead(
            rows, P(None, "model"), P("model"), softcap=3.0, scale=1.3
        )
    else:
        in_specs = jaxkl.FunctionHead(source.apply, specs, rows)

    sharded = jax.shard_map(
        partial(both, axis_name="model", vocab_size=34),
        mesh=mesh,
        in_specs=(in_specs,),
        out_specs=P("data"),
    )
    f, whole = jax.jit(sharded), jax.jit(partial(both, vocab_size=34))
    assert_same(f(source), whole(source))
    alike = replace(source, hidden=jnp.broadcast_to(source.hidden[:1, :1], (8, 2, 6)))
    rows = f(alike)[1].indices.reshape(16, -1).tolist()
    assert len(set(map(tuple, rows))) == 16


@pytest.mark.slow
def test_a_function_whose_columns_are_split(rng):
    source = make(rng, "function", vocab=40)
    specs = dict(kernel=P(None, "model"), bias=P("model"), scale=P(), absent=None)
    split = replace(source, param_specs=specs)
    mesh, axes = LAYOUTS["both"]
    result = jax.jit(partial(both, mesh=mesh, **axes))(split)
    assert_same(result, jax.jit(both)(source))


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


def test_samples_of_slices_follow_the_softmax(rng):
    # Columns of 0.4 to 2e-4, on eight devices, whose groups do not end where theirs do.
    p = np.exp(rng.normal(size=V) * 2)
    p[8] = 0
    p /= p.sum()
    rows = np.tile(np.log(p, out=np.full(V, -np.inf), where=p > 0), (30, 1))
    mesh, axes = LAYOUTS["vocabulary"]
    draw = partial(sampled_teacher, KEY, num_samples=1000, mesh=mesh, **axes)
    drawn = np.asarray(jax.jit(draw)(rows.astype(np.float32)).indices)
    counts, expected = np.bincount(drawn.ravel(), minlength=V), drawn.size * p
    assert counts[8] == 0
    statistic = np.sum((counts - expected)[p > 0] ** 2 / expected[p > 0])
    assert abs(statistic - (V - 2)) < 4 * np.sqrt(2 * (V - 2))
    # Tokens are independent: the variance over tokens is that of their draws.
    of_token = (drawn == p.argmax()).mean(-1)
    ratio = of_token.var() / (p.max() * (1 - p.max()) / 1000)
    assert 0.4 < ratio < 2


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

    def one(hidden, T):
        return both(replace(source, hidden=hidden), temperature=T)

    def all_ways(hidden, T):
        scanned = jax.lax.scan(lambda _, x: (None, one(*x)), None, (hidden, T))[1]
        loss = lambda *x: sum(map(jnp.sum, jax.tree.leaves(one(*x)[0].log_probs)))
        return (
            jax.vmap(one)(hidden, T),
            scanned,
            jax.grad(loss, (0, 1))(hidden[0], T[0]),
        )

    mapped, scanned, grads = jax.jit(all_ways)(source.hidden, T)
    assert not any(np.any(x) for x in grads)
    for i in range(2):
        alone = one(source.hidden[i], T[i])
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
    listed, drawn = both(np.zeros((0, V), np.float32))
    mesh, axes = LAYOUTS["both"]
    spread = both(np.zeros((0, V), np.float32), mesh=mesh, **axes)
    assert listed.indices.shape == spread[0].indices.shape == (0, K)
    assert drawn.indices.shape == spread[1].indices.shape == (0, 40)
    assert listed.temperature == drawn.temperature == 1


LOGITS = np.zeros((2, V), np.float32)
HIDDEN = np.zeros((2, 3), np.float32)


@pytest.mark.parametrize(
    "given, options, error, match",
    [
        (LOGITS, dict(k=V + 1), ValueError, "`k` must be at most the vocabulary, 37"),
        (LOGITS, dict(k=9, vocab_size=8), ValueError, "`k` must be at most .* 8"),
        (LOGITS, dict(vocab_size=V + 1), ValueError, "`vocab_size`.*`logits_or_head`"),
        (LOGITS, dict(vocab_axis="model"), ValueError, "`vocab_axis` must be None"),
        (LOGITS, dict(mask=1), TypeError, "`mask`"),
        (LOGITS, dict(axis_name="model"), ValueError, "`axis_name`"),
        (LOGITS.astype(int), {}, TypeError, "`logits_or_head` must be floating-point"),
        (jaxkl.SparseTeacher([[1]], [[0.0]]), {}, TypeError, "SparseTeacher.*already"),
        ((HIDDEN, HIDDEN), {}, TypeError, r"`logits_or_head`.*got a tuple.*LinearHead"),
        (len, {}, TypeError, "got builtin_function.*FunctionHead"),
        (jaxkl.LinearHead(HIDDEN, HIDDEN), {}, ValueError, "`logits_or_head.hidden`"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(given, options, error, match):
    with pytest.raises(error, match=match):
        top_k_teacher(given, **dict(k=2) | options)


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
    with pytest.raises(TypeError, match="`key` must be a JAX random key, got 0"):
        sampled_teacher(0, LOGITS, 2)
