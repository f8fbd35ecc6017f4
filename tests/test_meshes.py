"""Tokens and vocabulary spread over 8 devices: every loss against the oracle of all."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import jaxkl
from jaxkl import FunctionHead, LinearHead, SparseTeacher

from .cases import CATALOGUE, rarely
from .registry import (
    Batch,
    check,
    over_losses,
    pull_back,
    tokens_of,
    with_tokens,
    without_tokens,
)
from .test_masks import of_columns


AXES = "data", "fsdp", "model"
LAYOUTS = {  # shape of the mesh, axes of the tokens, axis of the vocabulary
    "8x1": ((8, 1, 1), "data", None),
    "1x8": ((1, 1, 8), (), "model"),
    "2x4": ((2, 1, 4), "data", "model"),
    "2x2x2": ((2, 2, 2), ("data", "fsdp"), "model"),
}
# How the parameters of a function that makes the columns of its device are split.
SPECS = dict(scale=P(), kernel=P(None, "model"), bias=P("model"), absent=None)


def axes_of(layout, kind=AxisType.Auto):
    """The arguments that say what is spread."""
    shape, token_axes, vocab_axis = LAYOUTS[layout]
    mesh = jax.make_mesh(shape, AXES, axis_types=(kind,) * 3)
    return dict(mesh=mesh, token_axes=token_axes, vocab_axis=vocab_axis)


def split(batch):
    """Functions say how their parameters are split."""
    of = lambda x: replace(x, param_specs=SPECS) if isinstance(x, FunctionHead) else x
    return batch.map(of)


def specs_of(batch):
    """The specs of arrays whose tokens are over "data" and columns over "model"."""

    def spec(x):
        if isinstance(x, LinearHead):
            bias = None if x.bias is None else P("model")
            return replace(x, hidden=P("data"), kernel=P(None, "model"), bias=bias)
        if isinstance(x, FunctionHead):
            return replace(x, hidden=P("data"), params=SPECS)
        if isinstance(x, SparseTeacher):
            return jax.tree.map(lambda _: P("data"), x)
        return jax.tree.map(lambda x: P("data") if np.ndim(x) else P(), x)

    def argument(name, x):
        is_dense = name in ("student", "teacher") and isinstance(x, jax.Array)
        middle = (None,) * (np.ndim(x) - 2)
        return P("data", *middle, "model") if is_dense else spec(x)

    of = lambda arguments: {name: argument(name, x) for name, x in arguments.items()}
    return Batch(of(batch.floats), of(batch.others))


@over_losses(
    "logits", "head", "function", "logits, bucket", "cross_entropy of head",
    "log_probs of logits", "moving kls",
)  # fmt: skip
def test_no_size_divides_anything(rng, loss):
    """Tokens that do not count hold NaN, as do columns that are no outcomes."""
    batch, spoilt = without_tokens(loss.make(rng, (5, 3), 22, pad=2), jnp.nan)
    if "function" not in loss.source:
        spoil = lambda x: of_columns(x, slice(22, None), jnp.nan)
        spoilt = spoilt.map(spoil, "student", "teacher")
    options = {} if loss.function == "token_log_probs" else dict(reduction="none")
    options |= axes_of("2x2x2")
    check(loss, rng, spoilt, exact=batch, vocab_size=22, **options)


@over_losses(
    "head", "function",
    slow=("logits", "function, head", "head, bucket", "log_probs of head"),
)  # fmt: skip
@pytest.mark.parametrize("layout", ["2x4", *rarely("8x1", "1x8")])
def test_layouts(rng, loss, layout):
    batch = loss.make(rng, (13,), 21, pad=(3, 3))
    batch = split(batch) if layout != "8x1" else batch
    check(loss, rng, batch, vocab_size=21, **axes_of(layout), tile=3)


@over_losses("head", slow=("logits", "logits, bucket"))
@pytest.mark.parametrize("divergence", ["user", *rarely(*CATALOGUE)])
def test_divergences(rng, loss, divergence):
    loss = replace(loss, divergence=divergence)
    check(loss, rng, loss.make(rng, (5,), 13), **axes_of("2x4"))


@over_losses("head", slow=("logits", "function", "logits, uniform", "head, logits"))
@pytest.mark.parametrize("dtype", ["bfloat16", *rarely("float64")])
def test_dtypes(rng, loss, dtype):
    with jax.enable_x64(dtype == "float64"):
        check(loss, rng, split(loss.make(rng, (13,), 24, dtype)), **axes_of("2x4"))


@over_losses(
    "head", slow=("logits, conditional", "cross_entropy of head", "log_probs of head")
)
def test_the_lean_plan(rng, loss):
    check(loss, rng, loss.make(rng, (7, 3), 23), **axes_of("2x4"), plan="lean")


@over_losses("head", slow=("logits", "logits, bucket", "log_probs of head"))
def test_without_jit(rng, loss):
    """And step by step, as a debugger goes."""

    def run(f, batch, cotangent):
        with jax.disable_jit():
            of = lambda floats: f(Batch(floats, batch.others))
            value, vjp = jax.vjp(of, batch.floats)
            return value, vjp(jax.tree.map(jnp.asarray, cotangent))[0]

    check(loss, rng, loss.make(rng, (5,), 9), **axes_of("2x4"), run=run)


@over_losses("logits", "function", "cross_entropy of head", "head, bucket")
def test_inside_a_users_shard_map(rng, loss):
    """`axis_name` is the vocabulary's axis, and tokens have an axis of their own."""
    batch = loss.make(rng, (4, 3), 18, pad=(2, 2))
    axes = axes_of("2x4")
    is_list = loss.function == "token_log_probs"
    options = {} if is_list else dict(reduction="none")
    options["vocab_size"] = 18

    def run(f, batch, cotangent):
        specs = tuple(specs_of(batch))
        local = lambda floats, others: f(Batch(floats, others))
        shard = jax.shard_map(
            local, mesh=axes["mesh"], in_specs=specs, out_specs=P("data")
        )
        return pull_back(lambda batch: shard(*batch), batch, cotangent)

    local = getattr(jaxkl, loss.function)
    check(loss, rng, batch, f=WithAxis(local, "model"), run=run, **options)


