"""Reads a user's arrays. Nothing is unpickled, and sizes are checked before reading.

A `.npz`, `.safetensors` or `.pt` file holds `input`, `target` and what was recorded;
two `.npy` files are an input and its target.
"""

import dataclasses
import json
import math
import os
import pathlib
import struct
import zipfile
from collections.abc import Iterable
from typing import Any, IO

import jax.numpy as jnp
import numpy as np

from ._cases import DTYPES
from ._errors import must, ParityError, require_torch


NAMES = (
    *("input", "target", "loss", "grad_input", "grad_target"),
    *("mask", "temperature"),
    *("student", "teacher", "grad_student", "grad_teacher"),
)
MAX_BYTES = 2 * 2**30
Arrays = dict[str, np.ndarray]
_SAFETENSORS = dict(F64="float64", F32="float32", F16="float16", BF16="bfloat16")
_SAFETENSORS |= dict(BOOL="bool", U8="uint8", I8="int8", I32="int32", I64="int64")


@dataclasses.dataclass(frozen=True)
class Recording:
    """The arrays of one file, of any of the `NAMES`."""

    path: str
    arrays: Arrays


def read(
    paths: Iterable[str | os.PathLike[str]], max_bytes: int = MAX_BYTES
) -> list[Recording]:
    """Reads each file; every two `.npy` files are taken as an input and its target.

    Raises:
      ParityError: If a file is missing, damaged, pickled, too large, or not understood.
    """
    recordings, singles = [], []
    for path in map(pathlib.Path, paths):
        try:
            must(path.suffix in _READERS, f"not one of {', '.join(_READERS)}")
            must(not path.is_dir(), "it is a directory")
            must(path.is_file(), "no such file")
            arrays = _READERS[path.suffix](path, max_bytes)
            where = str(path)
            if path.suffix == ".npy":
                singles.append((path, arrays["array"]))
                if len(singles) % 2:
                    continue
                (x, first), (t, second) = singles[-2:]
                where, arrays = f"{x}, {t}", {"input": first, "target": second}
            _check(arrays)
            recordings.append(Recording(where, arrays))
        except ParityError as error:
            raise ParityError(f"{path}: {error}") from None
        except MemoryError:
            raise ParityError(f"{path}: does not fit into memory") from None
        except Exception as error:  # a parser may raise anything on a damaged file
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ParityError(f"{path}: damaged: {reason}") from error
    pairs = ".npy files come in pairs, an input and its target"
    must(len(singles) % 2 == 0, f"{singles and singles[-1][0]}: {pairs}")
    return recordings


def _check(arrays: Arrays) -> None:
    of_models = "student" in arrays or "teacher" in arrays
    must(
        not of_models or arrays.keys().isdisjoint(("input", "target")),
        "holds `input` or `target` beside `student` or `teacher`: keep the "
        "log-probabilities of kl_div, or the logits of distillation_loss",
    )
    x, t = ("student", "teacher") if of_models else ("input", "target")
    for name in (x, t):
        must(name in arrays, f"no array `{name}`; `{x}` and `{t}` are needed")
    for name, array in arrays.items():
        if name == "mask":
            must(bool(np.isin(array, (0, 1)).all()), "`mask` must be bool, or 0 and 1")
        elif name == "temperature":
            numbers = array.dtype.kind in "fiu" or array.dtype.name in DTYPES
            must(array.size == 1 and numbers, "`temperature` must be one real number")
            check_temperature(float(array.item()))
        else:
            hint = "; bfloat16 needs .safetensors or .pt" * (array.dtype.kind == "V")
            says = f"`{name}` must be floating-point, it is {array.dtype}{hint}"
            must(array.dtype.name in DTYPES, says)


def check_temperature(temperature: float) -> None:
    """T² must be a number too, because the loss is multiplied by it."""
    must(
        temperature > 0 and 0 < temperature * temperature < math.inf,
        "`temperature` must be positive and finite, and its square too, "
        f"got {temperature:g}",
    )


def _check_size(size: int, max_bytes: int) -> None:
    says = f"{size:,} bytes of arrays, more than --max-bytes {max_bytes:,}"
    must(size <= max_bytes, says)


