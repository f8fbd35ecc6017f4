"""Runs the battery: every case in both frameworks, and what differs."""

import dataclasses
import importlib.metadata
import itertools
import platform
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._cases import battery, Case, DTYPES, Numbers, PEERS
from ._errors import has_optax, ParityError, require_torch
from ._measure import Difference, difference, scales


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
        """The group in the report, which shows gradients apart from values."""
        gradients = ", gradients" * self.quantity.startswith("d_")
        return self.case.group + gradients


@dataclasses.dataclass(frozen=True)
class Report:
    """All results, and the versions of the frameworks that gave them."""

    results: tuple[Result, ...]
    versions: dict[str, str]

    @property
    def failures(self) -> tuple[Result, ...]:
        return tuple(r for r in self.results if not r.agrees)

    @property
    def agrees(self) -> bool:
        return bool(self.results) and not self.failures


def run(
    groups: Iterable[str] | None = None, progress: Callable[[str], object] = print
) -> Report:
    """Compares jaxkl with the installed PyTorch, and with optax if it is installed.

    Args:
      groups: Names of the groups to run; all of them if None.
      progress: Called with a line for each group: its name and its number of cases.

    Returns:
      A `Report`: `agrees` says whether all results do, `failures` holds those that
      do not.

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


def run_cases(cases: list[Case], progress: Callable[[str], object] = print) -> Report:
    """Like `run`, for these cases."""
    results = []
    with jax.enable_x64(True), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the legacy arguments count theirs
        for group, members in itertools.groupby(cases, key=lambda c: c.group):
            members = list(members)
            progress(f"{group}: {len(members)} cases")
            for _, together in itertools.groupby(members, key=_arrays):
                results += compare_cases(list(together))
    return Report(tuple(results), _versions())


def _versions() -> dict[str, str]:
    names = ["jaxkl", "jax", "jaxlib", "torch", "numpy"] + ["optax"] * has_optax()
    found = {name: importlib.metadata.version(name) for name in names}
    device = f"{jax.default_backend()}, {jax.devices()[0].device_kind}"
    return found | {"Python": platform.python_version(), "JAX device": device}


def _arrays(case: Case) -> tuple:
    return case.function, case.make, case.arguments, case.dtypes, case.peer


def compare_cases(cases: list[Case]) -> Iterator[Result]:
    """Compares cases that differ only in their options."""
    numbers, dtypes = cases[0].numbers(), cases[0].dtypes
    peer = PEERS[cases[0].peer]
    every = zip(
        cases,
        _results("jax", cases, numbers, dtypes),
        _results(peer, cases, numbers, dtypes),
        _results(peer, cases, numbers, _widest(dtypes)),
        strict=True,
    )
    for case, actual, expected, exact in every:
        exact = {k: v for k, v in exact.items() if not isinstance(v, str)}
        sizes = scales(case, numbers, exact) if exact else {}
        names = [q for q in QUANTITIES if q in expected]
        for name in case.quantities or names:
            found: Any = actual.get(name, actual.get("outcome"))
            wanted: Any = expected.get(name, expected.get("outcome"))
            if isinstance(found, str) or isinstance(wanted, str):
                found, wanted = _describe(found), _describe(wanted)
                problem = "" if found == wanted else f"{found}, expected {wanted}"
                yield Result(case, name, Difference(problem))
            else:
                found = difference(found, wanted, exact[name], *sizes[name])
                yield Result(case, name, found)


def _widest(dtypes: tuple[str, ...]) -> tuple[str, ...]:
    return ("float64", "float64") if set(dtypes) <= set(DTYPES) else dtypes


def _describe(result: Any) -> str:
    return result if isinstance(result, str) else f"{result.dtype}{result.shape}"


def _results(
    framework: str, cases: list[Case], numbers: Numbers, dtypes: tuple[str, ...]
) -> list[dict[str, Any]]:
    """What the framework gives for each case: NumPy arrays, or a string."""
    f = cases[0].function_in(framework)
    if framework == "torch":
        torch = require_torch()
        make = lambda n, d: torch.tensor(n, dtype=getattr(torch, d))
        results = [f(*_with_dtypes(make, numbers, dtypes), **c.options) for c in cases]
    else:
        x, t, *rest = _with_dtypes(jnp.asarray, numbers, dtypes)
        calls = [lambda x, t, o=case.options: f(x, t, *rest, **o) for case in cases]
        # Warnings are counted by "call", and tracing would add its own.
        trace = cases[0].function != "call"
        results = _traced(calls, x, t) if trace else [call(x, t) for call in calls]
    return [{name: _to_numpy(x) for name, x in r.items()} for r in results]


def _with_dtypes(
    make: Callable, numbers: Numbers, dtypes: tuple[str, ...]
) -> tuple[Any, ...]:
    x, t, *rest = numbers
    return (*(make(n, d) for n, d in zip((x, t), dtypes, strict=True)), *rest)


def _traced(calls: list[Callable], x: jax.Array, t: jax.Array) -> list[dict[str, Any]]:
    try:  # all in one program, because compiling takes the time
        return jax.jit(lambda x, t: [call(x, t) for call in calls])(x, t)
    except Exception:
        return [_attempt(jax.jit(call), x, t) for call in calls]


def _attempt(f: Callable, x: jax.Array, t: jax.Array) -> dict[str, Any]:
    try:
        return f(x, t)
    except Exception as error:
        message = str(error).strip().splitlines() or [""]
        return {"outcome": f"{type(error).__name__}: {message[0]}"}


def _to_numpy(x: Any) -> Any:
    """A NumPy array of the dtype that the framework gave; strings stay as they are."""
    if isinstance(x, str):
        return x
    if isinstance(x, jax.Array):
        return np.asarray(x)
    dtype = str(x.dtype).removeprefix("torch.")
    return np.asarray(x.detach().double().numpy()).astype(jnp.dtype(dtype))
