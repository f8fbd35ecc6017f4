"""A program that reproduces one case, in both frameworks."""

import inspect
import re
from collections.abc import Callable

from . import _data
from ._cases import Case, PEERS
from ._run import Result


def snippet(result: Result) -> str:
    """A self-contained program, which prints what jaxkl and its peer give."""
    case = result.case
    peer = PEERS[case.peer]
    ours, theirs = (case.function_in(framework) for framework in ("jax", peer))
    body = f"""
numbers = {case.make.__name__}{_tuple(case.arguments)}
dtypes = {case.dtypes}
options = {case.options}
x, t = (rounded(n, d) for n, d in zip(numbers, dtypes))
arrays = [jnp.asarray(n, d) for n, d in zip((x, t), dtypes)]
{_arrays(peer, "theirs", "dtypes")}
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    actual = {ours.__name__}(*arrays, *numbers[2:], **options)
    expected = {theirs.__name__}(*theirs, *numbers[2:], **options)
name, index = {result.quantity!r}, {result.difference.index}
show("jaxkl", actual)
show("{case.peer}", expected)
"""
    if result.difference.expected is not None:
        body += _in_float64(case, peer, theirs)
    parts = [_imports(peer), *map(inspect.getsource, _used(case)), _SHOW]
    parts += [inspect.getsource(ours), inspect.getsource(theirs), body.lstrip("\n")]
    return "\n\n".join(part.rstrip("\n") + "\n" for part in parts)


def _arrays(peer: str, name: str, dtypes: str) -> str:
    make = {
        "torch": "torch.tensor(n, dtype=getattr(torch, d))",
        "optax": "jnp.asarray(n, d)",
    }
    return f"{name} = [{make[peer]} for n, d in zip((x, t), {dtypes})]"


_SHOW = """
def show(framework, results):
    result = results.get(name, results.get("outcome"))
    if not isinstance(result, str):
        dtype, shape = str(result.dtype).removeprefix("torch."), tuple(result.shape)
        number = "" if index is None else result[index].item()
        result = f"{name}{list(index or ())} = {number}, {dtype} {shape}"
    print(f"{framework}: {result}")
""".lstrip("\n")


def _in_float64(case: Case, peer: str, theirs: Callable) -> str:
    arrays = _arrays(peer, "wide", '["float64"] * 2')
    return f"""
{arrays}
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    exact = {theirs.__name__}(*wide, *numbers[2:], **options)
show("{case.peer} in float64", exact)
"""


def _imports(peer: str) -> str:
    return f"""import itertools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import {peer}
from numpy import inf, nan

import jaxkl
import jaxkl.losses

jax.config.update("jax_enable_x64", True)
"""


def _used(case: Case) -> list[Callable]:
    """The functions of `_data` that make the case's numbers, callees first."""
    made = inspect.getsource(case.make)
    used = [
        f
        for name, f in inspect.getmembers(_data, inspect.isfunction)
        if f is not case.make and re.search(rf"\b{name}\(", made)
    ]
    return [_data.rounded, *used, case.make]


def _tuple(arguments: tuple) -> str:
    return f"({', '.join(map(repr, arguments))})"
