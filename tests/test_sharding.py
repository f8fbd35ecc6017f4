"""Losses over 8 devices: what only some of them have, errors, and what is exchanged.

Values and gradients of every loss are in `test_meshes.py`.
"""

import functools as ft
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import jaxkl
import jaxkl.reference
from jaxkl import (
    distillation_loss,
    distillation_loss_with_metrics,
    LinearHead,
    top_k_teacher,
)
from jaxkl._engine.plan import Plan

from . import oracle
from .cases import (
    assert_matches,
    assert_source_gradient,
    evaluate,
    FORWARD,
    rarely,
    taking,
)
from .helpers import assert_close
from .registry import check, Loss, LOSSES, pull_back
from .sources import (
    exact_logits,
    expected_of,
    make_head,
    make_list,
    make_models,
    rounded,
)
from .test_masks import of_columns
from .test_meshes import axes_of, specs_of


def mesh_of(layout, kind=AxisType.Auto):
    return axes_of(layout, kind)["mesh"]


@ft.cache
def sharded(layout, loss=distillation_loss):
    return ft.partial(loss, **axes_of(layout))


def place(mesh, batch):
    """The student and the teacher, spread over the mesh."""
    put = lambda spec, x: jax.device_put(x, NamedSharding(mesh, spec))
    is_spec = lambda x: isinstance(x, P)
    specs = specs_of(batch).floats
    return [
        jax.tree.map(put, specs[x], batch.floats[x], is_leaf=is_spec)
        for x in ("student", "teacher")
    ]


@pytest.mark.parametrize("tokens, vocab", [(8, 3), *rarely((1, 1), (7, 700))])
@pytest.mark.parametrize("source", ["head", *rarely("logits")])
def test_fewer_columns_than_devices(rng, source, tokens, vocab):
    loss = LOSSES[source]
    check(loss, rng, loss.make(rng, (tokens,), vocab), **axes_of("2x4"))


@pytest.mark.slow
def test_columns_that_are_masked_in_both(rng):
    """A whole device's slice of the vocabulary may be `-inf`."""
    loss = replace(LOSSES["head"], divergence="js")
    mask = lambda x: of_columns(x, slice(6, 12), -jnp.inf, only_bias=True)
    batch = loss.make(rng, (6,), 24, softcap=None, bias=True)
    labels = jnp.array([0, 5, -100, 12, 23, 1])
    batch = batch._replace(others=batch.others | dict(labels=labels))
    check(loss, rng, batch.map(mask, "student", "teacher"), **axes_of("2x4"))


def test_a_users_function_is_asked_of_a_slices_own_columns(rng):
    textbook = lambda log_p, log_q: jnp.exp(log_p) * (log_p - log_q)
    s, t = (rounded(rng, (3, 13)) for _ in range(2))
    pair = textbook, oracle.forward_kl
    assert_matches(s, top_k_teacher(t, 4), pair, loss=sharded("2x4"))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(0,), *rarely(((0, 3),), ((3, 0),))])
@pytest.mark.parametrize("reduction", ["mean", *rarely("none")])
@pytest.mark.parametrize("source", ["logits", *rarely("head")])
def test_no_token_at_all(rng, source, reduction, shape):
    loss = LOSSES[source]
    batch, more = loss.make(rng, shape, 24), dict(reduction=reduction)
    f = sharded("2x4", distillation_loss_with_metrics)
    found = jax.jit(lambda batch: loss(batch, f=f, **more))(batch)
    run = lambda batch: loss(batch, **more, **axes_of("2x4"))
    g = loss.cotangent(rng, batch, **more)
    value, gradients = pull_back(run, batch, g)
    assert value.shape == (() if reduction == "mean" else shape)
    assert not any(np.any(x) for x in jax.tree.leaves((found, value, gradients)))
    for d, x in zip(*map(jax.tree.leaves, (gradients, batch.floats)), strict=True):
        assert d.shape == x.shape


@pytest.mark.slow
def test_no_token_axis_is_that_of_none(rng):
    s, t = make_models(rng, "head", (13,), 37)
    run = lambda **axes: jax.value_and_grad(ft.partial(distillation_loss, **axes))(s, t)
    axes = dict(mesh=mesh_of("2x4"), vocab_axis="model")
    jax.tree.map(np.testing.assert_array_equal, run(**axes), run(**axes, token_axes=()))
    assert_close(run(**axes)[0], distillation_loss(s, t), 1e-6)


