"""Tokens and vocabulary spread over 8 devices, against the float64 oracle of all."""

import functools as ft
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import jaxkl
from jaxkl import (
    distillation_loss,
    distillation_loss_with_metrics,
    LinearHead,
    SparseTeacher,
    top_k_teacher,
)

from . import oracle
from .cases import (
    ALL,
    assert_matches,
    assert_source_gradient,
    evaluate,
    FORWARD,
    JENSEN_SHANNON,
    over,
    rarely,
    REVERSE,
    rounded,
)
from .helpers import assert_close
from .sources import exact_logits, expected_of, make_head, make_list


AXES = ("data", "fsdp", "model")
LAYOUTS = {  # shape of the mesh, axes of the tokens, axis of the vocabulary
    "8x1": ((8, 1, 1), "data", None),
    "1x8": ((1, 1, 8), (), "model"),
    "2x4": ((2, 1, 4), "data", "model"),
    "4x2": ((4, 1, 2), ("data",), "model"),
    "2x2x2": ((2, 2, 2), ("data", "fsdp"), "model"),
    "2x4 two token axes": ((2, 4, 1), ("data", "fsdp"), None),
}
over_forms = pytest.mark.parametrize("form", ["heads", *rarely("dense")])
over_layouts = pytest.mark.parametrize(
    "layout", ["2x4", *rarely("2x2x2", "8x1", "1x8", "4x2", "2x4 two token axes")]
)


def mesh_of(layout, kind=AxisType.Auto):
    return jax.make_mesh(LAYOUTS[layout][0], AXES, axis_types=(kind,) * 3)


@ft.cache
def sharded(layout, loss=distillation_loss):
    _, token_axes, vocab_axis = LAYOUTS[layout]
    mesh = mesh_of(layout)
    return ft.partial(loss, mesh=mesh, token_axes=token_axes, vocab_axis=vocab_axis)


def sources(rng, form, shape=(13,), vocab=37, dtype="float32"):
    """Neither the tokens nor the vocabulary is a multiple of anything."""
    if form == "dense":
        return [rounded(rng, (*shape, vocab), dtype) for _ in range(2)]
    student = make_head(rng, shape, 5, vocab, dtype, bias=True, softcap=4.0)
    return [student, make_head(rng, shape, 3, vocab, dtype, scale=0.7)]


@over_forms
@over("user", slow=[x for x in ALL if x != "user"])
def test_every_divergence(rng, form, divergence, reference):
    student, teacher = sources(rng, form)
    pair = (divergence, reference)
    assert_matches(student, teacher, pair, loss=sharded("2x4"), temperature=2.0)


@pytest.mark.slow
@over_forms
@over_layouts
def test_every_layout(rng, form, layout):
    student, teacher = sources(rng, form)
    pair = JENSEN_SHANNON if form == "dense" else FORWARD
    assert_matches(
        student, teacher, pair, loss=sharded(layout), temperature=2.0, cotangent=-1.7
    )


def arguments_of_all_kinds(rng, shape, vocab):
    labels = jnp.asarray(rng.integers(0, vocab, shape)).at[0].set(-100)
    return dict(
        temperature=jnp.asarray(rng.uniform(0.5, 2, shape), jnp.float32),
        teacher_temperature=jnp.asarray(rng.uniform(0.5, 2, shape), jnp.float32),
        weights=jnp.asarray(rng.uniform(0.1, 2, shape), jnp.float32),
        where=jnp.asarray(rng.random(shape) < 0.7),
        labels=labels,
        alpha=0.6,
        label_smoothing=0.1,
        z_loss=1e-2,
    )


@pytest.mark.parametrize("reduction", ["none", *rarely("mean", "sum")])
@over_forms
def test_all_arguments(rng, form, reduction):
    shape, vocab = (5, 3), 19
    student, teacher = sources(rng, form, shape, vocab)
    more = arguments_of_all_kinds(rng, shape, vocab)
    cotangent = 1.3 if reduction == "mean" else 0.7
    if reduction == "none":
        cotangent = rng.normal(size=shape).astype(np.float32)
    assert_matches(
        student, teacher, REVERSE, loss=sharded("2x2x2"), reduction=reduction,
        cotangent=cotangent, **more,
    )  # fmt: skip


