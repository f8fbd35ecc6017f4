"""`FunctionHead`: any function of parameters and hidden states in place of logits."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import jaxkl
from jaxkl import distillation_loss, FunctionHead, LinearHead
from jaxkl._engine import rule
from jaxkl._engine.plan import Plan, plan, Workload

from .cases import (
    assert_dropped_rows_may_hold_nan,
    assert_matches,
    assert_source_gradient,
    evaluate,
    forget_programs,
    FORWARD,
    JENSEN_SHANNON,
    over,
    rarely,
    REVERSE,
    rounded,
    taking,
)
from .helpers import assert_close
from .sources import capped, expected_of, make_function, make_head, normed, per_token


replace = dataclasses.replace
mostly_normed = pytest.mark.parametrize("apply", [normed, *rarely(capped)])


def heads(rng, shape=(13,), vocab=11, apply=normed, dtype="float32"):
    return [make_function(rng, shape, n, vocab, dtype, apply) for n in (5, 3)]


# Values and gradients.


@over("forward", slow=["reverse", "js", "user"])
@mostly_normed
def test_every_argument_at_once(rng, apply, divergence, reference):
    shape = (3, 5)
    cotangent = rng.normal(size=shape).astype(np.float32)
    more = per_token(rng, shape, "temperature", "weights", "where", "labels")
    assert_matches(
        *heads(rng, shape, 13, apply),
        (divergence, reference),
        teacher_temperature=jnp.float32(1.5),
        alpha=0.6,
        label_smoothing=0.2,
        z_loss=0.01,
        vocab_size=11,
        tile=4,
        reduction="none",
        cotangent=cotangent,
        tol=2e-5,
        **more,
    )


@pytest.mark.parametrize("tile", rarely(4, None, 1, 2, 12, 13, 100))
def test_a_cotangent_for_each_token(rng, tile):
    cotangent = jnp.asarray(rng.normal(size=13), jnp.float32)
    more = dict(reduction="none", cotangent=cotangent, tile=tile)
    assert_matches(*heads(rng), FORWARD, **more)


@pytest.mark.parametrize("tile", [4, *rarely(None)])
@pytest.mark.parametrize("other", ["head", *rarely("bucket", "logits", "uniform")])
def test_beside_another_source(rng, other, tile):
    """Dense logits have tiles of consecutive tokens, of which the last overlaps."""
    student, teacher = heads(rng)
    dense = rounded(rng, (13, 11))
    if other == "logits":
        assert_matches(student, dense, REVERSE, tile=tile)
        assert_matches(dense, teacher, REVERSE, tile=tile)
    elif other == "head":
        assert_matches(student, make_head(rng, (13,), 4, 11), FORWARD, tile=tile)
        assert_matches(make_head(rng, (13,), 4, 11), teacher, FORWARD, tile=tile)
    else:
        teacher = jaxkl.top_k_teacher(dense, 3, tail=other, temperature=2.0)
        assert_matches(student, teacher, FORWARD, temperature=2.0, tile=tile)


def assert_same(actual, expected, tol=1e-5):
    for x, y in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype
        assert_close(x, y, tol)


@pytest.mark.slow
def test_is_the_linear_head_of_the_same_product(rng):
    head = make_head(rng, (9,), 4, 11)
    product = FunctionHead(lambda kernel, x: x @ kernel, head.kernel, head.hidden)
    teacher = rounded(rng, (9, 11))
    f = jax.value_and_grad(partial(distillation_loss, tile=2))
    value, grad = f(product, teacher)
    want, wanted = f(head, teacher)
    assert_same((value, grad.params, grad.hidden), (want, wanted.kernel, wanted.hidden))


@pytest.mark.slow
def test_metrics(rng):
    student, teacher = heads(rng)
    dense = lambda head: head.apply(head.params, head.hidden)
    f = jaxkl.distillation_loss_with_metrics
    more = dict(labels=jnp.arange(13) % 11, where=jnp.arange(13) != 4)
    assert_same(
        f(student, teacher, tile=4, **more), f(*map(dense, (student, teacher)), **more)
    )


def test_reference_and_forward_mode(rng):
    student, teacher = heads(rng)
    where = np.arange(13) % 3 != 0
    spoil = lambda head: replace(head, hidden=head.hidden.at[~where].set(jnp.nan))
    plain = jaxkl.reference.distillation_loss
    value, grads = evaluate(
        spoil(student), spoil(teacher), loss=plain, where=jnp.asarray(where)
    )
    expected = expected_of(student, teacher, where=where)
    assert_close(value, expected.loss, 1e-5)
    for name, head in (("student", student), ("teacher", teacher)):
        want = getattr(expected, name)
        assert_source_gradient(head, grads[name], want, name, 2e-5)
    along = jax.tree.map(jnp.ones_like, student)
    slope = jax.jit(
        lambda s: jax.jvp(lambda s: plain(s, teacher, where=where), (s,), (along,))
    )
    total = sum(np.sum(d) for d in jax.tree.leaves(expected.student))
    assert_close(slope(student)[1], total, 1e-5)


# Tokens and columns that do not count.


@pytest.mark.parametrize(
    "reduction, tile", [("mean", 4), *rarely(("none", 2), ("mean", None))]
)
@pytest.mark.parametrize("by", ["weights", *rarely("where")])
@mostly_normed
def test_a_dropped_row_may_hold_nan(rng, by, reduction, tile, apply):
    models = heads(rng, (5,), apply=apply)
    assert_dropped_rows_may_hold_nan(*models, by=by, reduction=reduction, tile=tile)


@pytest.mark.parametrize(
    "by, reduction",
    [
        ("labels", "none"),
        ("weights", "mean"),
        *rarely(("labels", "mean"), ("weights", "none")),
    ],
)
def test_a_token_without_weight_may_be_where_a_norm_has_no_gradient(rng, by, reduction):
    student, _ = heads(rng, (5,))
    padded = replace(student, hidden=student.hidden.at[np.array([1, 4])].set(0))
    kept = np.array([0, 2, 3])
    labels = jnp.array([1, 0, 10, 4, 2])
    weights = jnp.array([1.0, 0, 2, 1, 0])
    if by == "labels":
        options = dict(labels=jnp.where(weights == 0, -100, labels))
        options["weights"] = jnp.array([1.0, 3, 2, 1, 3])
    else:
        options = dict(labels=labels, weights=weights)

    @partial(jax.jit, static_argnums=0)
    def run(loss, head, options):
        value, vjp = jax.vjp(
            lambda head: loss(head, **options, reduction=reduction, tile=2), head
        )
        return value, *vjp(jnp.ones_like(value))

    value, grad = run(jaxkl.cross_entropy, padded, options)
    sliced = replace(student, hidden=student.hidden[kept])
    of_kept = dict(labels=labels[kept], weights=weights[kept])
    want, want_grad = run(jaxkl.cross_entropy, sliced, of_kept)
    assert not grad.hidden[np.array([1, 4])].any()
    grad = replace(grad, hidden=grad.hidden[kept])
    assert_same(grad, want_grad, 1e-5)
    if reduction == "none":
        assert not value[np.array([1, 4])].any()
        value = value[kept]
    assert_close(value, want, 1e-6)
    if by == "labels":
        _, plain = run(jaxkl.reference.cross_entropy, padded, options)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(plain))


@pytest.mark.parametrize("tile", [2, *rarely(5)])
def test_a_weight_of_zero_has_the_gradients_of_its_token(rng, tile):
    """As where weights are learned, from 0 on, by what they make of the gradients."""

    def apply(params, x):
        return normed(params, jnp.where(x == 0, 0.1, x))  # sound at 0 too

    student = replace(heads(rng, (5,))[0], apply=apply)
    student = replace(student, hidden=student.hidden.at[1].set(0))
    teacher, weights = rounded(rng, (5, 11)), jnp.array([1.0, 0, 0, 2, 1])

    @partial(jax.jit, static_argnums=0)
    def both(loss, head, weights):
        f = lambda head, w: loss(head, teacher, weights=w, reduction="sum", tile=tile)
        of_params = lambda w: jax.grad(f)(head, w).params["kernel"]
        return jax.grad(f, (0, 1))(head, weights)[1], jax.jacrev(of_params)(weights)

    first, mixed = both(distillation_loss, student, weights)
    want, want_mixed = both(jaxkl.reference.distillation_loss, student, weights)
    assert_close(first, want, 1e-5)
    # The second token holds zeros, where a gradient may not exist.
    assert_close(np.delete(mixed, 1, -1), np.delete(want_mixed, 1, -1), 1e-5)


@pytest.mark.slow
def test_a_row_with_weight_may_be_infinite(rng):
    """It is up to the function what it makes of it."""
    clip = lambda kernel, x: jnp.clip(x, -1, 1) @ kernel
    student = make_head(rng, (5,), 4, 11)
    hidden = student.hidden.at[2, 1].set(jnp.inf)
    teacher = rounded(rng, (5, 11))
    value, grads = evaluate(FunctionHead(clip, student.kernel, hidden), teacher)
    want = expected_of(replace(student, hidden=np.clip(hidden, -1, 1)), teacher)
    assert_close(value, want.loss, 5e-6)
    assert_close(grads["student"].params, want.student.kernel, 1e-5)
    nan = FunctionHead(clip, student.kernel, hidden.at[2].set(jnp.nan))
    assert np.isnan(evaluate(nan, teacher)[0])


@pytest.mark.parametrize("tile", [2, *rarely(None)])
def test_no_tokens(rng, tile):
    value, grads = evaluate(*heads(rng, (0, 3)), tile=tile)
    assert value == 0 and not grads["student"].params["kernel"].any()


@pytest.mark.slow
def test_a_masked_vocabulary(rng):
    mask = lambda head: replace(
        head, params=head.params | dict(bias=head.params["bias"].at[3:6].set(-jnp.inf))
    )
    student, teacher = map(mask, heads(rng))
    _, grads = assert_matches(student, teacher, JENSEN_SHANNON, tile=4)
    assert not grads["student"].params["kernel"][:, 3:6].any()


# Precision.


@pytest.mark.parametrize("dtype, tol", [("bfloat16", 3e-2), *rarely(("float16", 3e-3))])
def test_half_precision(rng, dtype, tol):
    student, teacher = heads(rng, (24,), 32, dtype=dtype)
    assert_matches(student, teacher, FORWARD, tile=8, value_tol=tol, tol=tol)


def test_sums_over_tiles_are_in_float32(rng):
    # With 4096 tokens, 8 at a time, a bfloat16 sum over 512 tiles stalls.
    tokens, vocab = 4096, 32
    product = lambda kernel, x: jnp.dot(x, kernel, preferred_element_type="float32")
    head = make_head(rng, (tokens,), 8, vocab, "bfloat16")
    hidden = head.hidden.at[:, 0].set(1)
    teacher = rounded(rng, (tokens, vocab)).at[:, 5].add(2)
    student = FunctionHead(product, head.kernel, hidden)
    grad = jax.jit(jax.grad(partial(distillation_loss, tile=8)))(student, teacher)
    exact = expected_of(LinearHead(hidden, head.kernel), teacher).student.kernel
    assert grad.params.dtype == jnp.bfloat16
    assert_close(grad.params, exact, 4e-3)


@pytest.mark.slow
def test_float64(rng):
    with jax.enable_x64(True):
        student, teacher = heads(rng, dtype="float64")
        assert_matches(student, teacher, FORWARD, tile=4)


@pytest.mark.slow
def test_logits_in_float64_make_a_loss_in_float64(rng):
    with jax.enable_x64(True):
        head = make_head(rng, (5,), 4, 11)
        wide = lambda kernel, x: x.astype("float64") @ kernel.astype("float64")
        student = FunctionHead(wide, head.kernel, head.hidden)
        teacher = rounded(rng, (5, 11))
        value, grad = jax.value_and_grad(distillation_loss)(student, teacher)
        expected = expected_of(head, teacher)
    assert value.dtype == jnp.float64
    assert_close(value, expected.loss, 1e-12)
    assert grad.params.dtype == jnp.float32
    assert_close(grad.params, expected.student.kernel, 1e-6)


def in_half(params, x):
    return normed(params, x).astype("float16")


@pytest.mark.parametrize(
    "apply, dtype", [(in_half, "float32"), *rarely((normed, "float16"))]
)
def test_a_small_loss_scale_survives_float16(rng, apply, dtype):
    """Also where only the logits have 16 bits."""
    scale = 2.0**16
    student = make_function(rng, (4,), 5, 11, dtype, apply)
    teacher = rounded(rng, (4, 11))
    more = dict(normalizer=4e6, cotangent=scale, weights=jnp.full(4, 1.0))
    _, grads = evaluate(student, teacher, **more)
    want = expected_of(replace(student, apply=normed), teacher, cotangent=scale / 1e6)
    kernel = want.student.params["kernel"]
    assert_close(grads["student"].params["kernel"], kernel, 1e-2)


# Parameters of all kinds.


def test_parameters_without_a_gradient(rng):
    """Integers, random keys and absent ones: float0, as of `jax.grad`."""
    made = make_head(rng, (7,), 4, 11)
    params = dict(
        columns=jnp.asarray(rng.permutation(11)),
        kernel=made.kernel,
        key=jax.random.key(0),
        absent=None,
        flags=np.arange(11) < 9,
    )

    def apply(params, x):
        logits = (x @ params["kernel"])[:, params["columns"]]
        assert params["absent"] is None
        noise = jax.random.normal(params["key"], (11,))
        return jnp.where(params["flags"][None], logits + noise[None], -1.0)

    teacher = rounded(rng, (7, 11))

    def run(loss, f):
        def of(params, hidden):
            return loss(f(apply, params, hidden))

        return jax.jit(jax.value_and_grad(of, (0, 1), allow_int=True))(
            params, made.hidden
        )

    mine = lambda s: distillation_loss(s, teacher, tile=2)
    plain = lambda s: jaxkl.reference.distillation_loss(s, teacher)
    value, (d_params, d_hidden) = run(mine, FunctionHead)
    want, (d_plain, d_plain_hidden) = run(plain, lambda f, *x: f(*x))
    assert_same((value, d_hidden), (want, d_plain_hidden))
    assert_close(d_params["kernel"], d_plain["kernel"], 1e-5)
    for name in ("columns", "key", "flags"):
        assert d_params[name].dtype == d_plain[name].dtype == jax.dtypes.float0
        assert d_params[name].shape == d_plain[name].shape
    # And as a teacher, whose arrays are constants.
    head = FunctionHead(apply, params, made.hidden)
    grad = jax.jit(jax.grad(lambda s: distillation_loss(s, head)))(teacher)
    assert np.isfinite(grad).all() and grad.any()


def test_a_pytree_of_any_class(rng):
    @jax.tree_util.register_pytree_node_class
    class Strict:
        """It refuses to hold anything but arrays with two axes."""

        def __init__(self, kernel):
            assert kernel.ndim == 2
            self.kernel = kernel

        def tree_flatten(self):
            return (self.kernel,), None

        @classmethod
        def tree_unflatten(cls, _, children):
            return cls(*children)

    head = make_head(rng, (7,), 4, 11)
    teacher = rounded(rng, (7, 11))
    strict = lambda params, x: x @ params.kernel
    f = lambda kernel: distillation_loss(
        FunctionHead(strict, Strict(kernel), head.hidden), teacher, tile=3
    )
    want = expected_of(head, teacher).student.kernel
    assert_close(jax.jit(jax.grad(f))(head.kernel), want, 1e-5)


def test_is_a_pytree_of_its_arrays(rng):
    head = make_function(rng, (3,), 4, 11)
    assert len(jax.tree.leaves(head)) == 4
    twice = jax.tree.map(lambda x: 2 * x, head)
    assert twice.apply is normed and twice.params["absent"] is None
    assert_close(twice.hidden, 2 * head.hidden, 0)
    specs = dict(kernel=P(None, "model"), bias=P("model"), scale=P(), absent=None)
    spread = replace(head, param_specs=specs)
    assert hash(jax.tree.structure(spread)) == hash(
        jax.tree.structure(replace(head, param_specs=dict(specs)))
    )
    assert jax.tree.structure(spread) != jax.tree.structure(head)


def test_one_compilation_for_repeated_calls(rng):
    traces = []

    def apply(params, x):
        traces.append(x.shape)
        return normed(params, x)

    step = jax.jit(jax.grad(lambda s, t: distillation_loss(s, t, tile=4)))
    student, teacher = (
        make_function(rng, (13,), 5, 11, apply=apply),
        rounded(rng, (13, 11)),
    )
    step(student, teacher)
    count = len(traces)
    step(jax.tree.map(lambda x: x + 1, student), teacher)
    assert len(traces) == count
    assert all(len(shape) == 2 for shape in traces)


# Products, memory and plans.


def _dots(f, *args):
    text = jax.jit(f).lower(*args).compile().as_text()
    return len(re.findall(r" = \S+ dot\(", text))


@pytest.mark.slow
@pytest.mark.parametrize("tile", [4, *rarely(16)])
@mostly_normed
def test_products_are_computed_once(rng, apply, tile):
    student, _ = heads(rng, (16,), 128, apply)
    teacher = rounded(rng, (16, 128))

    def loss(params, hidden):
        return distillation_loss(
            FunctionHead(apply, params, hidden), teacher, tile=tile
        )

    def frozen(names):
        def f(params, hidden):
            stop = jax.lax.stop_gradient
            fixed = {name: stop(params[name]) for name in names}
            return loss(params | fixed, hidden)

        return _dots(jax.grad(f, (0, 1)), student.params, student.hidden)

    assert _dots(loss, student.params, student.hidden) == 1
    assert frozen([]) == 3
    assert frozen(["kernel"]) == 2
    assert _dots(jax.grad(loss, 0), student.params, student.hidden) == 3
    only_bias = lambda bias, head: loss(head.params | dict(bias=bias), head.hidden)
    assert _dots(jax.grad(only_bias), student.params["bias"], student) == 1


@pytest.fixture
def take(monkeypatch):
    with taking(monkeypatch) as take:
        yield take


PLANS = {
    f"{order} {part}": Plan(4, order, True, part)
    for order in ("strided", "blocks")
    for part in (8, 24)
}
over_plans = pytest.mark.parametrize(
    "name", ["strided 8", *rarely("blocks 8", "strided 24", "blocks 24")]
)


@over_plans
@mostly_normed
def test_one_pull_back_of_many_tokens(rng, take, name, apply):
    take(PLANS[name])
    shape = (21,)
    arrays = per_token(rng, shape, "temperature", "weights", "where")
    models, where = heads(rng, shape, apply=apply), arrays["where"]
    want = assert_matches(*models, FORWARD, cotangent=-1.7, tol=2e-5, **arrays)
    assert not where.all()
    spoil = lambda head: replace(head, hidden=head.hidden.at[~where].set(jnp.nan))
    assert_same(evaluate(*map(spoil, models), cotangent=-1.7, **arrays), want)


@pytest.fixture
def works(monkeypatch):
    """What the engine plans for."""
    works, planned = [], rule.plan

    def record(platform, work):
        works.append(work)
        return planned(platform, work)

    monkeypatch.setattr(rule, "plan", record)
    forget_programs()
    yield works
    forget_programs()


def shapes(apply, tokens=8192, hidden=64, vocab=4096, dtype="bfloat16"):
    shape = lambda *shape: jax.ShapeDtypeStruct(shape, dtype)
    params = dict(scale=shape(hidden), kernel=shape(hidden, vocab), bias=shape(vocab))
    return FunctionHead(apply, params, shape(tokens, hidden))


def test_many_tokens_are_pulled_back_at_once_where_nothing_wide_is_kept(works):
    """The soft cap needs the logits again: they would be made and held twice."""
    slope = lambda student: jax.eval_shape(
        jax.grad(distillation_loss), student, shapes(normed)
    )
    slope(shapes(normed))
    # As much as the float32 sum of the parameters: 2 hidden, bfloat16 being half of it.
    assert works[-1].tokens_per_sum == 2 * 64 + 2 and not works[-1].makes_blocks
    slope(shapes(capped))
    assert works[-1].tokens_per_sum == 0


def test_frozen_parameters_need_no_part(works):
    adapted = lambda params, x: x @ params["kernel"] + (x @ params["a"]) @ params["b"]
    shape = lambda *shape: jax.ShapeDtypeStruct(shape, "float32")
    teacher, hidden = shape(8192, 4096), shape(8192, 64)
    factors = dict(a=shape(64, 8), b=shape(8, 4096))

    def loss(factors, kernel, hidden, teacher):
        head = FunctionHead(adapted, factors | dict(kernel=kernel), hidden)
        return distillation_loss(head, teacher)

    jax.eval_shape(jax.grad(loss), factors, shape(64, 4096), hidden, teacher)
    assert works[-1].sum_bytes == 4 * 8 * (64 + 4096)
    assert works[-1].tokens_per_sum == 8


def test_the_automatic_plan_is_never_lean():
    large = dict(
        tokens=65536, columns=262144, student="head", tokens_per_sum=8192,
        sum_bytes=8 * 2**30,
    )  # fmt: skip
    assert plan("accelerator", Workload(**large)).columns is not None
    whole = plan("accelerator", Workload(**large, makes_blocks=False))
    assert whole.columns is None and whole.tile is not None


TILE, HIDDEN, VOCAB = 64, 32, 16000


@pytest.mark.slow
@mostly_normed
def test_temporaries_are_those_of_a_tile(apply):
    def memory(tokens, loss=distillation_loss):
        head = shapes(apply, tokens, HIDDEN, VOCAB, "float32")
        f = jax.value_and_grad(lambda s, t: loss(s, t, tile=TILE))
        return (
            jax.jit(f).lower(head, head).compile().memory_analysis().temp_size_in_bytes
        )

    tokens = 4096
    few, many = memory(tokens), memory(2 * tokens)
    heads = 4 * HIDDEN * VOCAB * 4
    assert few < 12 * TILE * VOCAB * 4 + heads < 0.3 * tokens * VOCAB * 4
    assert many - few < 12 * tokens * HIDDEN * 4


# Transformations.


@pytest.mark.slow
def test_vmap(rng):
    student, teacher = heads(rng)
    batch = jnp.stack([student.hidden, student.hidden + 0.1])
    loss = lambda hidden, params: distillation_loss(
        FunctionHead(normed, params, hidden), teacher, tile=4
    )
    f = jax.value_and_grad(loss, (0, 1))
    values, (d_hidden, d_params) = jax.jit(jax.vmap(f, (0, None)))(
        batch, student.params
    )
    for i, hidden in enumerate(batch):
        one = replace(student, hidden=hidden)
        want = expected_of(one, teacher)
        of_one = jax.tree.map(lambda x: x[i], d_params)  # noqa: B023
        grad = replace(student, params=of_one, hidden=d_hidden[i])
        assert_close(values[i], want.loss, 5e-6)
        assert_source_gradient(one, grad, want.student, "student", 2e-5)


@pytest.mark.slow
def test_scan_of_remat(rng):
    student, teacher = heads(rng)
    batch = jnp.stack([student.hidden, student.hidden + 0.1])

    def total(loss, params):
        @jax.checkpoint
        def step(sum, hidden):
            head = FunctionHead(normed, params, hidden)
            return sum + loss(head, teacher), None

        return jax.lax.scan(step, jnp.float32(0), batch)[0]

    f = lambda loss: jax.jit(jax.value_and_grad(partial(total, loss)))(student.params)
    mine = partial(distillation_loss, tile=4)
    assert_same(f(mine), f(jaxkl.reference.distillation_loss))


# Meshes.


LAYOUTS = {
    "8x1": ((8, 1), "data", None),
    "2x4": ((2, 4), "data", "model"),
    "1x8": ((1, 8), None, "model"),
}
SPECS = dict(scale=P(), kernel=P(None, "model"), bias=P("model"), absent=None)


def sharded(layout, kind=AxisType.Auto):
    shape, token_axes, vocab_axis = LAYOUTS[layout]
    mesh = jax.make_mesh(shape, ("data", "model"), axis_types=(kind,) * 2)
    axes = dict(mesh=mesh, token_axes=token_axes, vocab_axis=vocab_axis)
    return partial(distillation_loss, **axes)


@pytest.mark.parametrize("layout", ["2x4", *rarely("8x1", "1x8")])
@pytest.mark.parametrize("reduction", ["mean", *rarely("none")])
def test_on_a_mesh_all_devices_take_tokens(rng, layout, reduction):
    cotangent = -1.7 if reduction == "mean" else rng.normal(size=13).astype("float32")
    names = "temperature", "weights", "where", "labels"
    more = per_token(rng, (13,), *names, vocab=10)
    more |= dict(alpha=0.6, vocab_size=10, reduction=reduction, cotangent=cotangent)
    loss = sharded(layout)
    assert_matches(*heads(rng), FORWARD, loss=loss, tile=3, tol=2e-5, **more)


@pytest.mark.parametrize("layout", ["2x4", *rarely("8x1", "1x8")])
@pytest.mark.parametrize("dtype", ["float32", *rarely("bfloat16")])
@pytest.mark.parametrize(
    "pair", ["normed", *rarely("capped", "student alone", "teacher alone")]
)
def test_param_specs_split_the_columns(rng, pair, layout, dtype):
    """Also beside a linear head, whose columns are always split."""
    split = lambda head: replace(head, param_specs=SPECS)
    student, teacher = map(split, heads(rng, vocab=24, dtype=dtype))
    linear = make_head(rng, (13,), 4, 22, dtype)
    more = dict(loss=sharded(layout), vocab_size=21, cotangent=-1.7)
    more |= dict(tol=2e-5) if dtype == "float32" else dict(tol=3e-2, value_tol=1e-2)
    if pair == "student alone":
        assert_matches(student, linear, FORWARD, **more)
    elif pair == "teacher alone":
        assert_matches(linear, teacher, FORWARD, **more)
    else:
        student = replace(student, apply=dict(normed=normed, capped=capped)[pair])
        more |= dict(tile=2, temperature=2.0)
        assert_matches(student, teacher, JENSEN_SHANNON, **more)


@pytest.mark.parametrize("specs", [SPECS, *rarely(None)])
@pytest.mark.parametrize("kind", [AxisType.Auto, *rarely(AxisType.Explicit)])
def test_gradients_are_spread_as_their_arguments_are(rng, kind, specs):
    student, teacher = heads(rng, (16,), 24)
    loss = sharded("2x4", kind)
    spread = lambda x, spec: jax.device_put(
        x, NamedSharding(loss.keywords["mesh"], spec)
    )
    params = {
        name: None if x is None else spread(x, SPECS[name])
        for name, x in student.params.items()
    }
    placed = replace(
        student, params=params, hidden=spread(student.hidden, P("data")),
        param_specs=specs,
    )  # fmt: skip
    step = jax.jit(jax.value_and_grad(loss))
    want = expected_of(student, teacher)
    teacher = replace(teacher, param_specs=specs)
    got = step(placed, teacher)
    assert_close(got[0], want.loss, 5e-6)
    plain = replace(got[1], param_specs=None)
    assert_source_gradient(student, plain, want.student, "student", 2e-5)
    if kind == AxisType.Explicit or specs is not None:
        leaves = zip(*map(jax.tree.leaves, (placed, got[1])), strict=True)
        assert all(x.sharding.is_equivalent_to(d.sharding, x.ndim) for x, d in leaves)
    if specs is not None and kind == AxisType.Auto:
        program = step.lower(placed, replace(placed)).compile().as_text()
        assert "all-gather" not in program


def test_axis_name(rng):
    """Inside `shard_map`, `apply` makes the columns of its device."""
    student, teacher = heads(rng, vocab=24)
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    where = jnp.arange(12) % 5 != 0

    def loss(s_params, s_hidden, t_params, t_hidden):
        def local(s_params, s_hidden, t_params, t_hidden, where):
            value = distillation_loss(
                FunctionHead(normed, s_params, s_hidden),
                FunctionHead(normed, t_params, t_hidden),
                axis_name="model", vocab_size=22, where=where, reduction="sum", tile=4,
            )  # fmt: skip
            return jax.lax.psum(value, "data")

        rows = P("data")
        specs = SPECS, rows, SPECS, rows, rows
        f = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P())
        return f(s_params, s_hidden, t_params, t_hidden, where)

    first = lambda head: replace(head, hidden=head.hidden[:12])
    student, teacher = map(first, (student, teacher))
    args = student.params, student.hidden, teacher.params, teacher.hidden
    value, grads = jax.jit(jax.value_and_grad(loss, (0, 1)))(*args)
    want = expected_of(
        student, teacher, vocab_size=22, where=np.asarray(where), reduction="sum"
    )
    assert_close(value, want.loss, 5e-6)
    grad = replace(student, params=grads[0], hidden=grads[1])
    assert_source_gradient(student, grad, want.student, "student", 2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("part", [32, *rarely(None)])
def test_plain_jit_of_sharded_tokens(rng, take, part):
    """Nothing is gathered but statistics and the parameters' gradients."""
    student, teacher = heads(rng, (32,), 24)
    want = expected_of(student, teacher)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, P("data"))
    spread = lambda head: replace(head, hidden=jax.device_put(head.hidden, rows))
    take(Plan(8, "strided", True, part))
    args = spread(student), spread(teacher)
    step = jax.jit(jax.value_and_grad(distillation_loss)).lower(*args).compile()
    value, grad = step(*args)
    assert_close(value, want.loss, 5e-6)
    assert_source_gradient(student, grad, want.student, "student", 2e-5)
    program = step.as_text()
    for name in ("all-gather", "all-to-all", "collective-permute"):
        assert f"{name}(" not in program and f"{name}-start(" not in program