# Precision.


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


@pytest.mark.usefixtures("all_platforms")
def test_local_tokens_are_not_copied_to_stride_over_them(rng):
    """A slice of consecutive tokens needs no copy; strides of 7 by 3 are padded."""
    student, teacher = make_models(rng, "head", (56,), 24)  # 7 tokens a device
    program = lambda f: str(jax.make_jaxpr(ft.partial(f, tile=3))(student, teacher))
    assert " pad[" not in program(sharded("8x1"))
    assert " pad[" in program(distillation_loss)


# Metrics.


def assert_metrics(actual, *models, factor=None, **arguments):
    expected = oracle.metrics(*models, **arguments)
    for name in oracle.Metrics._fields:
        want = getattr(expected, name)
        if want is not None:
            want = want * (factor or {}).get(name, 1)
            assert_close(getattr(actual, name), want, 5e-6, name)


@pytest.mark.parametrize(
    "plan, source",
    [("fast", "uniform"), ("lean", "uniform")]
    + rarely(("fast", "head"), ("fast", "bucket"), ("fast", "conditional")),
)
@pytest.mark.parametrize("layout", ["2x4", *rarely("8x1", "2x2x2")])
def test_metrics(rng, plan, source, layout):
    """Those of each token, which are spread as the tokens are."""
    loss = Loss(f"head, {source}")
    batch = loss.make(rng, (13,), 37)
    if source == "uniform":
        lists = make_list(rng, (13,), 37, 9, "uniform")
        batch = batch._replace(others=batch.others | dict(teacher=lists))
    f = sharded(layout, distillation_loss_with_metrics)
    more = dict(f=f, plan=plan, per_token_metrics=True, label_smoothing=0.0)
    _, metrics = jax.jit(lambda batch: loss(batch, **more))(batch)
    assert metrics.kl.shape == (13,)
    arguments = batch.floats | batch.others
    models = [exact_logits(arguments.pop(x))[0] for x in ("student", "teacher")]
    total = jax.tree.map(jnp.sum, metrics)
    assert_metrics(total, *models, **arguments)
    assert source != "uniform" or 0 < total.top_k_overlap < 1


@pytest.mark.parametrize("reduce", [jax.lax.psum, *rarely(jax.lax.pmean)])
def test_metrics_are_summed_over_the_axis_of_the_tokens(rng, reduce):
    """With `axis_name` they are of a device's tokens; weights differ by device."""
    student, teacher = rounded(rng, (6, 20)), make_list(rng, (6,), 19, 5, "bucket")
    more = dict(
        weights=jnp.asarray([0.5, 1, 0, 3, 0, 2], jnp.float32),
        labels=jnp.array([-100, -100, -100, 4, 18, 7]),
    )

    def on_device(student, teacher, more):
        f = ft.partial(distillation_loss_with_metrics, axis_name="model", vocab_size=19)
        return reduce(f(student, teacher, **more)[1], "data")

    specs = P("data", "model"), P("data"), P("data")
    f = jax.shard_map(on_device, mesh=mesh_of("2x4"), in_specs=specs, out_specs=P())
    factor = dict(weight=0.5) if reduce is jax.lax.pmean else {}
    metrics = jax.jit(f)(student, teacher, more)
    assert_metrics(metrics, student[:, :19], teacher, factor=factor, **more)


# Transformations.


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


@pytest.mark.parametrize("module", [jaxkl, *rarely(jaxkl.reference)])
def test_axis_name_of_gradients_inside_shard_map(rng, module):
    student, teacher = (make_head(rng, (12,), n, 20) for n in (5, 3))
    head = LinearHead(P("data"), P(None, "model"))
    more = dict(axis_name="model", differentiate_teacher=True, temperature=2.0)

    def f(*models):
        tokens = jax.lax.psum(models[0].hidden.shape[0], "data")
        value = module.distillation_loss(*models, normalizer=tokens, tile=2, **more)
        return jax.lax.psum(value, "data")

    g = jax.shard_map(
        jax.value_and_grad(f, (0, 1)),
        mesh=mesh_of("2x4"), in_specs=(head, head), out_specs=(P(), (head, head)),
    )  # fmt: skip
    assert_expected(student, teacher, *jax.jit(g)(student, teacher))