@over_forms
@pytest.mark.parametrize(
    "vocab, tokens", [(1001, 33), *rarely((1, 1), (3, 8), (700, 7))]
)
def test_odd_sizes_and_tiles(rng, form, vocab, tokens):
    student, teacher = sources(rng, form, (tokens,), vocab)
    value, _ = evaluate(student, teacher, loss=sharded("2x4"), tile=3, temperature=2.0)
    if vocab == 1:  # one outcome: nothing to learn, and no scale to compare with
        assert value == 0
        return
    assert_matches(
        student, teacher, FORWARD, loss=sharded("2x4"), tile=3, temperature=2.0
    )


@pytest.mark.slow
@over_forms
def test_bfloat16(rng, form):
    student, teacher = sources(rng, form, (24,), 64, "bfloat16")
    assert_matches(
        student, teacher, FORWARD, loss=sharded("2x4"), value_tol=1e-5, temperature=2.0
    )


# XLA on CPU may keep a mean's parts in float32 anyway.
@pytest.mark.parametrize("reduction", ["none", *rarely("mean")])
def test_parts_of_hidden_states_gradients_are_rounded_once(rng, reduction):
    student, teacher = (make_head(rng, (48,), n, 512, "bfloat16") for n in (32, 48))
    more = dict(reduction=reduction, temperature=2.0, cotangent=1.3)
    exact = expected_of(student, teacher, **more)
    _, one = evaluate(student, teacher, **more)
    _, many = evaluate(student, teacher, loss=sharded("1x8"), **more)
    for name in ("student", "teacher"):
        want = getattr(exact, name).hidden
        error = lambda grads: np.abs(np.asarray(grads[name].hidden, float) - want)  # noqa: B023
        assert np.mean(error(many)) < 1.02 * np.mean(error(one))
        assert np.max(error(many)) < 1.1 * np.max(error(one))


def test_a_half_gradient_meets_the_cotangent_in_float32(rng):
    student, teacher = sources(rng, "heads", (5,), 16, "bfloat16")
    _, pull = jax.vjp(lambda s: distillation_loss(s, teacher), student)
    g = np.float32(1 + 2**-8 - 2**-12)  # in bfloat16 it would be 1
    for d, one in zip(
        *map(jax.tree.leaves, (pull(g), pull(np.float32(1)))), strict=True
    ):
        want = (one.astype("float32") * g).astype("bfloat16")
        np.testing.assert_array_equal(d.astype("float32"), want.astype("float32"))
        assert np.any(d != one)


@pytest.mark.usefixtures("all_platforms")
def test_local_tokens_are_not_copied_to_stride_over_them(rng):
    """A slice of consecutive tokens needs no copy; strides of 7 by 3 are padded."""
    student, teacher = sources(rng, "heads", (56,), 24)  # 7 tokens a device
    program = lambda f: str(jax.make_jaxpr(ft.partial(f, tile=3))(student, teacher))
    assert " pad[" not in program(sharded("8x1"))
    assert " pad[" in program(distillation_loss)


@pytest.mark.slow
@over_forms
def test_float64(rng, form):
    with jax.enable_x64(True):
        student, teacher = sources(rng, form, dtype="float64")
        loss = sharded("2x4")
        value, grads = evaluate(student, teacher, loss=loss, temperature=2.0)
    expected = expected_of(student, teacher, temperature=2.0)
    assert value.dtype == jnp.float64
    assert_close(value, expected.loss, 1e-12)
    assert_source_gradient(student, grads["student"], expected.student, "", 1e-11)
    assert_source_gradient(teacher, grads["teacher"], expected.teacher, "", 1e-11)


@over_forms
def test_padding_columns_may_hold_nan(rng, form):
    """Widths that differ, a vocabulary that ends inside a device's slice."""
    pad = lambda x: x.at[:, 21:].set(jnp.nan)
    if form == "heads":
        heads = (make_head(rng, (6,), n, width) for n, width in ((4, 24), (3, 29)))
        models = [replace(x, kernel=pad(x.kernel)) for x in heads]
    else:
        models = [pad(rounded(rng, (6, width))) for width in (24, 29)]
    assert_matches(*models, FORWARD, loss=sharded("2x4"), vocab_size=21)