# Errors, which name the argument.

HIDDEN_4 = np.ones((5, 4), np.float32)
KERNEL = np.ones((4, 11), np.float32)
product = lambda kernel, x: x @ kernel


@pytest.mark.parametrize(
    "head, error, match",
    [
        (lambda: FunctionHead(None, KERNEL, HIDDEN_4), TypeError, "`apply`.*callable"),
        (
            lambda: FunctionHead(Unhashable(), KERNEL, HIDDEN_4),
            TypeError,
            "`apply`.*hashable",
        ),
        (
            lambda: FunctionHead(product, KERNEL, HIDDEN_4.astype(int)),
            TypeError,
            "`student.hidden`",
        ),
        (
            lambda: FunctionHead(product, KERNEL, np.float32(1)),
            ValueError,
            "`student.hidden`",
        ),
        (
            lambda: FunctionHead(product, dict(kernel="kernel"), HIDDEN_4),
            TypeError,
            r"`student.params\['kernel'\]`.*str",
        ),
        (
            lambda: FunctionHead(lambda kernel, x: (x, x), KERNEL, HIDDEN_4),
            ValueError,
            r"`student.apply`.*\(\[2, 4\], \[2, 4\]\)",
        ),
        (
            lambda: FunctionHead(lambda kernel, x: x.sum(), KERNEL, HIDDEN_4),
            ValueError,
            r"`student.apply`.*makes \[\]",
        ),
        (
            lambda: FunctionHead(lambda kernel, x: kernel, KERNEL, HIDDEN_4),
            ValueError,
            r"`student.apply`.*\[4, 11\]",
        ),
        (
            lambda: FunctionHead(lambda kernel, x: jnp.argsort(x), KERNEL, HIDDEN_4),
            TypeError,
            "`student.apply`.*int32",
        ),
        (
            lambda: FunctionHead(product, KERNEL[:, :7], HIDDEN_4),
            ValueError,
            "`vocab_size`",
        ),
        (
            lambda: FunctionHead(product, KERNEL, HIDDEN_4[:3]),
            ValueError,
            "batch shape",
        ),
        (
            lambda: FunctionHead(product, KERNEL, HIDDEN_4, param_specs="model"),
            TypeError,
            "`param_specs`.*'model'",
        ),
        (
            lambda: FunctionHead(product, KERNEL, HIDDEN_4, param_specs={"a": P()}),
            ValueError,
            "`student.param_specs`.*structure",
        ),
    ],
)
def test_errors_of_a_student(head, error, match):
    with pytest.raises(error, match=match):
        distillation_loss(head(), jnp.zeros((5, 11)))