def assert_expected(student, teacher, value, grads):
    """Value and gradients of both models at a temperature of 2."""
    expected = expected_of(student, teacher, temperature=2.0)
    assert_close(value, expected.loss, 5e-6)
    assert_source_gradient(student, grads[0], expected.student, "student")
    assert_source_gradient(teacher, grads[1], expected.teacher, "teacher")


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
    student, teacher = make_models(rng, "head", (3,), 10)[0], rounded(rng, (3, 10))
    columns = P(None, "model")
    spec = replace(student, hidden=P(), kernel=columns, bias=P("model"))
    mesh = jax.make_mesh((2,), ("model",), (AxisType.Auto,), devices=jax.devices()[:2])
    f = ft.partial(loss, axis_name="model")
    f = jax.shard_map(f, mesh=mesh, in_specs=(spec, columns), out_specs=P())
    want, d_want = jax.jit(jax.value_and_grad(loss))(student, teacher)
    value, gradient = jax.value_and_grad(f)(student, teacher)
    assert_close(jnp.stack([f(student, teacher), value]), [want, want], 1e-5)
    assert_source_gradient(student, gradient, d_want, "student")


@pytest.mark.slow
def test_the_reference_takes_a_mesh(rng):
    loss = LOSSES["head"]
    batch = loss.make(rng, (6,), 24)
    student, teacher = place(mesh_of("2x4"), batch)
    floats = batch.floats | dict(student=student, teacher=teacher)
    spread = batch._replace(floats=floats)
    more = dict(module=jaxkl.reference, tol=(5e-6, 2e-5))
    check(loss, rng, spread, exact=batch, **more, **axes_of("2x4"))


# Errors.


S, T = (np.ones((4, 8), np.float32) * x for x in (1, 2))


def in_shard_map(f, *args, specs=None, mesh=None, **options):
    mesh = mesh or mesh_of("2x4")
    specs = specs or (P(None, "model"),) * len(args)
    shard = jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=P(), **options)
    return jax.jit(shard)(*args)


def test_check_vma_false_is_refused():
    f = ft.partial(distillation_loss, axis_name="model")
    with pytest.raises(ValueError, match="`axis_name` 'model' .*check_vma=True"):
        in_shard_map(f, S, T, check_vma=False)
    with pytest.raises(ValueError, match="`axis_name` 'model' .*check_vma=True"):
        jax.vmap(f, in_axes=1, axis_name="model")(
            S.reshape(4, 2, 4), T.reshape(4, 2, 4)
        )


@pytest.mark.parametrize("outside", [True, False])
def test_an_axis_that_is_not_there(outside):
    f = ft.partial(distillation_loss, axis_name="typo")
    with pytest.raises(ValueError, match="`axis_name` must be an axis .* got 'typo'"):
        f(S, T) if outside else in_shard_map(f, S, T)


def test_models_that_are_spread_differently():
    f = ft.partial(distillation_loss, axis_name="model")
    with pytest.raises(ValueError, match="slices of the same vocabulary .* 2 and 8"):
        in_shard_map(f, S, T, specs=(P(None, "model"), P()))
    with pytest.raises(ValueError, match="`teacher` must hold a slice"):
        in_shard_map(f, S, T[:, :2], specs=(P(None, "model"), P()))
    with pytest.raises(ValueError, match="`student` must hold a slice"):
        in_shard_map(f, S[:, :2], T, specs=(P(), P(None, "model")))


@pytest.mark.parametrize("name", ["labels", "where", "weights", "temperature"])
def test_arguments_that_differ_over_the_vocabulary_axis(name):
    values = dict(
        labels=jnp.zeros(16, int), where=jnp.ones(16, bool), weights=jnp.ones(16),
        temperature=jnp.ones(16),
    )  # fmt: skip

    def f(s, t, x):
        more = dict(alpha=0.5, labels=jnp.zeros(4, int)) | {name: x}
        return distillation_loss(s, t, axis_name="model", **more)

    columns = P(None, "model")
    with pytest.raises(ValueError, match=f"`{name}` must be the same on all devices"):
        in_shard_map(f, S, T, values[name], specs=(columns, columns, P("model")))


def test_a_sparse_teacher_made_of_a_slice():
    def f(s, t):
        return distillation_loss(s, top_k_teacher(t, 1), axis_name="model")

    with pytest.raises(ValueError, match="`teacher` must be the same on all devices"):
        in_shard_map(f, S, T)