def test_masked_tokens_may_hold_nan(rng):
    student, teacher = make_head(rng, (6,), 4, 24), make_head(rng, (6,), 3, 24)
    where = jnp.arange(6) != 2
    expected = expected_of(student, teacher, where=where)
    bad = LinearHead(student.hidden.at[2].set(jnp.nan), student.kernel)
    value, grads = evaluate(bad, teacher, where=where, loss=sharded("2x4"))
    assert_close(value, expected.loss, 5e-6)
    assert_source_gradient(student, grads["student"], expected.student, "student")
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(grads))
    nothing, grads = evaluate(
        bad, teacher, where=jnp.zeros(6, bool), loss=sharded("2x4")
    )
    assert nothing == 0 and not any(x.any() for x in jax.tree.leaves(grads))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(0,), *rarely(((0, 3),), ((3, 0),))])
@pytest.mark.parametrize("reduction", ["mean", *rarely("none")])
@pytest.mark.parametrize("form", ["dense", *rarely("heads")])
def test_no_token_at_all(rng, form, reduction, shape):
    student, teacher = sources(rng, form, shape, 24)
    loss = sharded("2x4", distillation_loss_with_metrics)
    f = ft.partial(loss, reduction=reduction, temperature=2.0)
    summed = lambda s: jax.tree.map(jnp.sum, f(s, teacher))
    _, grad = jax.jit(jax.value_and_grad(summed, has_aux=True))(student)
    value, metrics = jax.jit(f)(student, teacher)
    assert value.shape == (() if reduction == "mean" else shape)
    assert not np.any(value) and not np.any(jax.tree.leaves(metrics))
    for d, x in zip(jax.tree.leaves(grad), jax.tree.leaves(student), strict=True):
        assert d.shape == x.shape and not np.any(d)


@pytest.mark.slow
def test_columns_that_are_masked_in_both(rng):
    """A whole device's slice of the vocabulary may be `-inf`."""
    student, teacher = (
        rounded(rng, (6, 24)).at[:, 6:12].set(-jnp.inf) for _ in range(2)
    )
    assert_matches(student, teacher, FORWARD, loss=sharded("2x4"))


@pytest.mark.parametrize("form", ["dense", *rarely("heads")])
@pytest.mark.parametrize(
    "tail", ["bucket", *rarely("conditional", "renormalize", "drop", "uniform")]
)
def test_sparse_teacher(rng, form, tail):
    shape, vocab = (11,), 29
    student = sources(rng, form, shape, vocab)[0]
    teacher = top_k_teacher(rounded(rng, (*shape, vocab)), 5, tail=tail)
    # Slots that are empty, and a column that is listed twice.
    indices = teacher.indices.at[0, 1].set(-1).at[1, 2].set(teacher.indices[1, 0])
    teacher = SparseTeacher(indices, teacher.log_probs, tail=tail)
    assert_matches(
        student, teacher, FORWARD, loss=sharded("2x4"), temperature=2.0,
        where=jnp.arange(11) < 9,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "tail", ["uniform", *rarely("renormalize", "drop", "bucket", "conditional")]
)
def test_a_list_of_all_columns_is_the_dense_teacher(rng, tail):
    """Though padding columns are never listed."""
    s, t = (rounded(rng, (3, 29)) for _ in range(2))
    teacher = top_k_teacher(t, 29, tail=tail)
    value, grad = jax.jit(jax.value_and_grad(sharded("2x4")))(s, teacher)
    want, want_grad = jax.value_and_grad(distillation_loss)(s, t)
    assert_close(value, want, 1e-6)
    assert_close(grad, want_grad, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "teacher_form", ["bucket", *rarely("dense", "uniform", "conditional")]
)
@pytest.mark.parametrize(
    "layout",
    ["2x4", *rarely("8x1", "2x2x2")],
)
def test_metrics(rng, layout, teacher_form):
    shape, vocab = (13,), 37
    student, teacher = sources(rng, "heads", shape, vocab)[0], rounded(rng, (13, 37))
    if teacher_form != "dense":
        teacher = replace(
            top_k_teacher(teacher, 4, tail=teacher_form), temperature=None
        )
    more = arguments_of_all_kinds(rng, shape, vocab)
    if teacher_form != "dense":
        del more["teacher_temperature"]
    want, wants = jax.jit(distillation_loss_with_metrics)(student, teacher, **more)
    loss = sharded(layout, distillation_loss_with_metrics)
    value, metrics = jax.jit(loss)(student, teacher, **more)
    assert_close(value, want, 1e-6)
    for name, mean in wants.compute().items():
        assert_close(getattr(metrics, name), mean, 2e-6, name)


