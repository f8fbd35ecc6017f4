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
from collections.abc import Callable, Iterable
from typing import Any, IO

import jax.numpy as jnp
import numpy as np

from ._errors import ParityError, require_torch


NAMES = (
    *("input", "target", "loss", "grad_input", "grad_target"),
    *("mask", "temperature"),
    *("student", "teacher", "grad_student", "grad_teacher"),
)
SUFFIXES = ".npz", ".safetensors", ".pt", ".pth", ".npy"
MAX_BYTES = 2 * 2**30
Arrays = dict[str, np.ndarray]
_SAFETENSORS = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "I32": "int32",
    "I64": "int64",
}


@dataclasses.dataclass(frozen=True)
class Recording:
    """The arrays of one file, or of a pair of files, by their names in `NAMES`."""

    path: str
    arrays: Arrays


def read(
    paths: Iterable[str | os.PathLike[str]], max_bytes: int = MAX_BYTES
) -> list[Recording]:
    """Reads all files; two `.npy` files are taken as an input and its target.

    Raises:
      ParityError: If a file is missing, damaged, pickled, too large, or not understood.
    """
    recordings, singles = [], []
    for path in map(pathlib.Path, paths):
        if path.is_dir():
            raise ParityError(f"{path}: it is a directory, not a file")
        if path.suffix not in SUFFIXES:
            raise ParityError(f"{path}: not one of {', '.join(SUFFIXES)}")
        if not path.is_file():
            raise ParityError(f"{path}: no such file")
        if path.suffix == ".npy":
            singles.append(path)
            continue
        arrays = _guarded(_READERS[path.suffix], path, max_bytes)
        recordings.append(Recording(str(path), _checked(path, arrays)))
    if len(singles) % 2:
        raise ParityError(
            f"{singles[-1]}: .npy files come in pairs, an input and its target"
        )
    for x, t in zip(singles[::2], singles[1::2], strict=True):
        arrays = {
            "input": _guarded(_read_npy, x, max_bytes),
            "target": _guarded(_read_npy, t, max_bytes),
        }
        recordings.append(Recording(f"{x}, {t}", _checked(x, arrays)))
    return recordings


def _guarded(
    reader: Callable[[pathlib.Path, int], Any], path: pathlib.Path, max_bytes: int
) -> Any:
    try:
        return reader(path, max_bytes)
    except ParityError:
        raise
    except MemoryError:
        raise ParityError(f"{path}: does not fit into memory") from None
    except Exception as error:  # a parser may raise anything on a damaged file
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ParityError(f"{path}: damaged, or not what it says: {reason}") from error


def _checked(path: pathlib.Path, arrays: Arrays) -> Arrays:
    has_models = not arrays.keys().isdisjoint(("student", "teacher"))
    if has_models and not arrays.keys().isdisjoint(("input", "target")):
        raise ParityError(
            f"{path}: holds `input` or `target` beside `student` or `teacher`: keep "
            "the log-probabilities of kl_div, or the logits of distillation_loss"
        )
    kind = ("student", "teacher") if has_models else ("input", "target")
    for name in kind:
        if name not in arrays:
            optional = (n for n in NAMES[2:7] if "grad" not in n)
            gradients = (f"grad_{n}" for n in kind)
            raise ParityError(
                f"{path}: no array `{name}`; needed: `{kind[0]}`, `{kind[1]}`; "
                f"optional: {', '.join(f'`{n}`' for n in (*optional, *gradients))}"
            )
    for name, array in arrays.items():
        if name == "mask":
            if not np.isin(array, (0, 1)).all():
                raise ParityError(f"{path}: `mask` must be bool, or 0 and 1")
        elif name == "temperature":
            if array.size != 1 or np.iscomplexobj(array):
                raise ParityError(f"{path}: `temperature` must be one real number")
            check_temperature(float(array.item()), f"{path}: ")
        elif array.dtype.name not in ("float16", "bfloat16", "float32", "float64"):
            raise ParityError(
                f"{path}: `{name}` must be floating-point, it is {array.dtype}"
            )
    return arrays


def check_temperature(temperature: float, where: str = "") -> None:
    """T² must be a number too, because the loss is multiplied by it."""
    if not (temperature > 0 and 0 < temperature * temperature < math.inf):
        raise ParityError(
            f"{where}`temperature` must be positive and finite, and its square too, "
            f"got {temperature:g}"
        )