class Unhashable:
    __hash__ = None

    def __call__(self, kernel, x):
        return x @ kernel


def test_apply_must_not_close_over_traced_values():
    @jax.grad
    def slope(kernel):
        head = FunctionHead(lambda _, x: x @ kernel, None, HIDDEN_4)
        return distillation_loss(head, jnp.zeros((5, 11)))

    with pytest.raises(ValueError, match="`student.apply` must not close over traced"):
        slope(jnp.asarray(KERNEL))


@pytest.mark.parametrize("name", ["student", "teacher"])
def test_the_lean_plan_cannot_slice_a_function(name):
    models = dict(student=jnp.zeros((5, 11)), teacher=jnp.zeros((5, 11)))
    models[name] = FunctionHead(product, KERNEL, HIDDEN_4)
    with pytest.raises(ValueError, match=f'`plan` must not be "lean".*`{name}`'):
        distillation_loss(**models, plan="lean")


@pytest.mark.parametrize(
    "specs, vocab, match",
    [
        (P(None, "model"), 11, "`param_specs` must be None.*makes 11.*12"),
        (P("data", "model"), 12, "`param_specs` must be over `vocab_axis`"),
        (P(), 12, "`apply` must make 3 columns on each device.*'model', got 12"),
    ],
)
def test_specs_that_do_not_fit(specs, vocab, match):
    kernel = np.ones((4, vocab), np.float32)
    head = FunctionHead(product, kernel, HIDDEN_4, param_specs=specs)
    with pytest.raises(ValueError, match=match):
        sharded("2x4")(head, jnp.zeros((5, vocab)))


