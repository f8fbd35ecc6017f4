"""The one core: walks over tiles of tokens, with the gradient in the forward pass.

    loss = Σ_tokens Σ_terms weight · term(teacher, student)

Reductions, masks, T² and mixing factors are all in the weights when they get here, and
so are known before the backward pass: the forward rule computes the gradients with the
loss, a tile at a time, and keeps those alone, and the backward rule multiplies by the
incoming cotangent. Where the cotangents are per token, it runs the tiles again instead.
"""

import functools as ft
import math
from typing import Any

import jax
import jax.numpy as jnp

from ._compat import (
    abstract_eval,
    is_explicitly_sharded,
    many_devices,
    varying_axes,
    zeros,
)
from ._tile import Operands, run_tile, Spec, Tile, weighted_sum
from ._tiles import Blocks, Strided


_MIB = 2**20
_MAX_TILE = 1024  # tokens: enough for a matrix product to run at full speed


@ft.partial(jax.jit, static_argnums=0)
def weighted_loss(spec: Spec, operands: Operands):
    """`Σ weight · term`, a scalar or `[B]`, with the terms and statistics, `[B]` each.

    Terms and statistics are constants to differentiation.
    """
    dtypes = tuple(x.dtype.name for x in jax.tree.leaves(operands))
    axis = spec.vocab.axis_name
    operands = _summed_in_float32(axis, operands).alike(axis)
    student, teacher = (x.drop_padding(spec.vocab) for x in operands[:2])
    operands = operands._replace(student=student, teacher=teacher)
    outputs: Any = _weighted_loss(spec, dtypes, operands)
    loss, terms, statistics = outputs
    return loss, jax.lax.stop_gradient(terms), jax.lax.stop_gradient(statistics)


def _summed_in_float32(axis_name, operands):
    """With what all slices of the vocabulary share, hidden states, in float32: each
    slice has a part of its gradient, and they are summed in the type it has here."""
    if axis_name is None:
        return operands

    def widened(x):
        is_half = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize == 2
        is_shared = axis_name not in varying_axes(x)
        return x.astype(jnp.float32) if is_half and is_shared else x

    return jax.tree.map(widened, operands)


# `dtypes` are those of all operands to compute with: XLA drops both casts. Gradients
# have the dtypes of the operands that are given.
@ft.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _weighted_loss(spec, dtypes, operands):
    operands = _as(dtypes, operands)
    return _outputs(spec, operands, _run(spec, operands, _nothing(operands)))


def _weighted_loss_fwd(spec, dtypes, primals):
    is_primal = lambda x: isinstance(x, jax.custom_derivatives.CustomVJPPrimal)
    operands = jax.tree.map(lambda x: x.value, primals, is_leaf=is_primal)
    values = operands = _as(dtypes, operands)
    wanted = jax.tree.map(
        lambda x: x.perturbed and x.value.dtype.name, primals, is_leaf=is_primal
    )
    if _must_wait(spec, operands, wanted):
        result = _run(spec, operands, _nothing(operands))
        later = lambda want: _placeholder(_LATER, want) if want else _placeholder()
        gradients = jax.tree.map(later, wanted)
    else:
        result = _run(spec, operands, wanted)
        keep = lambda want, d: d if want else _placeholder()
        gradients = jax.tree.map(keep, wanted, result.gradients)
        operands = jax.tree.map(lambda _: _placeholder(), operands)
    return _outputs(spec, values, result), (operands, gradients)


def _weighted_loss_bwd(spec, dtypes, res, cotangents):
    del dtypes
    operands, gradients = res
    g, _, _ = cotangents
    wanted = jax.tree.map(lambda d: d.ndim == _LATER and d.dtype.name, gradients)
    if any(jax.tree.leaves(wanted)):
        weights = jax.tree.map(lambda weight: weight * g, operands.weights)
        scaled = operands._replace(weights=weights)
        gradients = _run(spec, scaled, wanted).gradients
        # The gradient to a weight is its term, which has not seen the cotangent.
        weights = jax.tree.map(lambda term: term * g, gradients.weights)
        return (gradients._replace(weights=weights),)
    scale = lambda d: (d.astype(g.dtype) * g).astype(d.dtype)
    known = lambda d: None if d.ndim == _NEVER else scale(d)
    return (jax.tree.map(known, gradients),)


_weighted_loss.defvjp(_weighted_loss_fwd, _weighted_loss_bwd, symbolic_zeros=True)


# JAX keeps one residual structure for a rule, though it may trace it again for other
# perturbed arguments, and silently mixes up the leaves if they differ. So this one is
# always the same: an empty array, of a rank that nothing has, stands for a gradient
# that is not wanted, or is left to the backward rule.
_NEVER, _LATER = 8, 9


def _placeholder(rank=_NEVER, dtype="float32"):
    return jnp.zeros((0,) * rank, dtype)


def _as(dtypes, operands):
    leaves, structure = jax.tree.flatten(operands)
    pairs = zip(leaves, dtypes, strict=True)
    return structure.unflatten([x.astype(dtype) for x, dtype in pairs])


def _nothing(operands):
    return jax.tree.map(lambda _: False, operands)


def _must_wait(spec, operands, wanted):
    """Whether gradients need the cotangent first: one a token, or a float16 loss scale,
    without which a gradient of a mean may underflow."""
    is_half = lambda x, want: want and x.dtype == jnp.float16
    return not spec.reduce or any(
        jax.tree.leaves(jax.tree.map(is_half, operands, wanted))
    )


def _outputs(spec, operands, result):
    loss = weighted_sum(operands.weights, result.terms)
    return jnp.sum(loss) if spec.reduce else loss, result.terms, result.statistics