@pytest.mark.parametrize("plan", ["fast", *rarely("lean")])
def test_metrics_of_a_list_match_the_oracle(rng, plan):
    """And those of each token, which are spread as the tokens are."""
    shape, vocab = (13,), 37
    student, teacher = sources(rng, "heads", shape, vocab)[0], rounded(rng, (13, 37))
    teacher = make_list(rng, shape, vocab, 9, "uniform")
    more = arguments_of_all_kinds(rng, shape, vocab)
    del more["teacher_temperature"], more["label_smoothing"]
    counted = {k: more[k] for k in ("temperature", "weights", "where", "labels")}
    s, _ = exact_logits(student)
    wants = oracle.metrics(s, teacher, **counted)
    loss = sharded("2x4", distillation_loss_with_metrics)
    loss = ft.partial(loss, plan=plan, per_token_metrics=True)
    each = lambda *models, **more: loss(*models, **more)[1]
    metrics = jax.jit(each)(student, teacher, **more)
    assert metrics.kl.shape == shape
    total = jax.tree.map(jnp.sum, metrics)
    for name in oracle.Metrics._fields:
        assert_close(getattr(total, name), getattr(wants, name), 5e-6, name)
    assert 0 < total.top_k_overlap < 1


@pytest.mark.parametrize("reduce", [jax.lax.psum, *rarely(jax.lax.pmean)])
def test_metrics_are_summed_over_the_axis_of_the_tokens(rng, reduce):
    """With `axis_name` they are of a device's tokens; weights differ by device."""
    student, teacher = rounded(rng, (6, 20)), make_list(rng, (6,), 20, 5, "bucket")
    weights = jnp.asarray([0.5, 1, 0, 3, 0, 2], jnp.float32)
    labels = jnp.array([-100, -100, -100, 4, 19, 7])

    def on_device(student, teacher, weights, labels):
        _, metrics = distillation_loss_with_metrics(
            student, teacher, weights=weights, labels=labels, axis_name="model"
        )
        return reduce(metrics, "data")

    specs = P("data", "model"), P("data"), P("data"), P("data")
    metrics = jax.jit(
        jax.shard_map(on_device, mesh=mesh_of("2x4"), in_specs=specs, out_specs=P())
    )(student, teacher, weights, labels)
    wants = oracle.metrics(student, teacher, weights=weights, labels=labels)
    for name in oracle.Metrics._fields:
        if getattr(wants, name) is None:
            continue
        share = 0.5 if reduce is jax.lax.pmean and name == "weight" else 1
        want = share * getattr(wants, name)
        assert_close(getattr(metrics, name), want, 2e-6, name)


def spread(mesh, source, token_axes="data"):
    put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))
    if not isinstance(source, LinearHead):
        return put(source, token_axes, "model")
    return LinearHead(
        put(source.hidden, token_axes),
        put(source.kernel, None, "model"),
        None if source.bias is None else put(source.bias, "model"),
        softcap=source.softcap,
        scale=source.scale,
    )


@pytest.mark.parametrize("kind", [AxisType.Auto, *rarely(AxisType.Explicit)])
@over_forms
def test_gradients_are_spread_as_their_arguments_are(rng, form, kind):
    student, teacher = sources(rng, form, (8,), 24)
    mesh = mesh_of("2x4", kind)
    step = jax.jit(
        jax.value_and_grad(
            ft.partial(
                distillation_loss,
                mesh=mesh,
                token_axes="data",
                vocab_axis="model",
            )
        )
    )
    expected = expected_of(student, teacher)
    placed = spread(mesh, student)
    value, grad = step(placed, spread(mesh, teacher))
    assert_close(value, expected.loss, 5e-6)
    assert_source_gradient(student, grad, expected.student, "student", 1e-5)
    for x, d in zip(jax.tree.leaves(placed), jax.tree.leaves(grad), strict=True):
        assert d.sharding.is_equivalent_to(x.sharding, x.ndim)


