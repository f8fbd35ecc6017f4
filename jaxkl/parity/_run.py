"""Runs the battery: every case in both frameworks, and what differs."""

import dataclasses
import importlib.metadata
import importlib.util
import itertools
import platform
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._calls import call_in, FIRST, SECOND
from ._cases import battery, Case, DTYPES, Numbers
from ._errors import ParityError, require_torch
from ._measure import Difference, difference, scales


@dataclasses.dataclass(frozen=True)
class Result:
    """One compared quantity of a case: `"value"`, `"d_input"`, …, or `"outcome"`."""

    case: Case
    quantity: str
    difference: Difference

    @property
    def agrees(self) -> bool:
        return not self.difference.problem


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
      ParityError: If PyTorch is not installed, or one of `groups` is unknown.
    """
    require_torch()
    cases = battery(_has_optax())
    known = list(dict.fromkeys(c.group for c in cases))
    groups = known if groups is None else list(groups)
    for group in groups:
        if group not in known:
            raise ParityError(f"no group {group!r}; there are {', '.join(known)}")
    return run_cases([c for c in cases if c.group in groups], progress)


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


def _has_optax() -> bool:
    return importlib.util.find_spec("optax") is not None


def _versions() -> dict[str, str]:
    names = ["jaxkl", "jax", "jaxlib", "torch", "numpy"] + ["optax"] * _has_optax()
    found = {name: importlib.metadata.version(name) for name in names}
    device = f"{jax.default_backend()}, {jax.devices()[0].device_kind}"
    return found | {"Python": platform.python_version(), "JAX device": device}


def _arrays(case: Case) -> tuple:
    return case.kind, case.make, case.arguments, case.dtypes, case.peer


def compare_cases(cases: list[Case]) -> Iterator[Result]:
    """Compares cases that differ only in their functions and options."""
    numbers, dtypes, peer = cases[0].numbers(), cases[0].dtypes, cases[0].peer
    widest = ("float64", "float64") if set(dtypes) <= set(DTYPES) else dtypes
    every = zip(
        cases,
        _results("jaxkl", cases, numbers, dtypes),
        _results(peer, cases, numbers, dtypes),
        _results(peer, cases, numbers, widest),
        strict=True,
    )
    for case, actual, expected, exact in every:
        exact = {k: v for k, v in exact.items() if not isinstance(v, str)}
        sizes = scales(case, numbers, exact) if exact else {}
        names = [q for q in ("outcome", *FIRST, *SECOND) if q in expected]
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


def _describe(result: Any) -> str:
    return result if isinstance(result, str) else f"{result.dtype}{result.shape}"


def _results(
    library: str, cases: list[Case], numbers: Numbers, dtypes: tuple[str, ...]
) -> list[dict[str, Any]]:
    """What the library gives for each case: NumPy arrays, or a string."""
    pairs, rest = list(zip(numbers, dtypes, strict=False)), numbers[2:]
    errors: dict[int, dict[str, Any]] = {}

    def program(*arrays: Any) -> list[dict[str, Any]]:
        found = []
        for i, case in enumerate(cases):
            call = call_in(library, case.kind, case.function)
            try:
                found.append(call(*arrays, *rest, **case.options))
            except Exception as error:
                if library != "jaxkl":
                    raise  # A fault of the battery, which must not pass for a result.
                found.append({})
                errors[i] = {"outcome": f"{type(error).__name__}: {error}"}
        return found

    if library == "torch":
        torch = require_torch()
        arrays = [torch.tensor(n, dtype=getattr(torch, d)) for n, d in pairs]
    else:
        arrays = [jnp.asarray(n, d) for n, d in pairs]
        # All in one program, because compiling takes the time. But tracing would add
        # warnings to those that "outcome" counts.
        program = program if cases[0].kind == "outcome" else jax.jit(program)
    results = [r | errors.get(i, {}) for i, r in enumerate(program(*arrays))]
    return [{name: _to_numpy(x) for name, x in r.items()} for r in results]


def _to_numpy(x: Any) -> Any:
    """A NumPy array of the dtype that the framework gave; strings stay as they are."""
    if isinstance(x, str):
        return x
    if isinstance(x, jax.Array):
        return np.asarray(x)
    dtype = str(x.dtype).removeprefix("torch.")
    return np.asarray(x.detach().double().numpy()).astype(jnp.dtype(dtype))
