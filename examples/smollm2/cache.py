# `make distill-lm` builds the environment of this program, .venv.
"""Writes the teacher's outputs for a text once, to train from many times.

    .venv/bin/python examples/smollm2/cache.py --output out/cache --kind hidden
    .venv/bin/python examples/smollm2/train.py --cache out/cache

A cache is a folder of safetensors files, with some windows in each, and manifest.json.
The manifest records the cache's sources and settings, and the SHA-256 of each file.
After an interruption, run the program again: it writes the files that are missing. It
rejects a file that differs from the manifest, and a cache of another teacher, tokenizer
or text.
"""

import dataclasses
import hashlib
import json
import os
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from safetensors import safe_open
from safetensors.numpy import save

import data
import jaxkl
import model
import options


KINDS = ("hidden", "top-k", "sampled")
CHUNK = 4  # windows whose logits are in memory at a time


def identity(teacher, corpus):
    """Returns what a cache must match to be of use for this teacher and text."""
    tokenizer = teacher.tokenizer.to_str().encode()
    return {
        "teacher": {"name": teacher.name, "sha256": teacher.sha256},
        "tokenizer": {"sha256": hashlib.sha256(tokenizer).hexdigest()},
        "text": {"name": corpus.name, "sha256": corpus.sha256},
        "windows": len(corpus.train.tokens),
        "length": corpus.train.tokens.shape[1],
    }


@partial(jax.jit, static_argnames=("structure", "kind", "k", "dtype"))
def compute(structure, state, embedding, tokens, key, temperature, kind, k, dtype):
    hidden = nnx.merge(structure, state)(embedding[tokens])
    if kind == "hidden":
        return {"hidden": hidden.astype(dtype)}
    logits = jnp.matmul(hidden, embedding.T, preferred_element_type=jnp.float32)
    index = jnp.uint16 if len(embedding) <= 2**16 else jnp.int32
    if kind == "sampled":  # all draws have the same weight: store only columns
        found = jaxkl.sampled_teacher(key, logits, k, temperature=temperature)
        return {"indices": found.indices.astype(index)}
    found = jaxkl.top_k_teacher(logits, k, temperature=temperature)
    return {
        "indices": found.indices.astype(index),
        "log_probs": found.log_probs.astype(dtype),
    }