@pytest.mark.slow
def test_scan_remat_and_donation(rng):
    """A training loop over micro-batches, whose state is donated."""
    loss = sharded("2x4")
    kernel = make_head(rng, (1,), 5, 37).kernel
    hidden = rounded(rng, (3, 13, 5))
    teacher = rounded(rng, (3, 13, 37))

    def train(loss, kernel):
        def step(kernel, batch):
            hidden, teacher = batch
            f = jax.checkpoint(lambda k: loss(LinearHead(hidden, k), teacher))
            value, grad = jax.value_and_grad(f)(kernel)
            return kernel - grad, value

        return jax.lax.scan(step, kernel, (hidden, teacher))

    want_kernel, want = jax.jit(ft.partial(train, distillation_loss))(kernel)
    run = jax.jit(ft.partial(train, loss), donate_argnums=0)
    placed = jax.device_put(kernel, NamedSharding(mesh_of("2x4"), P()))
    got_kernel, got = run(placed)
    assert placed.is_deleted()
    assert_close(got, want, 1e-6)
    assert_close(got_kernel, want_kernel, 1e-5)


# In the user's own `shard_map`.


def assert_expected(student, teacher, value, grads):
    """Value and gradients of both models at a temperature of 2."""
    expected = expected_of(student, teacher, temperature=2.0)
    assert_close(value, expected.loss, 5e-6)
    assert_source_gradient(student, grads[0], expected.student, "student")
    assert_source_gradient(teacher, grads[1], expected.teacher, "teacher")


def local_loss(mesh, loss=distillation_loss, **more):
    """The mean over all tokens, from slices of both, and its specs."""
    head = LinearHead(P("data"), P(None, "model"))
    specs = (head, head)

    def f(student, teacher):
        tokens = jax.lax.psum(student.hidden.shape[0], "data")
        value = loss(
            student, teacher, axis_name="model", normalizer=tokens,
            differentiate_teacher=True, temperature=2.0, **more,
        )  # fmt: skip
        return jax.lax.psum(value, "data")

    return f, specs


@pytest.mark.parametrize("grad_inside", [False, *rarely(True)])
@pytest.mark.parametrize("tile", [2, *rarely(None)])
def test_axis_name(rng, grad_inside, tile):
    student, teacher = (make_head(rng, (12,), n, 20) for n in (5, 3))
    mesh = mesh_of("2x4")
    f, specs = local_loss(mesh, tile=tile)
    shard = ft.partial(jax.shard_map, mesh=mesh, in_specs=specs)
    if grad_inside:
        g = shard(jax.value_and_grad(f, (0, 1)), out_specs=(P(), specs))
    else:
        g = jax.value_and_grad(shard(f, out_specs=P()), (0, 1))
    assert_expected(student, teacher, *jax.jit(g)(student, teacher))


@pytest.mark.slow
def test_axis_name_in_the_reference(rng):
    student, teacher = (make_head(rng, (12,), n, 20) for n in (5, 3))
    mesh = mesh_of("2x4")
    f, specs = local_loss(mesh, jaxkl.reference.distillation_loss)
    g = jax.value_and_grad(
        jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=P()), (0, 1)
    )
    assert_expected(student, teacher, *jax.jit(g)(student, teacher))


@pytest.mark.slow
def test_axis_name_with_metrics_and_per_token_losses(rng):
    student, teacher = (rounded(rng, (6, 20)) for _ in range(2))
    mesh = mesh_of("1x8")
    f = ft.partial(
        distillation_loss_with_metrics,
        axis_name="model",
        reduction="none",
        vocab_size=19,
        labels=jnp.arange(6),
        alpha=0.5,
    )
    columns = P(None, "model")
    wide = [jnp.pad(x, ((0, 0), (0, 4))) for x in (student, teacher)]
    got = jax.jit(
        jax.shard_map(f, mesh=mesh, in_specs=(columns, columns), out_specs=P())
    )(*wide)
    want = distillation_loss_with_metrics(
        student[:, :19], teacher[:, :19], reduction="none", labels=jnp.arange(6),
        alpha=0.5,
    )  # fmt: skip
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert_close(x, y, 2e-6)


LABELS = np.array([9, 0, 4])


