"""Files for `jaxkl parity compare`: formats, and what must be refused."""

import io
import json
import os
import pickle
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest
import torch

from jaxkl.parity import ParityError, read


X = np.log(np.array([[0.5, 0.5], [0.25, 0.75]], np.float32))
T = np.array([[1.0, 0.0], [0.2, 0.8]], np.float32)
ARRAYS = {"input": X, "target": T}
TENSORS = {"input": torch.tensor(X), "target": torch.tensor(T)}
SUFFIXES = ["npz", "npy", "safetensors", "pt"]


def safetensors(header, data=b""):
    header = json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + data


def write_safetensors(path, arrays):
    names = {"float32": "F32", "bfloat16": "BF16"}
    header, data = {"__metadata__": {"by": "hand"}}, b""
    for name, x in arrays.items():
        span = [len(data), len(data) + x.nbytes]
        kind = names[x.dtype.name]
        header[name] = dict(dtype=kind, shape=list(x.shape), data_offsets=span)
        data += x.tobytes()
    path.write_bytes(safetensors(header, data))


def good(suffix, folder):
    """The paths of files with `ARRAYS`."""
    paths = [folder / f"good.{suffix}"]
    if suffix == "npz":
        np.savez_compressed(paths[0], **ARRAYS, loss=0.5, other=[object()])
    elif suffix == "npy":
        paths.append(folder / "target.npy")
        np.save(paths[0], np.asfortranarray(X))
        np.save(paths[1], T)
    elif suffix == "safetensors":
        write_safetensors(paths[0], ARRAYS)
    else:
        column_major = TENSORS["input"].t().contiguous().t()
        differentiated = TENSORS["target"].clone().requires_grad_()
        tensors = {"input": column_major, "target": differentiated, "loss": 0.5}
        torch.save(tensors, paths[0])
    return paths


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_formats(tmp_path, suffix):
    paths = good(suffix, tmp_path)
    (recording,) = read(paths)
    for name, x in ARRAYS.items():
        np.testing.assert_array_equal(recording.arrays[name], x)
        assert recording.arrays[name].dtype == np.float32
    assert recording.arrays.keys() - ARRAYS in (set(), {"loss"})
    with pytest.raises(ParityError, match="--max-bytes 10$"):
        read(paths, max_bytes=10)

    # Cut off anywhere, or with other contents.
    content = paths[0].read_bytes()
    cut = [content[:n] for n in range(0, len(content), max(len(content) // 40, 1))]
    rng = np.random.default_rng(0)
    for damaged in [*cut, *(rng.bytes(n) for n in (1, 8, 100, 10_000))]:
        paths[0].write_bytes(damaged)
        with pytest.raises(ParityError, match=paths[0].name):
            read(paths)


def test_bfloat16(tmp_path):
    x = X.astype(ml_dtypes.bfloat16)
    write_safetensors(tmp_path / "a.safetensors", ARRAYS | {"input": x})
    torch.save(TENSORS | {"input": torch.tensor(X).bfloat16()}, tmp_path / "a.pt")
    for r in read([tmp_path / "a.safetensors", tmp_path / "a.pt"]):
        assert r.arrays["input"].dtype == x.dtype
        np.testing.assert_array_equal(r.arrays["input"], x)


class Bomb:
    """Leaves a trace if it is ever unpickled."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("plain", [True, False])
def test_no_code_is_run(tmp_path, suffix, plain):
    path, bomb = tmp_path / f"a.{suffix}", Bomb(tmp_path / "trace")
    if plain or suffix == "safetensors":
        path.write_bytes(pickle.dumps({"input": bomb}))
    elif suffix == "npz":
        np.savez(path, input=np.array([bomb], object), target=T)
    elif suffix == "npy":
        np.save(path, np.array([bomb], object), allow_pickle=True)
    else:
        torch.save(TENSORS | {"target": bomb}, path)
    with pytest.raises(ParityError):
        read([path, path] if suffix == "npy" else [path])
    assert not bomb.trace.exists()


HUGE = (1 << 20, 1 << 20)


def test_a_header_cannot_claim_more_than_the_file(tmp_path):
    file = io.BytesIO()
    header = dict(descr="<f4", fortran_order=False, shape=HUGE)
    np.lib.format.write_array_header_1_0(file, header)
    npy, npz = tmp_path / "a.npy", tmp_path / "a.npz"
    npy.write_bytes(file.getvalue())
    with zipfile.ZipFile(npz, "w") as archive:
        archive.writestr("input.npy", file.getvalue())
        archive.writestr("target.npy", file.getvalue())
    for paths in ([npy, npy], [npz]):
        with pytest.raises(ParityError, match="truncated"):
            read(paths)
    entry = dict(dtype="F32", shape=HUGE, data_offsets=[0, 1 << 42])
    short = entry | dict(data_offsets=[0, 4])
    path = tmp_path / "a.safetensors"
    for content, says in [
        (safetensors({"input": entry, "target": entry}), "truncated"),
        (struct.pack("<Q", 1 << 60), "truncated"),
        (safetensors({"input": short, "target": short}, bytes(4)), "4 bytes for shape"),
    ]:
        path.write_bytes(content)
        with pytest.raises(ParityError, match=says):
            read([path])


def test_zip_bombs(tmp_path):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, input=np.zeros(1 << 22), target=np.zeros(4))
    assert path.stat().st_size < 1 << 17
    with pytest.raises(ParityError, match="33,554,.* more than --max-bytes 1,048,576"):
        read([path], max_bytes=1 << 20)
    # One that lies about its size.
    size, lie = struct.pack("<I", (1 << 25) + 128), struct.pack("<I", 200)
    path.write_bytes(path.read_bytes().replace(size, lie))
    with pytest.raises(ParityError):
        read([path], max_bytes=1 << 20)


@pytest.mark.parametrize(
    "arrays, says",
    [
        (dict(target=None), "no array `target`; `input` and `target` are needed"),
        (dict(student=X), "beside `student` or `teacher`"),
        (dict(target=T.astype(int)), "`target` must be floating-point, it is int64"),
        (dict(mask=[2, 0]), "`mask` must be bool"),
        (dict(temperature=-1.0), "`temperature` must be positive"),
        (dict(temperature=[1.0, 2.0]), "must be one real number"),
        (dict(temperature="1"), "must be one real number"),
        (dict(input=X.astype(str)), "`input` must be floating-point, it is <U32"),
        (dict(input=X.astype(object)), "`input` holds Python objects"),
        (dict(input=X.astype("V4")), r"it is \|V4; bfloat16 needs"),
        (dict(input=X + 0j), "`input` must be floating-point, it is complex64"),
    ],
)
def test_contents(tmp_path, arrays, says):
    arrays = {k: v for k, v in (ARRAYS | arrays).items() if v is not None}
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ParityError, match=f"a.npz: .*{says}"):
        read([tmp_path / "a.npz"])


VIEW = torch.ones(1).expand(*HUGE)  # repeats one number


@pytest.mark.parametrize(
    "content, says",
    [
        (TENSORS | {"input": ["0.5"]}, "`input` must be a dense tensor, not list"),
        (TENSORS | {"input": torch.tensor(X).to_sparse()}, "`input` must be a dense"),
        (TENSORS | {"input": VIEW}, "`input` is larger than the file"),
        (TENSORS | {"temperature": torch.tensor(2j)}, "must be one real number"),
        (TENSORS | {"target": X}, "holds pickled objects beside tensors"),
        ([torch.tensor(X)], "dict of tensors, not a list"),
    ],
)
def test_contents_of_pt(tmp_path, content, says):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ParityError, match=says):
        read([tmp_path / "a.pt"])


@pytest.mark.parametrize(
    "name, says",
    [
        ("folder.npz", "is a directory"),
        ("missing.npz", "no such file"),
        ("a.csv", "not one of .npz"),
        ("good.npy", "pairs"),
    ],
)
def test_paths(tmp_path, name, says):
    (tmp_path / "folder.npz").mkdir()
    good("npy", tmp_path)
    with pytest.raises(ParityError, match=f"{name}: .*{says}"):
        read([tmp_path / name])