def test_the_oracle_pulls_back_as_autodiff_does(rng):
    with jax.enable_x64(True):
        for apply in (normed, capped):
            head = make_function(rng, (4,), 5, 7, "float64", apply)
            teacher = rounded(rng, (4, 7), "float64")
            f = lambda s: jaxkl.reference.distillation_loss(s, teacher)  # noqa: B023
            assert_same(
                jax.jit(jax.grad(f))(head),
                jax.tree.map(jnp.asarray, expected_of(head, teacher).student),
                1e-11,
            )


def test_a_token_that_holds_nan_has_no_part_in_a_later_derivative_by_its_weight(rng):
    """And not the part that the ordinary vector in its place would have."""
    apply = lambda params, x: x / jnp.linalg.norm(x, axis=-1, keepdims=True) @ params
    hidden, params = rounded(rng, (3, 4)), rounded(rng, (4, 6))
    teacher, weights = rounded(rng, (3, 6)), jnp.array([1.0, 0.0, 2.0])

    @jax.jit
    def mixed(hidden):
        def grad(weights):
            loss = lambda params: jaxkl.distillation_loss(
                jaxkl.FunctionHead(apply, params, hidden),
                teacher,
                weights=weights,
                reduction="sum",
            )
            return jax.grad(loss)(params)

        return jax.jacrev(grad)(weights)

    sound, with_nan = mixed(hidden), mixed(hidden.at[1].set(jnp.nan))
    assert np.any(sound[..., 1]) and not np.any(with_nan[..., 1])
    np.testing.assert_allclose(with_nan[..., ::2], sound[..., ::2], rtol=1e-6)