@pytest.mark.parametrize(
    "loss",
    [
        *rarely(
            lambda s, t, **axis: distillation_loss(s, t, temperature=2.0, **axis),
            lambda s, _, **axis: jaxkl.cross_entropy(s, LABELS, **axis),
            lambda s, _, **axis: jaxkl.token_log_probs(s, LABELS, **axis)[1],
        ),
    ],
    ids=["distillation_loss", "cross_entropy", "token_log_probs"],
)
def test_axis_name_without_jit(rng, loss):
    student, teacher = sources(rng, "heads", (3,), 10)[0], rounded(rng, (3, 10))
    columns = P(None, "model")
    spec = replace(student, hidden=P(), kernel=columns, bias=P("model"))
    mesh = jax.make_mesh((2,), ("model",), (AxisType.Auto,), devices=jax.devices()[:2])
    f = ft.partial(loss, axis_name="model")
    f = jax.shard_map(f, mesh=mesh, in_specs=(spec, columns), out_specs=P())
    want, d_want = jax.jit(jax.value_and_grad(loss))(student, teacher)
    value, gradient = jax.value_and_grad(f)(student, teacher)
    assert_close(jnp.stack([f(student, teacher), value]), [want, want], 1e-5)
    assert_source_gradient(student, gradient, d_want, "student")


@pytest.mark.parametrize("form", rarely("dense", "heads"))
def test_a_mesh_without_jit(rng, form):
    student, teacher = sources(rng, form)
    f = jax.value_and_grad(sharded("2x4"))
    want, d_want = f(student, teacher)
    with jax.disable_jit():
        value = sharded("2x4")(student, teacher)
        again, gradient = f(student, teacher)
    assert value == again == want and want > 0
    jax.tree.map(np.testing.assert_array_equal, gradient, d_want)


# Errors.


def in_shard_map(f, *args, specs=None, mesh=None, **options):
    mesh = mesh or mesh_of("2x4")
    specs = specs or (P(None, "model"),) * len(args)
    shard = jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=P(), **options)
    return jax.jit(shard)(*args)


def test_check_vma_false_is_refused(rng):
    s, t = (rounded(rng, (4, 8)) for _ in range(2))
    f = ft.partial(distillation_loss, axis_name="model")
    with pytest.raises(ValueError, match="`axis_name` 'model' .*check_vma=True"):
        in_shard_map(f, s, t, check_vma=False)
    with pytest.raises(ValueError, match="`axis_name` 'model' .*check_vma=True"):
        jax.vmap(f, in_axes=1, axis_name="model")(
            s.reshape(4, 2, 4), t.reshape(4, 2, 4)
        )


@pytest.mark.parametrize("outside", [True, False])
def test_an_axis_that_is_not_there(rng, outside):
    s, t = (rounded(rng, (4, 8)) for _ in range(2))
    f = ft.partial(distillation_loss, axis_name="typo")
    with pytest.raises(ValueError, match="`axis_name` must be an axis .* got 'typo'"):
        f(s, t) if outside else in_shard_map(f, s, t)


def test_models_that_are_spread_differently(rng):
    s, t = (rounded(rng, (4, 8)) for _ in range(2))
    f = ft.partial(distillation_loss, axis_name="model")
    with pytest.raises(ValueError, match="slices of the same vocabulary .* 2 and 8"):
        in_shard_map(f, s, t, specs=(P(None, "model"), P()))
    with pytest.raises(ValueError, match="`teacher` must hold a slice"):
        in_shard_map(f, s, t[:, :2], specs=(P(None, "model"), P()))
    with pytest.raises(ValueError, match="`student` must hold a slice"):
        in_shard_map(f, s[:, :2], t, specs=(P(), P(None, "model")))


@pytest.mark.parametrize("name", ["labels", "where", "weights", "temperature"])
def test_arguments_that_differ_over_the_vocabulary_axis(rng, name):
    s, t = (rounded(rng, (4, 8)) for _ in range(2))
    values = dict(
        labels=jnp.zeros(16, int), where=jnp.ones(16, bool), weights=jnp.ones(16),
        temperature=jnp.ones(16),
    )  # fmt: skip

    def f(s, t, x):
        more = dict(alpha=0.5, labels=jnp.zeros(4, int)) | {name: x}
        return distillation_loss(s, t, axis_name="model", **more)

    columns = P(None, "model")
    with pytest.raises(ValueError, match=f"`{name}` must be the same on all devices"):
        in_shard_map(f, s, t, values[name], specs=(columns, columns, P("model")))


