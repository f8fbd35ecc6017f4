"""The one core of all distillation losses, with the gradient in the forward pass.

    loss = Σ_tokens Σ_terms weight · term(teacher, student)

or its parts `weight · term`, which the caller adds up, or takes as they are.

Reductions, masks, T² and mixing factors are all in the weights when they get here, and
so are known before the backward pass. The forward rule computes the gradients with the
loss, a tile at a time, and keeps those alone; the backward rule multiplies them by the
incoming cotangent. If there is a cotangent for each part, or a float16 gradient, the
backward rule runs the tiles again instead.
"""

import dataclasses
import functools as ft
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero

from .._math.numerics import weigh
from .._util.compat import varying_axes
from .._util.trees import combine, select
from .operands import Operands, Outputs, Result, Spec
from .plan import plan, Platform, workload
from .walk import walk


# What a program is traced for. The tests leave out accelerators, which they do not run.
PLATFORMS: tuple[Platform, ...] = ("cpu", "accelerator")


def weighted_loss(spec: Spec, operands: Operands) -> Outputs:
    """`Σ weight · term`, a scalar, or each `weight · term`, a tuple.

    With it come the terms and metrics, `[B]` each.

    Terms and metrics are constants to differentiation.
    """
    ready = lambda source: source.ready(spec.dtype, spec.vocab)
    operands = operands.map_sources(ready)
    dtypes = tuple(x.dtype.name for x in jax.tree.leaves(operands))
    vocab_axis = spec.vocab.axis_name
    if vocab_axis is not None:
        operands = jax.tree.map(ft.partial(_widen_shared, vocab_axis), operands)
    operands = operands.match_varying(vocab_axis)
    outputs: Any
    try:
        outputs = _weighted_loss(spec, dtypes, operands)
    except NotImplementedError:
        # A `jax.shard_map` without a `jit` around it runs no custom_vjp with symbolic
        # zeros, but a `jit` around one.
        outputs = _jitted_weighted_loss(spec, dtypes, operands)
    except TypeError as error:
        if "forward-mode" not in str(error):
            raise
        raise TypeError(
            "forward-mode autodiff (`jax.jvp`, `jax.linearize`, `jax.jacfwd`) is for "
            "the function of the same name in `jaxkl.reference`, which has the same "
            "values; this one makes gradients with the loss, for reverse mode alone."
        ) from error
    loss, terms, metrics = outputs
    return loss, jax.lax.stop_gradient(terms), jax.lax.stop_gradient(metrics)


def _widen_shared(vocab_axis: str, x: jax.Array) -> jax.Array:
    """`x` in float32 if all slices of the vocabulary share it and it has 16 bits.

    Each slice has a part of the gradient of hidden states. The parts are summed in the
    dtype that the array has here.
    """
    is_half = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize == 2
    is_shared = vocab_axis not in varying_axes(x)
    return x.astype(jnp.float32) if is_half and is_shared else x


# `dtypes` are the operands' own, in which we compute: XLA drops the casts to float32
# and back. Gradients have the dtypes of the operands that are given.
#
# What runs is jitted inside the rules: a `jit` around them would trace the tiles
# without gradients too, wherever a gradient is asked for.
@ft.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _weighted_loss(spec, dtypes, operands):
    return _value(spec, dtypes, operands)


@ft.partial(jax.jit, static_argnums=(0, 1))
def _value(spec, dtypes, operands):
    operands = _with_dtypes(dtypes, operands)
    return _outputs(spec, operands, _run(spec, operands, _no_gradients(operands)))


class _Residuals(NamedTuple):
    """Flags, and either the operands or their gradients.

    JAX keeps one residual structure for a rule, though it may trace the rule again for
    other differentiated arguments, and silently mixes up the leaves if the structures
    differ. So an absent array is an empty one, and the structure is always the same.
    """

    flags: Operands  # whether each array is differentiated, see `_flag`
    operands: Operands  # if the backward rule runs the tiles again
    rows: Any  # likewise, RowStats if there is a cotangent for each part
    gradients: Operands  # if the forward rule has made them


def _weighted_loss_fwd(spec, dtypes, primals):
    is_primal = lambda x: isinstance(x, CustomVJPPrimal)
    map_primals = ft.partial(jax.tree.map, is_leaf=is_primal)
    flags = map_primals(lambda x: _flag(x.perturbed, x.value.dtype), primals)
    return _forward(spec, dtypes, flags, map_primals(lambda x: x.value, primals))


@ft.partial(jax.jit, static_argnums=(0, 1))
def _forward(spec, dtypes, flags, operands):
    operands = _with_dtypes(dtypes, operands)
    asked = jax.tree.map(_flagged_dtype, flags)
    absent = jax.tree.map(lambda _: jnp.zeros(0), operands)
    if _awaits_cotangent(spec, asked):
        result = _run(spec, operands, _no_gradients(operands))
        res = _Residuals(flags, operands, result.rows, absent)
    else:
        result = _run(spec, operands, asked)
        res = _Residuals(flags, absent, None, combine(result.gradients, absent))
    return _outputs(spec, operands, result), res