def _read_npz(path: pathlib.Path, max_bytes: int) -> Arrays:
    with zipfile.ZipFile(path) as archive:
        present = {*archive.namelist()}
        names = [name for name in NAMES if f"{name}.npy" in present]
        members = [archive.getinfo(f"{name}.npy") for name in names]
        # The unpacked arrays are what counts: a zip file can be much smaller.
        _check_size(sum(m.file_size for m in members), max_bytes)
        arrays = {}
        for name, member in zip(names, members, strict=True):
            with archive.open(member) as file:
                arrays[name] = _read_array(name, file, member.file_size)
        return arrays


def _read_npy(path: pathlib.Path, max_bytes: int) -> Arrays:
    size = path.stat().st_size
    _check_size(size, max_bytes)
    with open(path, "rb") as file:
        return {"array": _read_array("array", file, size)}


def _read_array(name: str, file: IO[bytes], size: int) -> np.ndarray:
    """Reads NumPy's format, whose header must not promise more than `size` bytes."""
    read_header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }[np.lib.format.read_magic(file)]
    shape, fortran, dtype = read_header(file)
    objects = f"`{name}` holds Python objects, which are not loaded"
    must(not dtype.hasobject, objects)
    wanted = math.prod(shape) * dtype.itemsize
    data = file.read(wanted) if wanted <= size else b""
    must(len(data) == wanted, f"truncated: `{name}` needs {wanted:,} bytes")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")


def _read_safetensors(path: pathlib.Path, max_bytes: int) -> Arrays:
    size, arrays = path.stat().st_size, {}
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        start = 8 + length
        must(start <= size, f"truncated: a header of {length:,} bytes")
        _check_size(length, max_bytes)
        entries = json.loads(file.read(length))
        found = {name: entries[name] for name in NAMES if name in entries}
        spans = {name: entry["data_offsets"] for name, entry in found.items()}
        for name, (begin, end) in spans.items():
            inside = 0 <= begin <= end <= size - start
            must(inside, f"truncated: `{name}` ends at {end:,}")
        _check_size(sum(end - begin for begin, end in spans.values()), max_bytes)
        for name, entry in found.items():
            (begin, end), shape = spans[name], entry["shape"]
            known = entry["dtype"] in _SAFETENSORS
            must(known, f"`{name}` has the dtype {entry['dtype']}")
            file.seek(start + begin)
            dtype = jnp.dtype(_SAFETENSORS[entry["dtype"]])
            data = np.frombuffer(file.read(end - begin), dtype)
            fits = math.prod(shape) == data.size and min(shape, default=0) >= 0
            must(fits, f"`{name}` has {data.nbytes} bytes for shape {shape}")
            arrays[name] = data.reshape(shape)
    return arrays


def _read_torch(path: pathlib.Path, max_bytes: int) -> Arrays:
    torch = require_torch()
    with zipfile.ZipFile(path) as archive:  # as PyTorch 1.6 and later write it
        size = sum(member.file_size for member in archive.infolist())
    _check_size(size, max_bytes)
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        says = "holds pickled objects beside tensors, which are not loaded"
        must("weights" not in str(error).lower(), says)
        raise
    says = f"must hold a dict of tensors, not a {type(content).__name__}"
    must(isinstance(content, dict), says)
    return {n: _from_tensor(n, content[n], size) for n in NAMES if n in content}


def _from_tensor(name: str, x: Any, size: int) -> np.ndarray:
    torch = require_torch()
    if isinstance(x, int | float):
        return np.asarray(float(x))
    dense = isinstance(x, torch.Tensor) and x.layout == torch.strided
    says = f"`{name}` must be a dense tensor, not {type(x).__name__}"
    must(dense and not x.is_quantized, says)
    # A tensor can claim more than the file holds, if it repeats or overruns its data.
    claimed = max(x.untyped_storage().nbytes(), x.numel() * x.element_size())
    must(claimed <= size, f"`{name}` is larger than the file")
    x = x.detach()
    if x.dtype == torch.bfloat16:
        return x.float().numpy().astype(jnp.bfloat16)
    return x.numpy()


_READERS = {
    ".npz": _read_npz,
    ".safetensors": _read_safetensors,
    ".pt": _read_torch,
    ".pth": _read_torch,
    ".npy": _read_npy,
}