def test_a_sparse_teacher_made_of_a_slice(rng):
    s, t = (rounded(rng, (4, 8)) for _ in range(2))

    def f(s, t):
        return distillation_loss(s, top_k_teacher(t, 1), axis_name="model")

    with pytest.raises(ValueError, match="`teacher` must be the same on all devices"):
        in_shard_map(f, s, t)


def test_a_vocabulary_beyond_all_columns(rng):
    s, t = (rounded(rng, (4, 8)) for _ in range(2))
    f = ft.partial(distillation_loss, axis_name="model", vocab_size=9)
    with pytest.raises(ValueError, match="`vocab_size` .* 8 columns .* got 9"):
        in_shard_map(f, s, t)


@pytest.mark.parametrize(
    "more, error, message",
    [
        (dict(token_axes="typo"), ValueError, "`token_axes` .*'data'.* got 'typo'"),
        (dict(vocab_axis="typo"), ValueError, "`vocab_axis` .*'data'.* got 'typo'"),
        (dict(vocab_axis="data"), ValueError, "`vocab_axis` must not be one of"),
        (dict(token_axes=("data", "data")), ValueError, "`token_axes` must differ"),
        (dict(token_axes=3), TypeError, "`token_axes` must be a mesh axis"),
        (dict(mesh="mesh"), TypeError, "`mesh` must be a jax.sharding.Mesh"),
        (dict(axis_name="model"), ValueError, "`axis_name` must be None"),
        (dict(mesh=None), ValueError, "`token_axes` must be None without `mesh`"),
        (
            dict(mesh=None, token_axes=None),
            ValueError,
            "`vocab_axis` must be None without `mesh`, got 'model'",
        ),
        (
            dict(token_axes=None, vocab_axis=None),
            ValueError,
            "`mesh` needs `token_axes`, `vocab_axis` or both",
        ),
        (dict(labels=jnp.full(4, 8), alpha=0.5), ValueError, "`labels` must be in"),
    ],
)
def test_bad_arguments(rng, more, error, message):
    s, t = (rounded(rng, (4, 8)) for _ in range(2))
    good = dict(mesh=mesh_of("2x4"), token_axes="data", vocab_axis="model")
    for loss in (
        distillation_loss,
        distillation_loss_with_metrics,
        jaxkl.reference.distillation_loss,
    ):
        with pytest.raises(error, match=message):
            loss(s, t, **good | more)


@pytest.mark.slow
def test_no_token_axis_is_that_of_none(rng):
    s, t = sources(rng, "heads")
    axes = dict(mesh=mesh_of("2x4"), vocab_axis="model")
    value, grad = jax.value_and_grad(ft.partial(distillation_loss, **axes))(s, t)
    axes["token_axes"] = ()
    same, same_grad = jax.value_and_grad(ft.partial(distillation_loss, **axes))(s, t)
    np.testing.assert_array_equal(value, same)
    jax.tree.map(np.testing.assert_array_equal, grad, same_grad)
    assert_close(value, distillation_loss(s, t), 1e-6)


@pytest.mark.slow
def test_the_reference_takes_a_mesh(rng):
    student, teacher = sources(rng, "heads", (6,), 24)
    mesh = mesh_of("2x4")
    axes = dict(mesh=mesh, token_axes="data", vocab_axis="model", temperature=2.0)
    placed = spread(mesh, student), spread(mesh, teacher)
    value = jax.jit(ft.partial(jaxkl.reference.distillation_loss, **axes))(*placed)
    assert_close(value, expected_of(student, teacher, temperature=2.0).loss, 5e-6)


# Plain `jit` on arrays that are spread, with no word about it.


def collectives(compiled):
    """Each one's name and shape in the compiled program."""
    form = r"= (\S+) (all-gather|all-reduce|all-to-all|collective-permute)(?:-start)?\("
    return [(name, shape) for shape, name in re.findall(form, compiled.as_text())]


