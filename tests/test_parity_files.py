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

from jaxkl.__main__ import main
from jaxkl.parity import ParityError, read


X = np.log(np.array([[0.5, 0.5], [0.25, 0.75]], np.float32))
T = np.array([[1.0, 0.0], [0.2, 0.8]], np.float32)
TENSORS = {"input": torch.tensor(X), "target": torch.tensor(T)}


def safetensors(header, data=b""):
    header = json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + data


def write_safetensors(path, arrays):
    names = {"float32": "F32", "bfloat16": "BF16"}
    header, data = {}, b""
    for name, x in arrays.items():
        span = [len(data), len(data) + x.nbytes]
        header[name] = dict(
            dtype=names[x.dtype.name], shape=list(x.shape), data_offsets=span
        )
        data += x.tobytes()
    path.write_bytes(safetensors(header | {"__metadata__": {"by": "hand"}}, data))


@pytest.mark.parametrize("suffix", ["npz", "npy", "safetensors", "pt"])
def test_formats(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    paths = [path]
    if suffix == "npz":
        np.savez_compressed(path, input=X, target=T, loss=0.5, other=[object()])
    elif suffix == "npy":
        paths = [tmp_path / "x.npy", tmp_path / "t.npy"]
        np.save(paths[0], np.asfortranarray(X))
        np.save(paths[1], T)
    elif suffix == "safetensors":
        write_safetensors(path, {"input": X, "target": T})
    else:
        tensors = {"input": torch.tensor(X).t().contiguous().t(), "loss": 0.5}
        torch.save(tensors | {"target": torch.tensor(T).requires_grad_()}, path)
    (recording,) = read(paths)
    np.testing.assert_array_equal(recording.arrays["input"], X)
    np.testing.assert_array_equal(recording.arrays["target"], T)
    assert recording.arrays["input"].dtype == np.float32
    assert set(recording.arrays) <= {"input", "target", "loss"}


def test_bfloat16(tmp_path):
    x = X.astype(ml_dtypes.bfloat16)
    write_safetensors(tmp_path / "a.safetensors", {"input": x, "target": T})
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


def pickled_npz(path, trace):
    array = np.array([Bomb(trace)], object)
    np.savez(path, input=array, target=T)


def pickled_npy(path, trace):
    path = path.with_suffix(".npy")
    np.save(path, np.array([Bomb(trace)], object), allow_pickle=True)


def pickled_pt(path, trace):
    torch.save({"input": torch.tensor(X), "target": Bomb(trace)}, path)


def plain_pickle(path, trace):
    path.write_bytes(pickle.dumps({"input": Bomb(trace)}))


@pytest.mark.parametrize(
    "write, suffix",
    [
        (pickled_npz, "npz"),
        (pickled_npy, "npy"),
        (pickled_pt, "pt"),
        (plain_pickle, "pt"),
        (plain_pickle, "npz"),
        (plain_pickle, "npy"),
        (plain_pickle, "safetensors"),
    ],
)
def test_no_code_is_run(tmp_path, write, suffix):
    path, trace = tmp_path / f"a.{suffix}", tmp_path / "trace"
    write(path, trace)
    with pytest.raises(ParityError):
        read([path, path] if suffix == "npy" else [path])
    assert not trace.exists()


def good(suffix, folder):
    path = folder / f"good.{suffix}"
    if suffix == "npz":
        np.savez(path, input=X, target=T)
    elif suffix == "npy":
        np.save(path, X)
    elif suffix == "safetensors":
        write_safetensors(path, {"input": X, "target": T})
    else:
        torch.save(TENSORS, path)
    return path


@pytest.mark.parametrize("suffix", ["npz", "npy", "safetensors", "pt"])
def test_truncated_anywhere(tmp_path, suffix):
    path = good(suffix, tmp_path)
    content = path.read_bytes()
    count = 2 if suffix == "npy" else 1
    read([path] * count)
    for length in {*range(0, len(content), max(len(content) // 40, 1))}:
        path.write_bytes(content[:length])
        with pytest.raises(ParityError, match=path.name):
            read([path] * count)


def test_garbage(tmp_path, rng):
    for suffix in ("npz", "npy", "safetensors", "pt"):
        path = tmp_path / f"a.{suffix}"
        for length in (0, 1, 8, 100, 10_000):
            path.write_bytes(rng.bytes(length))
            with pytest.raises(ParityError, match="a." + suffix):
                read([path, path])


def header_of(shape):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        file, dict(descr="<f4", fortran_order=False, shape=shape)
    )
    return file.getvalue()


HUGE = (1 << 20, 1 << 20)


def test_a_header_cannot_claim_more_than_the_file(tmp_path):
    npy = tmp_path / "a.npy"
    npy.write_bytes(header_of(HUGE))
    with pytest.raises(ParityError, match="truncated"):
        read([npy, npy])
    npz = tmp_path / "a.npz"
    with zipfile.ZipFile(npz, "w") as archive:
        archive.writestr("input.npy", header_of(HUGE))
        archive.writestr("target.npy", header_of(HUGE))
    with pytest.raises(ParityError, match="truncated"):
        read([npz])
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


@pytest.mark.parametrize(
    "target, says", [(X, "pickled objects"), (torch.tensor(T), "larger than the file")]
)
def test_a_view_that_repeats_one_number(tmp_path, target, says):
    view = torch.ones(1).expand(*HUGE)
    torch.save({"input": view, "target": target}, tmp_path / "a.pt")
    with pytest.raises(ParityError, match=says):
        read([tmp_path / "a.pt"])


def test_zip_bombs(tmp_path):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, input=np.zeros(1 << 22), target=np.zeros(4))
    assert path.stat().st_size < 1 << 17
    with pytest.raises(ParityError, match="33,554,.* more than --max-bytes 1,048,576"):
        read([path], max_bytes=1 << 20)
    # One that lies about its size.
    content = path.read_bytes().replace(
        struct.pack("<I", (1 << 25) + 128), struct.pack("<I", 200)
    )
    path.write_bytes(content)
    with pytest.raises(ParityError):
        read([path], max_bytes=1 << 20)


@pytest.mark.parametrize("suffix", ["npz", "npy", "safetensors", "pt"])
def test_max_bytes(tmp_path, suffix):
    path = good(suffix, tmp_path)
    with pytest.raises(ParityError, match="--max-bytes"):
        read([path, path], max_bytes=10)


@pytest.mark.parametrize(
    "arrays, says",
    [
        (dict(input=X), "no array `target`"),
        (dict(input=X, target=T.astype(int)), "`target` must be floating-point"),
        (dict(input=X, target=T, mask=[2, 0]), "`mask` must be bool"),
        (dict(input=X, target=T, temperature=-1.0), "`temperature` must be"),
        (dict(input=X, target=T, temperature=1e200), "`temperature` must be"),
        (dict(input=X, target=T, temperature=[1.0, 2.0]), "must be one real number"),
        (dict(input=X, target=T.astype("S4")), r"`target` holds strings \(\|S4\)"),
        (dict(input=X.astype(str), target=T), r"`input` holds strings \(<U32\)"),
        (dict(input=X.astype(object), target=T), "`input` holds Python objects"),
        (dict(input=X.astype("V4"), target=T), r"`input` holds \|V4; bfloat16 needs"),
        (dict(input=X + 0j, target=T), "`input` holds complex64, not real numbers"),
    ],
)
def test_contents(tmp_path, arrays, says):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ParityError, match=says):
        read([tmp_path / "a.npz"])


def test_contents_of_npy(tmp_path):
    np.save(tmp_path / "a.npy", np.array(["0.5"]))
    with pytest.raises(ParityError, match="a.npy: it holds strings"):
        read([tmp_path / "a.npy"] * 2)


@pytest.mark.parametrize(
    "content, says",
    [
        (TENSORS | {"input": ["0.5"]}, "`input` must be a dense tensor, not a list"),
        (TENSORS | {"input": torch.tensor(X).to_sparse()}, "`input` must be a dense"),
        (TENSORS | {"temperature": torch.tensor(2j)}, "must be one real number"),
        ([torch.tensor(X)], "dict of tensors, not a list"),
    ],
)
def test_contents_of_pt(tmp_path, content, says):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ParityError, match=says):
        read([tmp_path / "a.pt"])


def test_paths(tmp_path, capsys):
    folder = tmp_path / "folder.npz"
    folder.mkdir()
    for paths, says in [
        ([folder], "is a directory, not a file"),
        ([tmp_path], "is a directory, not a file"),
        (["missing.npz"], "no such file"),
        (["a.csv"], "not one of .npz"),
        ([good("npy", tmp_path)], "pairs"),
    ]:
        assert main(["parity", "compare", *map(str, paths)]) == 2
        error = capsys.readouterr().err
        assert says in error and "Traceback" not in error


def test_nothing_is_written_over(tmp_path, capsys):
    path = good("npz", tmp_path)
    content = path.read_bytes()
    command = ["parity", "compare", str(path), "--json", str(path)]
    assert main(command) == 2
    assert "exists" in capsys.readouterr().err
    assert path.read_bytes() == content