def write(directory, teacher, corpus, settings, shard_windows, progress):
    """Writes the files that are missing, and returns the manifest."""
    path = directory / "manifest.json"
    manifest = identity(teacher, corpus) | settings | {"shard_windows": shard_windows}
    if path.exists():
        old = read_manifest(path)
        check_same(path, old, manifest)
        manifest["shards"] = old["shards"]
        check_shards(directory, manifest, missing_ok=True)
    manifest.setdefault("shards", {})
    tokens = corpus.train.tokens
    structure, state = nnx.split(teacher.model)
    starts = range(0, len(tokens), shard_windows)
    for number, start in progress.track(list(enumerate(starts)), description="cache"):
        name = f"{number:05}.safetensors"
        if name in manifest["shards"] and (directory / name).exists():
            continue
        parts = []
        for first in range(start, min(start + shard_windows, len(tokens)), CHUNK):
            rows = tokens[first : min(first + CHUNK, start + shard_windows)]
            padded = np.pad(rows, ((0, CHUNK - len(rows)), (0, 0)))
            arrays = compute(
                structure,
                state,
                teacher.embedding,
                padded,
                jax.random.fold_in(jax.random.key(settings["seed"]), first),
                settings["temperature"],
                settings["kind"],
                settings["k"],
                settings["dtype"],
            )
            parts.append({k: np.asarray(v)[: len(rows)] for k, v in arrays.items()})
        shard = {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}
        content = save(shard)
        replace_file(directory / name, content)
        manifest["shards"][name] = {
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
        replace_file(path, json.dumps(manifest, indent=1).encode() + b"\n")
    return manifest


def replace_file(path, content):
    """Replaces a file; a kill at any moment leaves the old one or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    directory = os.open(path.parent, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)


def read_manifest(path):
    try:
        manifest = json.loads(path.read_text())
        manifest["shards"], manifest["kind"]
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: there is no cache.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error!r}.") from error
    return manifest


def check_same(path, manifest, expected):
    for key, value in expected.items():
        if manifest.get(key) != value:
            raise ValueError(
                f"{path} is of another {key}: {manifest.get(key)}, not {value}."
            )


def check_shards(directory, manifest, missing_ok=False):
    for name, expected in manifest["shards"].items():
        path = directory / name
        if not path.exists():
            if missing_ok:
                continue
            raise ValueError(f"{path} is missing. Run cache.py again to write it.")
        again = "Delete it and run cache.py again: only what is missing is written."
        if (size := path.stat().st_size) != expected["bytes"]:
            raise ValueError(
                f"{path} has {size} bytes, not {expected['bytes']}. {again}"
            )
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        if sha256 != expected["sha256"]:
            raise ValueError(f"{path} was altered: its SHA-256 differs. {again}")


@dataclasses.dataclass(frozen=True)
class Cache:
    """A complete cache, which reads windows on demand."""

    directory: Path
    manifest: dict
    tail: str = "bucket"  # for top-k

    @classmethod
    def open(cls, directory, teacher, corpus, tail="bucket"):
        path = directory / "manifest.json"
        manifest = read_manifest(path)
        check_same(path, manifest, identity(teacher, corpus))
        shards = -(-manifest["windows"] // manifest["shard_windows"])
        if (found := len(manifest["shards"])) != shards:
            raise ValueError(
                f"{path} lists {found} of {shards} files. Run cache.py again with the "
                "same options: it goes on where it stopped."
            )
        check_shards(directory, manifest)
        return cls(directory, manifest, tail)

    def check(self, divergence, temperature):
        """Checks that a list of columns supports this divergence and temperature."""
        path, kind = self.directory / "manifest.json", self.manifest["kind"]
        if kind == "hidden":
            return
        at = self.manifest["temperature"]
        if (temperature.first, temperature.last) != (at, at):
            raise ValueError(
                f"{path} is at temperature {at:g}: a {kind} cache cannot be used at "
                "another."
            )
        batch = {"indices": jnp.zeros((1, 1), int)}
        if kind == "top-k":
            batch["log_probs"] = jnp.zeros((1, 1))
        teacher = self.source(None, batch, None)
        jaxkl.distillation_loss(jnp.zeros((1, 2)), teacher, divergence=divergence)

    def source(self, frozen, batch, x):
        """Makes the loss's teacher from a batch's arrays."""
        if self.manifest["kind"] == "hidden":
            return jaxkl.LinearHead(batch["hidden"], frozen["kernel"])
        indices, log_probs = batch["indices"], batch.get("log_probs")
        if log_probs is not None:
            return jaxkl.SparseTeacher(indices, log_probs, tail=self.tail)
        log_probs = jnp.full(indices.shape, -np.log(indices.shape[-1]), jnp.float32)
        return jaxkl.SparseTeacher(indices, log_probs, tail="renormalize")

    @property
    def bytes_per_token(self):
        total = sum(shard["bytes"] for shard in self.manifest["shards"].values())
        return total / (self.manifest["windows"] * self.manifest["length"])

    def read(self, indices):
        """Reads arrays of windows, `[windows, length, ...]`, by memory mapping."""
        rows = []
        for index in indices.tolist():
            number, row = divmod(index, self.manifest["shard_windows"])
            with safe_open(self.directory / f"{number:05}.safetensors", "np") as file:
                names = file.keys()
                rows.append({k: file.get_slice(k)[row] for k in names})
        return {k: np.stack([row[k] for row in rows]) for k in rows[0]}


def parse_arguments():
    parser = options.parser(__doc__)
    options.add_data(parser)
    add = parser.add_argument
    add("--output", type=Path, default=Path("out/cache"), help="folder of the cache")
    add("--kind", choices=KINDS, default="hidden", help="what to store for each token")
    add("--k", type=options.integer(1), default=64, help="columns or draws for each")
    add(
        "--temperature",
        type=options.positive,
        default=1.0,
        help="of the teacher, for top-k and sampled",
    )
    add("--seed", type=options.integer(0), default=0, help="of the samples")
    add(
        "--dtype",
        choices=("float16", "float32"),
        default="float16",
        help="of hidden states and log-probabilities",
    )
    add(
        "--shard-windows",
        type=options.integer(1),
        default=64,
        help="windows in each file",
    )
    return parser, parser.parse_args()


def main():
    parser, args = parse_arguments()
    options.make_folder(parser, args.output)
    settings = {
        "kind": args.kind,
        "k": args.k if args.kind != "hidden" else None,
        "temperature": args.temperature if args.kind != "hidden" else None,
        "seed": args.seed,
        "dtype": args.dtype,
    }
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn())
    try:
        teacher = model.load(args.teacher or model.teacher_file())
        cuts = args.length, args.held_out, args.windows
        corpus = data.load(args.text, teacher.tokenizer, *cuts)
        with Progress(*columns, TimeRemainingColumn()) as progress:
            write(args.output, teacher, corpus, settings, args.shard_windows, progress)
        cache = Cache.open(args.output, teacher, corpus)
    except (ValueError, OSError) as error:
        parser.exit(1, f"cache.py: {error}\n")
    windows, length = cache.manifest["windows"], cache.manifest["length"]
    print(
        f"{args.output}: {args.kind}, {windows} windows of {length} tokens of "
        f"{corpus.name}, {cache.bytes_per_token:.0f} bytes a token"
    )


if __name__ == "__main__":
    main()