def _run(spec: Spec, operands: Operands, wanted: Operands) -> Tile:
    """All tokens, and the gradients that are wanted: `wanted` has a dtype for each, or
    False."""
    tokens = operands.weights.divergence.shape[0]
    dense = operands.student.is_dense and operands.teacher.is_dense
    # What is in memory anyway is read again, where slopes of its size would be kept.
    whole = ft.partial(_run_whole, spec, wanted, again=dense)
    explicit = any(map(is_explicitly_sharded, jax.tree.leaves(operands)))
    if explicit and not dense:
        raise ValueError(
            "`student` and `teacher` must be logits if mesh axes are Explicit: for a "
            "LinearHead or a SparseTeacher there is jaxkl.sharded_distillation_loss."
        )
    # A symbolic number of tokens, in `jax.export`, has no number of tiles; and types
    # that hold a sharding do not allow for slices.
    if explicit or not isinstance(tokens, int):
        return whole(operands)

    def tiled(tile, again=False):
        if tile >= tokens:
            return ft.partial(whole, again=True) if again else whole
        return ft.partial(_run_tiles, spec, wanted, tile, again=again)

    def fitting(tile_bytes, least=1, again=False):
        rows = max(tile_bytes // (spec.vocab.width * spec.dtype.itemsize), least)
        near = min(rows // 8 * 8 or rows, _MAX_TILE)
        return tiled(_tile_size(tokens, near, least), again)

    if spec.tile is not None:
        return tiled(spec.tile)(operands)
    sources = operands.student, operands.teacher
    half = any(x.is_dense and x.values.dtype.itemsize == 2 for x in sources)
    # Accelerators: XLA fuses all that is dense into passes over the logits. Each tile
    # of a head reads and writes the sum of `d kernel`, which takes as long as the
    # products of some 400 tokens.
    elsewhere = whole if dense else fitting(192 * _MIB, least=384, again=True)
    if any(x.shared for x in sources):
        on_cpu = fitting(32 * _MIB)
    else:
        # A few rows at a time stay in cache. But XLA's CPU compiler widens all
        # bfloat16, and a slice's whole array at every step of a loop.
        on_cpu = whole if half else fitting(2 * _MIB)
    if on_cpu is elsewhere:
        return whole(operands)
    return jax.lax.platform_dependent(operands, cpu=on_cpu, default=elsewhere)


def _tile_size(tokens, near, least=1):
    """A divisor of `tokens` in the octave around `near`, if there is one: padding costs
    a copy, and moves tokens between devices that they are spread over. So does a tile
    that those devices do not divide, and most often their number is a power of two."""
    lowest = max(near * 2 // 3 + 1, least * 7 // 8)
    octave = range(lowest, min(near * 4 // 3, _MAX_TILE) + 1)
    if divisors := [tile for tile in octave if tokens % tile == 0]:
        return max(divisors, key=lambda tile: (math.gcd(tile, 16), tile))
    # Else such that few tokens of padding, which cost as much as others, fill the last.
    tile = -(-tokens // -(-tokens // near))
    return min(-(-tile // 8) * 8, near)


def _run_whole(spec, wanted, operands, *, again):
    live = jnp.full_like(operands.weights.divergence, True, bool)
    result = run_tile(spec, operands, live, again=again)
    return result._replace(gradients=_rounded(wanted, result.gradients))


def _run_tiles(spec, wanted, tile, operands, *, again):
    tokens = operands.weights.divergence.shape[0]
    tiles = (Strided if _can_stride(operands) else Blocks)(tokens, tile)
    is_shared = _shared(operands)
    student, teacher = (x.with_peak(spec.vocab) for x in operands[:2])
    inputs = operands._replace(student=student, teacher=teacher)
    inputs = inputs.map_tokens(tiles.arrange)

    def run(i):
        of_tile = inputs.map_tokens(ft.partial(tiles.read, i))
        result = run_tile(spec, of_tile, tiles.live(i), again=again)
        pick = lambda shared: jax.tree.map(
            lambda want, of_all, d: d if want and of_all == shared else None,
            wanted,
            is_shared,
            result.gradients,
        )
        rows = _rounded(wanted, pick(False))
        return result._replace(gradients=rows), pick(True)

    def step(carry, i):
        results, totals = carry
        result, shared = run(i)
        results = jax.tree.map(ft.partial(tiles.write, i), results, result)
        return (results, jax.tree.map(jnp.add, totals, shared)), None

    result, shared = abstract_eval(run, 0)
    results = jax.tree.map(lambda x: zeros(x, tiles.shape + x.shape[1:]), result)
    totals = jax.tree.map(lambda x: zeros(x, x.shape), shared)
    (results, totals), _ = jax.lax.scan(
        step, (results, totals), jnp.arange(tiles.count)
    )
    results = jax.tree.map(tiles.restore, results)
    join = lambda of_all, row, total: total if of_all else row
    gradients = jax.tree.map(join, is_shared, results.gradients, totals)
    return results._replace(gradients=_rounded(wanted, gradients))


def _can_stride(operands):
    """Not in `shard_map`, where tokens are local; and, as it would copy them, not for
    logits unless the partitioner may have spread them over devices."""
    dense = operands.student.is_dense or operands.teacher.is_dense
    is_local = varying_axes(operands.weights.divergence)
    return not is_local and (not dense or many_devices())


def _shared(operands):
    """Which arrays all tokens share."""
    flags = jax.tree.map(lambda _: False, operands)
    of = lambda source: source.map_fields(lambda name, _: name in source.shared)
    return flags._replace(student=of(operands.student), teacher=of(operands.teacher))


def _rounded(wanted, gradients):
    cast = lambda dtype, d: d.astype(dtype) if dtype and d is not None else None
    return jax.tree.map(cast, wanted, gradients)
