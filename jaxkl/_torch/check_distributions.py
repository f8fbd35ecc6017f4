"""A check of the inputs that `kl_div` takes on trust."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from .._util import checks as check


# How far the sum of a row may be from 1. If the logarithms of a vocabulary of 2^18 are
# rounded to bfloat16, the sum moves by up to 3 %.
TOLERANCE = {"float64": 1e-6, "float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}


def check_distributions(
    input: ArrayLike, target: ArrayLike, log_target: bool = False
) -> None:
    r"""Raises at the first row of `kl_div`'s arguments that is no distribution.

    `kl_div` computes its formula for whatever it is given, as PyTorch does. Here, along
    the last axis, $\sum_v e^{x_v} = 1$ must hold for `input`, and $\sum_v t_v = 1$ for
    `target` ($\sum_v e^{t_v} = 1$ if `log_target`), to 1e-6 in float64, 1e-4 in
    float32, 1e-2 in float16 and 5e-2 in bfloat16. No entry may be NaN, no logarithm
    above 0 (to the same tolerance), no probability below 0. A logarithm may be `-inf`:
    that is a probability of 0.

    Inside `jax.jit` and other transformations the values are not known, and nothing is
    checked, at no cost. To check there too, wrap the function with
    `jax.experimental.checkify.checkify`: the same errors are then in what it returns.

    Args:
      input: Log-probabilities, `[..., outcomes]`.
      target: Probabilities, or their logarithms if `log_target`. Broadcasts with
        `input`.
      log_target: Whether `target` holds logarithms.

    Raises:
      TypeError: If an argument is not floating-point, or `log_target` not a bool.
      ValueError: If shapes do not broadcast, or a row is no distribution: names the
        argument, the row, and what is wrong with it.

    Example:
      >>> import jax.numpy as jnp
      >>> log_probs, probs = jnp.log(jnp.array([[0.5, 0.5]])), jnp.array([[0.2, 0.8]])
      >>> check_distributions(log_probs, probs)
      >>> check_distributions(probs, probs)  # doctest: +ELLIPSIS
      Traceback (most recent call last):
      ...
      ValueError: `input` must hold log-probabilities: row [0] has 0.800...
      >>> check_distributions(log_probs, 2 * probs)  # doctest: +ELLIPSIS
      Traceback (most recent call last):
      ...
      ValueError: `target` must hold probabilities: row [0] sums to 2.0, not to 1 ± ...

      Inside `jax.jit`, by `checkify`:

      >>> import jax
      >>> from jax.experimental import checkify
      >>> def loss(log_probs, probs):
      ...     jaxkl.check_distributions(log_probs, probs)
      ...     return jaxkl.kl_div(log_probs, probs, reduction="batchmean")
      >>> error, value = checkify.checkify(jax.jit(loss))(log_probs, 2 * probs)
      >>> error.throw()  # doctest: +ELLIPSIS
      Traceback (most recent call last):
      ...
      jax...JaxRuntimeError: `target` must hold probabilities: row [0] sums to 2.0...

    References:
      [jax.experimental.checkify](https://docs.jax.dev/en/latest/debugging/checkify_guide.html)
    """
    input = check.float_array("input", input)
    target = check.float_array("target", target)
    check.broadcast_shape(input=input, target=target)
    check_rows("input", input, True)
    check_rows("target", target, check.boolean("log_target", log_target))


def check_rows(name: str, x: jax.Array, is_log: bool) -> None:
    """Raises at the first row that is no distribution."""
    if x.ndim == 0:
        raise ValueError(f"`{name}` must have an axis of outcomes, got shape ().")
    rows = x.shape[:-1]
    if math.prod(rows) == 0:
        return
    problems = _problems(x, is_log)
    bad = functools.reduce(jnp.logical_or, (bad for bad, _, _ in problems))
    first = jnp.unravel_index(jnp.argmax(bad), rows)
    kind = "log-probabilities" if is_log else "probabilities"
    where = ", ".join(f"{{i{axis}}}" for axis in range(len(rows)))
    for bad, number, what in problems:
        message = f"`{name}` must hold {kind}: row [{where}] {what}."
        values = {f"i{axis}": index for axis, index in enumerate(first)}
        values["number"] = number[first]
        if not check.is_known(x):
            from jax.experimental import checkify  # 11 ms, for the few who need it

            checkify.debug_check(~bad[first], message, **values)
        elif bad[first]:
            raise ValueError(message.format(**{k: v.item() for k, v in values.items()}))


def _problems(x, is_log):
    """For each kind of problem: the rows that have it, a number to show, and words."""
    tol = TOLERANCE[x.dtype.name]
    if jnp.finfo(x.dtype).bits < 32:
        x = x.astype(jnp.float32)
    nan = jnp.any(jnp.isnan(x), -1)
    total = jnp.sum(jnp.exp(x) if is_log else x, -1)
    if is_log:
        extreme = jnp.max(x, -1, initial=-jnp.inf)
        beyond, what = extreme > tol, "has {number}, and logarithms are at most 0"
        sums = "exponentiates to a sum of {number}"
    else:
        extreme = jnp.min(x, -1, initial=jnp.inf)
        beyond, what = extreme < 0, "has {number}, and probabilities are at least 0"
        sums = "sums to {number}"
    return (
        (nan, extreme, "has NaN"),
        (beyond, extreme, what),
        (~(jnp.abs(total - 1) <= tol), total, f"{sums}, not to 1 ± {tol:g}"),
    )
