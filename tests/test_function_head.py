"""`FunctionHead`: any function of parameters and hidden states in place of logits."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

import jaxkl
from jaxkl import distillation_loss, FunctionHead
from jaxkl._engine import rule

from . import oracle
from .cases import evaluate, forget_programs
from .helpers import assert_close
from .registry import check, Loss
from .sources import (
    capped,
    exact_logits,
    expected_of,
    make_function,
    make_head,
    normed,
    rounded,
)
from .test_meshes import axes_of, SPECS, split


@pytest.mark.slow
@pytest.mark.parametrize("source", ["head", "logits", "uniform"])
def test_beside_another_source(rng, source):
    """Dense logits have tiles of consecutive tokens, of which the last overlaps."""
    sources = {f"function, {source}", f"{source}, function"} - {"uniform, function"}
    for loss in map(Loss, sorted(sources)):
        check(loss, rng, loss.make(rng, (13,), 11), tile=4)


@pytest.mark.slow
def test_metrics(rng):
    loss = Loss("function")
    batch = loss.make(rng, (13,), 11)
    f = jaxkl.distillation_loss_with_metrics
    _, metrics = jax.jit(lambda batch: loss(batch, f=f, tile=4, label_smoothing=0.0))(
        batch
    )
    arguments = batch.floats | batch.others
    models = [exact_logits(arguments.pop(x))[0] for x in ("student", "teacher")]
    expected = oracle.metrics(*models, **arguments)
    for name, want in expected._asdict().items():
        if want is not None:
            assert_close(getattr(metrics, name), want, 5e-6, name)


# Tokens and columns that do not count.


def test_a_weight_of_zero_has_the_gradients_of_its_token(rng):
    """As where weights are learned, from 0 on, by what they make of the gradients."""

    def apply(params, x):
        return normed(params, jnp.where(x == 0, 0.1, x))  # sound at 0 too

    student = replace(make_function(rng, (5,), 5, 11), apply=apply)
    student = replace(student, hidden=student.hidden.at[1].set(0))
    teacher, weights = rounded(rng, (5, 11)), jnp.array([1.0, 0, 0, 2, 1])

    @partial(jax.jit, static_argnums=0)
    def both(loss, head, weights):
        f = lambda head, w: loss(head, teacher, weights=w, reduction="sum", tile=2)
        of_params = lambda w: jax.grad(f)(head, w).params["kernel"]
        return jax.grad(f, (0, 1))(head, weights)[1], jax.jacrev(of_params)(weights)

    first, mixed = both(distillation_loss, student, weights)
    want, want_mixed = both(jaxkl.reference.distillation_loss, student, weights)
    assert_close(first, want, 1e-5)
    # The second token holds zeros, where a gradient may not exist.
    assert_close(np.delete(mixed, 1, -1), np.delete(want_mixed, 1, -1), 1e-5)
    # One that holds NaN has no part in it, nor has the ordinary vector in its place.
    student = replace(student, hidden=student.hidden.at[1].set(jnp.nan))
    _, with_nan = both(distillation_loss, student, weights)
    assert np.any(mixed[..., 2]) and not np.any(with_nan[..., 1])
    assert_close(np.delete(with_nan, 1, -1), np.delete(mixed, 1, -1), 1e-6)


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


# Precision and parameters of all kinds.


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
    assert_close(value, want, 1e-5)
    assert_close(d_hidden, d_plain_hidden, 1e-5)
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


# Plans.


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


# Meshes.


def test_nothing_is_gathered_where_the_specs_are_known(rng):
    axes = axes_of("2x4")
    loss = Loss("function")
    models = split(loss.make(rng, (16,), 24)).floats
    spread = lambda x, spec: jax.device_put(x, NamedSharding(axes["mesh"], spec))
    place = lambda x: replace(
        x,
        hidden=spread(x.hidden, P("data")),
        params={
            k: v if v is None else spread(v, SPECS[k]) for k, v in x.params.items()
        },
    )
    placed = place(models["student"]), place(models["teacher"])
    step = jax.jit(jax.value_and_grad(partial(distillation_loss, **axes)))
    assert "all-gather" not in step.lower(*placed).compile().as_text()


# Errors, which name the argument.

HIDDEN_4 = np.ones((5, 4), np.float32)
KERNEL = np.ones((4, 11), np.float32)
product = lambda kernel, x: x @ kernel


class Unhashable:
    __hash__ = None

    def __call__(self, kernel, x):
        return x @ kernel


@pytest.mark.parametrize(
    "changes, error, match",
    [
        (dict(apply=None), TypeError, "`apply`.*callable"),
        (dict(apply=Unhashable()), TypeError, "`apply`.*hashable"),
        (dict(hidden=HIDDEN_4.astype(int)), TypeError, "`student.hidden`"),
        (dict(hidden=np.float32(1)), ValueError, "`student.hidden`"),
        (dict(hidden=HIDDEN_4[:3]), ValueError, "batch shape"),
        (
            dict(params=dict(kernel="kernel")),
            TypeError,
            r"`student.params\['kernel'\]`.*str",
        ),
        (
            dict(apply=lambda kernel, x: (x, x)),
            ValueError,
            r"`student.apply`.*\(\[2, 4\], \[2, 4\]\)",
        ),
        (
            dict(apply=lambda kernel, x: x.sum()),
            ValueError,
            r"`student.apply`.*makes \[\]",
        ),
        (
            dict(apply=lambda kernel, x: kernel),
            ValueError,
            r"`student.apply`.*\[4, 11\]",
        ),
        (
            dict(apply=lambda kernel, x: jnp.argsort(x)),
            TypeError,
            "`student.apply`.*int32",
        ),
        (dict(params=KERNEL[:, :7]), ValueError, "`vocab_size`"),
        (dict(param_specs="model"), TypeError, "`param_specs`.*'model'"),
        (dict(param_specs={"a": P()}), ValueError, "`student.param_specs`.*structure"),
    ],
)
def test_errors_of_a_student(changes, error, match):
    arguments = dict(apply=product, params=KERNEL, hidden=HIDDEN_4) | changes
    with pytest.raises(error, match=match):
        distillation_loss(FunctionHead(**arguments), jnp.zeros((5, 11)))


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
        distillation_loss(head, jnp.zeros((5, vocab)), **axes_of("2x4"))