@over_forms
@pytest.mark.parametrize("tile", [4, *rarely(None)])
def test_plain_jit_gathers_no_logits_and_no_head(rng, form, tile):
    # The vocabulary of a device, 128, is a size that nothing else has.
    student, teacher = sources(rng, form, (64,), 512)
    mesh = mesh_of("2x4")
    args = spread(mesh, student), spread(mesh, teacher)
    f = ft.partial(
        distillation_loss, temperature=2.0, differentiate_teacher=True, tile=tile
    )
    step = jax.jit(jax.value_and_grad(f, (0, 1))).lower(*args).compile()
    assert_expected(student, teacher, *step(*args))
    found = collectives(step)
    assert found  # statistics over the vocabulary
    for name, shape in found:
        if name != "all-reduce":
            assert "128" not in shape and "512" not in shape, (name, shape)


@pytest.mark.slow
@pytest.mark.parametrize("spec", [P("data"), P("data", "model")])
def test_explicit_axes(rng, spec):
    """Dense losses on arrays whose type holds their sharding, under plain `jit`."""
    mesh = mesh_of("2x4", AxisType.Explicit)
    s, t = (rounded(rng, (8, 24)) for _ in range(2))
    log_q, p = jax.nn.log_softmax(s), jax.nn.softmax(t)
    kl_div = ft.partial(jaxkl.kl_div, reduction="batchmean")
    more = arguments_of_all_kinds(rng, (8,), 24)
    summed = lambda f: lambda x, y: jnp.sum(f(x, y))
    for loss, args in [
        (ft.partial(distillation_loss, temperature=2.0), (s, t)),
        (ft.partial(distillation_loss, tile=2, reduction="sum"), (s, t)),
        (ft.partial(distillation_loss, **more), (s, t)),
        (kl_div, (log_q, p)),
        (ft.partial(kl_div, log_target=True), (log_q, jnp.log(p))),
        (summed(jaxkl.losses.kl_divergence), (log_q, p)),
        (summed(jaxkl.losses.kl_divergence_with_log_targets), (log_q, jnp.log(p))),
        (summed(jaxkl.losses.generalized_kl_divergence), (log_q, p)),
        (summed(jaxkl.losses.softmax_kl_divergence), (s, t)),
    ]:
        step = jax.jit(jax.value_and_grad(loss, (0, 1)))
        want, wants = step(*args)
        placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x in args]
        value, grads = step(*placed)
        assert_close(value, want, 1e-6)
        for grad, want_grad, x in zip(grads, wants, placed, strict=True):
            if want_grad.any():
                assert_close(grad, want_grad, 1e-5)
            assert jax.typeof(grad).sharding.spec == jax.typeof(x).sharding.spec


@pytest.mark.parametrize("reduction", ["mean", *rarely("none")])
def test_explicit_axes_that_do_not_divide_the_tokens(rng, reduction):
    mesh = mesh_of("2x4", AxisType.Explicit)
    s, t = (rounded(rng, (3, 13)) for _ in range(2))
    axes = dict(mesh=mesh, token_axes="data", vocab_axis="model")
    more = dict(reduction=reduction, temperature=2.0, cotangent=3.0)
    loss = ft.partial(distillation_loss, **axes)
    assert_matches(s, t, FORWARD, loss=loss, **more)


def test_a_users_function_is_asked_of_a_slices_own_columns(rng):
    textbook = lambda log_p, log_q: jnp.exp(log_p) * (log_p - log_q)
    s, t = (rounded(rng, (3, 13)) for _ in range(2))
    pair = textbook, oracle.forward_kl
    assert_matches(s, top_k_teacher(t, 4), pair, loss=sharded("2x4"))


def test_explicit_axes_need_a_mesh_for_heads(rng):
    mesh = mesh_of("2x4", AxisType.Explicit)
    student, teacher = (spread(mesh, x) for x in sources(rng, "heads", (8,), 24))
    with pytest.raises(ValueError, match="`teacher` must be logits .* pass `mesh`"):
        jax.jit(distillation_loss)(student, teacher)
    tokens = np.zeros((8, 2), int)
    with pytest.raises(ValueError, match="^`student` must be logits .* pass `mesh`"):
        jax.jit(jaxkl.token_log_probs)(student, tokens[:, 0])
    logits = jax.device_put(rounded(rng, (8, 24)), NamedSharding(mesh, P("data")))
    with pytest.raises(ValueError, match="`tokens` must be one .* pass `mesh`"):
        jax.jit(jaxkl.token_log_probs)(logits, tokens)