def _check_size(path: pathlib.Path, size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise ParityError(
            f"{path}: {size:,} bytes of arrays, more than --max-bytes {max_bytes:,}"
        )


def _read_npz(path: pathlib.Path, max_bytes: int) -> Arrays:
    with zipfile.ZipFile(path) as archive:
        present = archive.namelist()
        files = [f"{name}.npy" for name in NAMES if f"{name}.npy" in present]
        members = [archive.getinfo(file) for file in files]
        # The unpacked arrays are what counts: a zip file can be much smaller.
        _check_size(path, sum(m.file_size for m in members), max_bytes)
        arrays = {}
        for member in members:
            with archive.open(member) as file:
                name = member.filename.removesuffix(".npy")
                arrays[name] = _read_array(path, f"`{name}`", file, member.file_size)
        return arrays


def _read_npy(path: pathlib.Path, max_bytes: int) -> np.ndarray:
    size = path.stat().st_size
    _check_size(path, size, max_bytes)
    with open(path, "rb") as file:
        return _read_array(path, "it", file, size)


def _read_array(
    path: pathlib.Path, name: str, file: IO[bytes], size: int
) -> np.ndarray:
    """Reads NumPy's format, whose header must not promise more than `size` bytes."""
    version = np.lib.format.read_magic(file)
    read_header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if read_header is None:
        raise ParityError(f"{path}: unknown version {version} of NumPy's format")
    shape, fortran, dtype = read_header(file)
    if dtype.kind not in "fbiu":
        raise ParityError(f"{path}: {name} holds {_no_numbers(dtype)}")
    wanted = math.prod(shape) * dtype.itemsize
    if wanted > size:
        raise ParityError(f"{path}: truncated: {size:,} bytes of {wanted:,}")
    data = file.read(wanted)
    if len(data) != wanted:
        raise ParityError(f"{path}: truncated: {len(data):,} bytes of {wanted:,}")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")


def _no_numbers(dtype: np.dtype) -> str:
    if dtype.hasobject:
        return f"Python objects ({dtype}), which are pickled and not loaded"
    if dtype.kind in "SU":
        return f"strings ({dtype}), not numbers"
    if dtype.kind == "V":
        return f"{dtype}; bfloat16 needs .safetensors or .pt"
    return f"{dtype}, not real numbers"


def _read_safetensors(path: pathlib.Path, max_bytes: int) -> Arrays:
    size = path.stat().st_size
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > size - 8:
            raise ParityError(f"{path}: truncated: a header of {length:,} bytes")
        _check_size(path, length, max_bytes)
        entries = json.loads(file.read(length))
        found = {name: entries[name] for name in NAMES if name in entries}
        start = 8 + length
        spans = [_span(path, n, entry, size - start) for n, entry in found.items()]
        _check_size(path, sum(end - begin for begin, end, _ in spans), max_bytes)
        arrays = {}
        for name, (begin, end, dtype) in zip(found, spans, strict=True):
            file.seek(start + begin)
            data = np.frombuffer(file.read(end - begin), dtype)
            arrays[name] = data.reshape(found[name]["shape"])
        return arrays


def _span(
    path: pathlib.Path, name: str, entry: dict[str, Any], size: int
) -> tuple[int, int, np.dtype]:
    (begin, end), shape = entry["data_offsets"], entry["shape"]
    if entry["dtype"] not in _SAFETENSORS:
        raise ParityError(f"{path}: `{name}` has the dtype {entry['dtype']}")
    dtype = jnp.dtype(_SAFETENSORS[entry["dtype"]])
    if not 0 <= begin <= end <= size:
        raise ParityError(f"{path}: truncated: `{name}` ends at {end:,} of {size:,}")
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != end - begin:
        raise ParityError(f"{path}: `{name}` has {end - begin} bytes for shape {shape}")
    return begin, end, dtype


def _read_torch(path: pathlib.Path, max_bytes: int) -> Arrays:
    torch = require_torch()
    if not zipfile.is_zipfile(path):
        raise ParityError(
            f"{path}: truncated, or not written by torch.save of PyTorch 1.6 or later"
        )
    with zipfile.ZipFile(path) as archive:
        size = sum(member.file_size for member in archive.infolist())
    _check_size(path, size, max_bytes)
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        if "weights" in str(error).lower():
            raise ParityError(
                f"{path}: holds pickled objects beside tensors, which are not loaded"
            ) from None
        raise
    if not isinstance(content, dict):
        raise ParityError(
            f"{path}: must hold a dict of tensors, not a {type(content).__name__}"
        )
    found = {name: content[name] for name in NAMES if name in content}
    return {name: _from_tensor(path, name, x, size) for name, x in found.items()}


def _from_tensor(path: pathlib.Path, name: str, x: Any, size: int) -> np.ndarray:
    torch = require_torch()
    if isinstance(x, int | float):
        return np.asarray(float(x))
    if not isinstance(x, torch.Tensor):
        raise ParityError(
            f"{path}: `{name}` must be a dense tensor, not a {type(x).__name__}"
        )
    if x.layout != torch.strided or x.is_quantized:
        raise ParityError(f"{path}: `{name}` must be a dense tensor")
    # A tensor can claim more than the file holds, if it repeats or overruns its data.
    if max(x.untyped_storage().nbytes(), x.numel() * x.element_size()) > size:
        raise ParityError(f"{path}: `{name}` is larger than the file")
    dtype = str(x.dtype).removeprefix("torch.")
    x = x.detach()
    if dtype == "bfloat16":
        return x.float().numpy().astype(jnp.bfloat16)
    return x.numpy()


_READERS = {
    ".npz": _read_npz,
    ".safetensors": _read_safetensors,
    ".pt": _read_torch,
    ".pth": _read_torch,
}
