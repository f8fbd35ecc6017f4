"""How large the terms are that each compared number is the sum of.

Rounding is proportional to the terms, not to their sum: `t log t - t x` may cancel, in
PyTorch as here.
"""

import numpy as np


def scales(case, numbers, results) -> dict[str, tuple[np.ndarray, int]]:
    """For each of the float64 `results`: size of its terms, and how many it adds up."""
    with np.errstate(all="ignore"):
        if case.function == "losses":
            return _losses(case.options["name"], numbers, results)
        return _kl_div(case, numbers, results)


def _kl_div(case, numbers, results):
    log_target = case.options.get("log_target", False)
    x, t = np.broadcast_arrays(*numbers[:2])
    value = _value(x, t, log_target)
    if case.function == "call":
        # At most: the other reductions divide.
        sums = results["value"].ndim == 0
        return {"value": _total(value) if sums else (value, 1)}

    reduction = case.options["reduction"]
    divisor = {
        "mean": value.size,
        "batchmean": numbers[0].shape[0] if numbers[0].ndim else 1,
    }.get(reduction, 1)
    shape = value.shape if reduction == "none" else ()
    g = np.abs(np.resize(numbers[2], shape)) / divisor
    to_input, to_target = (n.shape for n in numbers[:2])

    def of(shape, terms):
        return _sum_to(shape, np.broadcast_to(terms, value.shape))

    d_input, d_target = _gradients(x, t, log_target)
    if case.function == "gradients":
        return {
            "value": of(shape, value / divisor),
            "d_input": of(to_input, g * d_input),
            "d_target": of(to_target, g * d_target),
        }
    c_x, c_t = (np.abs(c) for c in numbers[3:])
    mixed, pure = _second(x, t, log_target)
    return {
        "d2_input": of(to_input, g * c_t * mixed),
        "d2_target": of(to_target, g * (c_x * mixed + c_t * pure)),
        "d2_g": of(shape, (c_x * d_input + c_t * d_target) / divisor),
    }


def _value(x, t, log_target):
    if log_target:
        return np.exp(t) * (np.abs(t) + np.abs(x))
    return np.abs(t) * (_log(t) + np.abs(x))


def _gradients(x, t, log_target):
    if log_target:
        return np.exp(t), np.exp(t) * (np.abs(t) + np.abs(x) + 1)
    return np.abs(t), _log(t) + np.abs(x) + 1


def _second(x, t, log_target):
    if log_target:
        return np.exp(t), np.exp(t) * (np.abs(t) + np.abs(x) + 2)
    return np.ones_like(t), 1 / np.abs(t)


def _log(t):
    return np.abs(np.log(np.where(t > 0, t, 1.0)))


def _losses(name, numbers, results):
    x, t = numbers[:2]
    log_target = name == "kl_divergence_with_log_targets"
    value, (d_input, d_target) = _value(x, t, log_target), _gradients(x, t, log_target)
    if name == "generalized_kl_divergence":
        value, d_input = value + np.exp(x) + t, d_input + np.exp(x)
    g = np.max(np.abs(numbers[2]))
    shape = results["value"].shape
    terms, count = _total(value) if shape == () else (np.sum(value, -1), x.shape[-1])
    return {
        "value": (np.resize(np.max(terms, initial=0), shape), count),
        "d_input": (g * d_input, 1),
        "d_target": (g * d_target, 1),
    }


def _total(terms):
    return np.sum(terms), max(terms.size, 1)


def _sum_to(shape, terms):
    """The transpose of broadcasting `shape`, and the number of terms in each sum."""
    count = max(terms.size // max(int(np.prod(shape)), 1), 1)
    extra = tuple(range(terms.ndim - len(shape)))
    terms = np.sum(terms, axis=extra)
    kept = tuple(i for i, n in enumerate(shape) if n == 1 != terms.shape[i])
    return np.sum(terms, axis=kept, keepdims=True), count