def test_a_vocabulary_beyond_all_columns():
    f = ft.partial(distillation_loss, axis_name="model", vocab_size=9)
    with pytest.raises(ValueError, match="`vocab_size` .* 8 columns .* got 9"):
        in_shard_map(f, S, T)


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
def test_bad_arguments(more, error, message):
    good = dict(mesh=mesh_of("2x4"), token_axes="data", vocab_axis="model")
    for loss in (
        distillation_loss,
        distillation_loss_with_metrics,
        jaxkl.reference.distillation_loss,
    ):
        with pytest.raises(error, match=message):
            loss(S, T, **good | more)


# Plain `jit` on arrays that are spread, with no word about it.


def collectives(compiled):
    """Each one's name and shape in the compiled program."""
    form = r"= (\S+) (all-gather|all-reduce|all-to-all|collective-permute)(?:-start)?\("
    return [(name, shape) for shape, name in re.findall(form, compiled.as_text())]


@pytest.mark.parametrize("source", ["head", *rarely("logits")])
@pytest.mark.parametrize("tile", [4, *rarely(None)])
def test_plain_jit_gathers_no_logits_and_no_head(rng, source, tile):
    # The vocabulary of a device, 128, is a size that nothing else has.
    batch = LOSSES[source].make(rng, (64,), 512)
    args = place(mesh_of("2x4"), batch)
    f = ft.partial(
        distillation_loss, temperature=2.0, differentiate_teacher=True, tile=tile
    )
    step = jax.jit(jax.value_and_grad(f, (0, 1))).lower(*args).compile()
    models = batch.floats["student"], batch.floats["teacher"]
    assert_expected(*models, *step(*args))
    found = collectives(step)
    assert found  # statistics over the vocabulary
    for name, shape in found:
        if name != "all-reduce":
            assert "128" not in shape and "512" not in shape, (name, shape)


@pytest.mark.parametrize(
    "source, part", [("head", 32), *rarely(("function", 32), ("function", None))]
)
def test_plain_jit_of_tokens_alone(rng, monkeypatch, source, part):
    """Nothing is gathered but statistics and the gradients of shared arrays."""
    models = make_models(rng, source, (32,), 24)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, P("data"))
    put = lambda x: replace(x, hidden=jax.device_put(x.hidden, rows))
    args = [put(x) for x in models]
    with taking(monkeypatch) as take:
        take(Plan(8, "strided", True, part))
        f = ft.partial(distillation_loss, temperature=2.0, differentiate_teacher=True)
        step = jax.jit(jax.value_and_grad(f, (0, 1))).lower(*args).compile()
    assert_expected(*models, *step(*args))
    program = step.as_text()
    assert "all-reduce" in program
    assert not re.search(
        r"(all-gather|all-to-all|collective-permute)(-start)?\(", program
    )


@pytest.mark.slow
@pytest.mark.parametrize("spec", [P("data"), P("data", "model")])
def test_explicit_axes(rng, spec):
    """Dense losses on arrays whose type holds their sharding, under plain `jit`."""
    mesh = mesh_of("2x4", AxisType.Explicit)
    batch = LOSSES["logits"].make(rng, (8,), 24)
    s, t = (batch.floats.pop(x) for x in ("student", "teacher"))
    more = batch.floats | batch.others | LOSSES["logits"].options
    log_q, p = jax.nn.log_softmax(s), jax.nn.softmax(t)
    kl_div = ft.partial(jaxkl.kl_div, reduction="batchmean")
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


def test_explicit_axes_need_a_mesh_for_heads(rng):
    mesh = mesh_of("2x4", AxisType.Explicit)
    student, teacher = place(mesh, LOSSES["head"].make(rng, (8,), 24))
    with pytest.raises(ValueError, match="`teacher` must be logits .* pass `mesh`"):
        jax.jit(distillation_loss)(student, teacher)
    tokens = np.zeros((8, 2), int)
    with pytest.raises(ValueError, match="^`student` must be logits .* pass `mesh`"):
        jax.jit(jaxkl.token_log_probs)(student, tokens[:, 0])
    logits = jax.device_put(rounded(rng, (8, 24)), NamedSharding(mesh, P("data")))
    with pytest.raises(ValueError, match="`tokens` must be one .* pass `mesh`"):
        jax.jit(jaxkl.token_log_probs)(logits, tokens)