@over_losses("head", slow=("logits", "function", "head, bucket"))
@pytest.mark.parametrize("inside", [False, *rarely(True)])
def test_a_mean_over_the_tokens_of_a_users_shard_map(rng, loss, inside):
    """With its gradient inside or outside; the first device has nothing to count."""
    batch = loss.make(rng, (16,), 11).map(lambda x: x.at[:2].set(False), "where")
    counted = lambda x: jnp.where(x.others["where"], x.floats["weights"], 0).sum()
    rows = lambda spec: P("data") if "data" in spec else P()
    specs = jax.tree.map(rows, specs_of(batch), is_leaf=lambda x: isinstance(x, P))

    def mean(floats, others):
        local = Batch(floats, others)
        total = jax.lax.psum(counted(local), "data")
        return jax.lax.psum(loss(local, normalizer=total), "data")

    def run(f, batch, g):
        def of_device(floats, others):
            value, vjp = jax.vjp(lambda x: mean(x, others), floats)
            return value, vjp(jnp.asarray(g))[0]

        spread = partial(
            jax.shard_map, mesh=axes_of("8x1")["mesh"], in_specs=tuple(specs)
        )
        if inside:
            out_specs = P(), specs.floats
            return jax.jit(spread(of_device, out_specs=out_specs))(*batch)
        total = spread(mean, out_specs=P())
        return pull_back(lambda batch: total(*batch), batch, g)

    check(loss, rng, batch, run=run, normalizer=counted(batch))


class WithAxis:
    """A loss over an axis inside `shard_map`; its shapes are asked for outside."""

    def __init__(self, f, axis_name):
        self.f, self.axis_name = f, axis_name

    def __call__(self, **arguments):
        try:
            jax.lax.axis_index(self.axis_name)
        except NameError:
            return self.f(**arguments)
        return self.f(**arguments, axis_name=self.axis_name)


@over_losses(
    "head", "cross_entropy of logits", "log_probs of head",
    slow=("logits", "function", "head, bucket"),
)  # fmt: skip
@pytest.mark.parametrize("kind", [AxisType.Auto, *rarely(AxisType.Explicit)])
def test_gradients_are_spread_as_their_arrays(rng, loss, kind):
    axes = axes_of("2x4", kind)
    batch = split(loss.make(rng, (8,), 24))
    place = lambda spec, x: jax.device_put(x, NamedSharding(axes["mesh"], spec))
    leaf = lambda x: isinstance(x, P)
    names = [x for x in batch.floats if x in ("student", "teacher")]
    specs = specs_of(batch).floats
    placed = {
        x: jax.tree.map(place, replace_specs(specs[x]), batch.floats[x], is_leaf=leaf)
        for x in names
    }
    spread = Batch(batch.floats | placed, batch.others)
    _, gradients = check(loss, rng, spread, exact=batch, **axes)
    for name in names:
        leaves = zip(
            *map(jax.tree.leaves, (placed[name], gradients[name])), strict=True
        )
        for x, d in leaves:
            assert d.sharding.is_equivalent_to(x.sharding, x.ndim), name


@pytest.mark.slow
@over_losses("logits", slow=("head", "cross_entropy of head"))
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_spread_tokens_without_a_mesh_of_the_loss(rng, loss, reduction):
    batch = loss.make(rng, (16,), 7)
    spread = NamedSharding(axes_of("8x1")["mesh"], P("data"))
    put = lambda x: with_tokens(x, jax.device_put(tokens_of(x), spread))
    placed = batch.map(put, "student", "teacher", "weights", "where", "labels")
    check(loss, rng, placed, exact=batch, reduction=reduction)


def replace_specs(spec):
    """A function's static field is that of the arrays."""
    is_function = isinstance(spec, FunctionHead)
    return replace(spec, param_specs=SPECS) if is_function else spec
