"""A program that reproduces one case, in both frameworks."""

import importlib
import inspect
import re
import warnings

from . import _data


def snippet(result) -> str:
    """Self-contained Python: it prints what jaxkl and its peer give."""
    case = result.case
    peer = {"PyTorch": "torch", "optax": "optax"}[case.peer]
    ours, theirs = (_function(name, case.function) for name in ("jax", peer))
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


def _arrays(peer, name, dtypes):
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


def _in_float64(case, peer, theirs):
    arrays = _arrays(peer, "wide", '["float64"] * 2')
    return f"""
{arrays}
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    exact = {theirs.__name__}(*wide, *numbers[2:], **options)
show("{case.peer} in float64", exact)
"""


def _imports(peer):
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


def _function(framework, name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = importlib.import_module(f"{__package__}._in_{framework}")
    return getattr(module, f"{framework}_{name}")


def _used(case):
    """The functions of `_data` that make the case's numbers, callees first."""
    made = inspect.getsource(case.make)
    used = [
        f
        for name, f in inspect.getmembers(_data, inspect.isfunction)
        if f is not case.make and re.search(rf"\b{name}\(", made)
    ]
    return [_data.rounded, *used, case.make]


def _tuple(arguments):
    return f"({', '.join(map(repr, arguments))})"