def _weighted_loss_bwd(spec, dtypes, res, cotangents):
    del dtypes
    g, _, _ = cotangents
    known = jax.tree.map(lambda g: None if isinstance(g, SymbolicZero) else g, g)
    return (_backward(spec, res, known),)


@ft.partial(jax.jit, static_argnums=0)
def _backward(spec, res, g):
    asked = jax.tree.map(_flagged_dtype, res.flags)
    if not _awaits_cotangent(spec, asked):
        times_g = lambda dtype, d: (d.astype(g.dtype) * g).astype(dtype)
        return jax.tree.map(times_g, asked, select(asked, res.gradients))
    operands, of_terms = res.operands, g
    if spec.reduce:
        of_terms = (g,) * len(operands.terms)
    # A term whose part of the loss has no cotangent is left out.
    kept = [i for i, g in enumerate(of_terms) if g is not None]
    only = lambda x: x._replace(terms=tuple(x.terms[i] for i in kept))
    of_terms = [of_terms[i] for i in kept]
    asked, x = only(asked), only(operands)
    x = x.with_weights(map(jnp.multiply, of_terms, x.weights))
    x = x._replace(rows=res.rows)
    asked = asked._replace(rows=_no_gradients(res.rows))
    spec = dataclasses.replace(spec, metrics=False)
    gradients = _run(spec, x, asked).gradients._replace(rows=None)
    # The gradient of a weight is its term, which has not seen the cotangent.
    times = lambda x, g: None if x is None else x * g
    gradients = gradients.with_weights(map(times, gradients.weights, of_terms))
    terms = list(map(_no_gradients, operands.terms))
    for i, term in zip(kept, gradients.terms, strict=True):
        terms[i] = term
    return gradients._replace(terms=tuple(terms))


_weighted_loss.defvjp(_weighted_loss_fwd, _weighted_loss_bwd, symbolic_zeros=True)
_jitted_weighted_loss = jax.jit(_weighted_loss, static_argnums=(0, 1))


def _flag(is_differentiated: bool, dtype: jnp.dtype) -> jax.Array:
    """Residuals must be arrays. So whether an array is differentiated, and its dtype,
    are the dtype of an empty one: bool if it is not."""
    return jnp.zeros(0, dtype if is_differentiated else bool)


def _flagged_dtype(flag: jax.Array) -> jnp.dtype | None:
    """The dtype of a gradient that is asked for: see `walk`."""
    return None if flag.dtype == bool else flag.dtype


def _no_gradients(x: Any) -> Any:
    """What asks for no gradient: see `walk`."""
    return jax.tree.map(lambda _: None, x)


def _awaits_cotangent(spec: Spec, asked: Operands) -> bool:
    """Whether gradients wait for the cotangent.

    They do if there is one for each part, and in float16, where the gradient of a mean
    may underflow without its loss scale.
    """
    is_half = spec.passes_float16 or jnp.float16 in jax.tree.leaves(asked)
    return is_half or not spec.reduce


def _with_dtypes(dtypes: tuple[str, ...], operands: Operands) -> Operands:
    leaves, structure = jax.tree.flatten(operands)
    pairs = zip(leaves, dtypes, strict=True)
    # A random key has no `astype`.
    cast = lambda x, dtype: x if x.dtype.name == dtype else x.astype(dtype)
    return structure.unflatten([cast(x, dtype) for x, dtype in pairs])


def _check_explicit(operands: Operands, is_dense: bool, is_alone: bool) -> None:
    what = "`mesh`, with `token_axes` or `vocab_axis`"
    if not is_dense:
        names = "`student`" if is_alone else "`student` and `teacher`"
        sparse = "" if is_alone else " or a SparseTeacher"
        raise ValueError(
            f"{names} must be logits if mesh axes are Explicit: for a head{sparse} "
            f"pass {what}."
        )
    for weight in operands.weights:
        if weight.ndim > 1:
            raise ValueError(
                "`tokens` must be one in each place if mesh axes are Explicit, got "
                f"{weight.shape[1]}: for several pass {what}."
            )


def _outputs(spec: Spec, operands: Operands, result: Result) -> Any:
    loss = jax.tree.map(weigh, operands.weights, result.terms)
    if spec.reduce:
        loss = jnp.sum(sum(jax.tree.leaves(loss)))
    return loss, result.terms, result.metrics


def _run(spec: Spec, operands: Operands, asked: Operands) -> Result:
    """Walks over all tokens as planned for the platform; see `walk`."""
    work = workload(spec, operands, asked)
    if work.sharding == "explicit":
        _check_explicit(operands, work.is_dense, operands.comparison is None)
    walk_by = lambda plan: ft.partial(walk, spec, asked, plan)
    first, *others = [plan(platform, work) for platform in PLATFORMS]
    if all(other == first for other in others):
        return walk_by(first)(operands)
    return jax.lax.platform_dependent(
        operands, cpu=walk_by(first), default=walk_by(*others)
    )
