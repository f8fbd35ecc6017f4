"""Runs the battery: every case in both frameworks, and what differs."""

import dataclasses
import importlib.metadata
import itertools
import platform
import warnings
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

from ._cases import battery, Case, DTYPES
from ._errors import has_optax, ParityError, require_torch
from ._measure import Difference, difference
from ._scale import scales


QUANTITIES = (
    *("outcome", "value", "d_input", "d_target"),
    *("d2_input", "d2_target", "d2_g"),
)


@dataclasses.dataclass(frozen=True)
class Result:
    """One compared quantity of a case: `"value"`, `"d_input"`, …, or `"outcome"`."""

    case: Case
    quantity: str
    difference: Difference

    @property
    def agrees(self) -> bool:
        return not self.difference.problem

    @property
    def group(self) -> str:
        """Of the report: gradients are apart from values."""
        gradients = ", gradients" * self.quantity.startswith("d_")
        return self.case.group + gradients


@dataclasses.dataclass(frozen=True)
class Report:
    """All results, and the versions they were had with."""

    results: tuple[Result, ...]
    versions: dict[str, str]

    @property
    def failures(self) -> tuple[Result, ...]:
        return tuple(r for r in self.results if not r.agrees)

    @property
    def agrees(self) -> bool:
        return bool(self.results) and not self.failures


def run(groups: Iterable[str] | None = None, progress: Callable = print) -> Report:
    """Compares jaxkl with the installed PyTorch, and with optax if it is installed.

    Args:
      groups: Names of the groups to run, all if None.
      progress: Called with the name of each group, and how many cases it has.

    Returns:
      A `Report`: `agrees` says whether all did, `failures` what did not.

    Raises:
      ParityError: If PyTorch is not installed, or a group is unknown.
    """
    require_torch()
    cases = battery(has_optax())
    known = list(dict.fromkeys(c.group for c in cases))
    groups = known if groups is None else list(groups)
    for group in groups:
        if group not in known:
            raise ParityError(f"no group {group!r}; there are {', '.join(known)}")
    chosen = [c for c in cases if c.group in groups]
    return run_cases(chosen, progress)


def run_cases(cases: list[Case], progress: Callable = print) -> Report:
    """`run`, of these cases."""
    results = []
    with jax.enable_x64(True), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the group of legacy arguments counts them
        for group, members in itertools.groupby(cases, key=lambda c: c.group):
            members = list(members)
            progress(f"{group}: {len(members)} cases")
            for _, together in itertools.groupby(members, key=_arrays):
                results += compare_cases(list(together))
    return Report(tuple(results), _versions())


def _versions():
    names = ["jaxkl", "jax", "jaxlib", "torch", "numpy"] + ["optax"] * has_optax()
    found = {name: importlib.metadata.version(name) for name in names}
    device = f"{jax.default_backend()}, {jax.devices()[0].device_kind}"
    return found | {"Python": platform.python_version(), "JAX device": device}


def _arrays(case):
    return case.function, case.make, case.arguments, case.dtypes, case.peer


def compare_cases(cases):
    """Of cases that differ in their options only."""
    numbers, dtypes = cases[0].numbers(), cases[0].dtypes
    every = zip(
        cases,
        _jax_results(cases, numbers),
        _peer_results(cases, numbers, dtypes),
        _peer_results(cases, numbers, _widest(dtypes)),
        strict=True,
    )
    for case, actual, expected, exact in every:
        exact = {k: v for k, v in exact.items() if not isinstance(v, str)}
        sizes = scales(case, numbers, exact) if exact else {}
        names = [q for q in QUANTITIES if q in expected]
        for name in case.quantities or names:
            found = actual.get(name, actual.get("outcome"))
            wanted = expected.get(name, expected.get("outcome"))
            if isinstance(found, str) or isinstance(wanted, str):
                found, wanted = _describe(found), _describe(wanted)
                problem = "" if found == wanted else f"{found}, expected {wanted}"
                yield Result(case, name, Difference(problem))
            else:
                found = difference(found, wanted, exact[name], *sizes[name])
                yield Result(case, name, found)


def _widest(dtypes):
    return ("float64", "float64") if set(dtypes) <= set(DTYPES) else dtypes


def _describe(result):
    return result if isinstance(result, str) else f"{result.dtype}{result.shape}"


def _jax_results(cases, numbers):
    from . import _in_jax

    f = getattr(_in_jax, f"jax_{cases[0].function}")
    return _call_jax(f, cases, numbers, cases[0].dtypes)


def _peer_results(cases, numbers, dtypes):
    if cases[0].peer == "optax":
        from ._in_optax import optax_losses

        return _call_jax(optax_losses, cases, numbers, dtypes)
    from . import _in_torch

    f = getattr(_in_torch, f"torch_{cases[0].function}")
    return [_to_numpy(f(*as_torch(numbers, dtypes), **c.options)) for c in cases]


def _call_jax(f, cases, numbers, dtypes):
    x, t, *rest = as_jax(numbers, dtypes)
    calls = [lambda x, t, o=case.options: f(x, t, *rest, **o) for case in cases]
    if cases[0].function == "call":  # it counts the warnings, of tracing too
        results = [call(x, t) for call in calls]
    else:
        try:  # all in one, as compiling is what takes time
            results = jax.jit(lambda x, t: [call(x, t) for call in calls])(x, t)
        except Exception:
            results = [_attempt(jax.jit(call), x, t) for call in calls]
    return [_to_numpy(r) for r in results]


def _attempt(f, x, t):
    try:
        return f(x, t)
    except Exception as error:
        message = str(error).strip().splitlines() or [""]
        return {"outcome": f"{type(error).__name__}: {message[0]}"}


def as_jax(numbers, dtypes):
    x, t, *rest = numbers
    return (*(jnp.asarray(n, d) for n, d in zip((x, t), dtypes, strict=True)), *rest)


def as_torch(numbers, dtypes):
    torch = require_torch()
    x, t, *rest = numbers
    tensors = (
        torch.tensor(n, dtype=getattr(torch, d))
        for n, d in zip((x, t), dtypes, strict=True)
    )
    return (*tensors, *rest)


def _to_numpy(results):
    """NumPy arrays, of the dtype that each framework gave."""
    return {name: _array(x) for name, x in results.items()}


def _array(x):
    if isinstance(x, str):
        return x
    if isinstance(x, jax.Array):
        return np.asarray(x)
    dtype = str(x.dtype).removeprefix("torch.")
    return np.asarray(x.detach().double().numpy()).astype(jnp.dtype(dtype))
