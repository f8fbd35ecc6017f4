r"""From slopes of a divergence to its gradient by the logits.

The slopes are $f_q = \partial f / \partial \log q$. By the softmax,
$\partial \log q_v / \partial z_w = \delta_{vw} - q_w$, and so

$$ \frac{\partial}{\partial z_w} \sum_v f_v = f_{q,w} - q_w \sum_v f_{q,v}. $$

We sum the computed $f_q$ rather than use a closed form of the sum, so that rounding of
the normaliser cancels. If one column has $q > 1/2$, the difference above is one of two
nearly equal numbers. As $1 - q_w = \sum_{v \ne w} q_v$, we write it there as

$$ f_{q,w} \sum_{v \ne w} q_v - q_w \sum_{v \ne w} f_{q,v}. $$
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ._numerics import zero_unless


class SlopeSums(NamedTuple):
    """Sums over the vocabulary, `[B]` each.

    "Others" are the columns with a probability of at most one half.
    """

    slope: jax.Array
    slope_of_others: jax.Array
    prob_of_others: jax.Array


def sum_slopes(slope: jax.Array, prob: jax.Array) -> SlopeSums:
    """The sums of `slope` and `prob`, `[B, V]`, over the columns at hand."""
    is_other = prob <= 0.5
    others = zero_unless(is_other, slope), zero_unless(is_other, prob)
    return SlopeSums(*_sum_rows(slope, *others))


def centred(slope: jax.Array, prob: jax.Array, sums: SlopeSums) -> jax.Array:
    """The gradient by the logits, `slope - prob · Σ slope`, `[B, V]`."""
    total, slope_of_others, prob_of_others = (x[:, None] for x in sums)
    of_largest = slope * prob_of_others - prob * slope_of_others
    return jnp.where(prob > 0.5, of_largest, slope - prob * total)


@jax.custom_jvp
def _sum_rows(*arrays):
    """The sum of each array over its last axis; XLA on CPU reads them in one pass."""
    zeros = (jnp.zeros((), arrays[0].dtype),) * len(arrays)
    add = lambda xs, ys: tuple(x + y for x, y in zip(xs, ys, strict=True))
    return tuple(jax.lax.reduce(arrays, zeros, add, (arrays[0].ndim - 1,)))


@_sum_rows.defjvp
def _sum_rows_jvp(primals, tangents):
    return _sum_rows(*primals), tuple(jnp.sum(d, axis=-1) for d in tangents)
