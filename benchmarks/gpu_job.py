"""Does one job of `benchmarks/gpu.py` in this process: prints a line of JSON per row.

A job is JSON too: `kind`, and the arguments of the function of that name below.
"""

import json
import statistics
import subprocess
import sys
import time
from importlib import metadata

import jax
import ml_dtypes
import numpy as np

import jaxkl

from . import heads, losses
from .harness import relative_error, TOLERANCE


# float32 products are exact here: their half, TF32, gives 3e-4. In bfloat16 the logits,
# their gradient and the results are rounded to 8 bits.
TOLERANCES = {"float32": TOLERANCE, "bfloat16": 1e-2}
LARGER = {"Liger": 0.1}  # it rounds log-probabilities to bfloat16 too
ODD = 67, 37, 521  # tokens, hidden, vocab
PACKAGES = "jax", "jaxlib", "jax-cuda13-plugin", "torch", "triton", "liger-kernel"


def machine():
    from . import gpu_jax

    def version(package):
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None

    python = ".".join(map(str, sys.version_info[:3]))
    versions = {"python": python, "jaxkl": jaxkl.__version__}
    versions |= {package: version(package) for package in PACKAGES}
    yield gpu_jax.device() | {"driver": _driver(), "versions": versions}


def _driver():
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.check_output(query, encoding="utf-8").splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def ceilings(sizes):
    from . import gpu_jax

    yield from gpu_jax.ceilings(*sizes, median_ms)


def check(peer, options, platform, divergences):
    """Compares values and gradients with float64 at a small odd size."""
    for form in ("heads", "dense"):
        for divergence in divergences:
            program = make_program(platform, peer, form, divergence, options)
            for dtype in TOLERANCES:
                row = {"form": form, "divergence": divergence, "dtype": dtype}
                yield row | checked(program, peer, form, divergence, dtype)


def measure(peer, options, platform, form, divergence, sizes):
    """Measures peak memory and time in bfloat16, of a program that is right."""
    program = make_program(platform, peer, form, divergence, options)
    row = checked(program, peer, form, divergence, "bfloat16")
    tokens, hidden, vocab = sizes
    shapes = {"student": (tokens, vocab), "teacher": (tokens, vocab)}
    if form == "heads":
        kernel = (vocab, hidden) if program.transposed else (hidden, vocab)
        names = ("hidden", "kernel", "teacher hidden", "teacher kernel")
        shapes = dict(zip(names, 2 * ((tokens, hidden), kernel), strict=True))
    row |= program.prepare(shapes)
    outputs, facts = program.run_for_peak()
    error = error_at_size(program, form, divergence, *outputs)
    row |= facts | judged({"error_at_size": error}, peer, "bfloat16")
    del outputs
    yield row | {"ms": median_ms(program.run, program.wait)}


def make_program(platform, peer, *which):
    if peer in ("jaxkl", "plain JAX"):
        from .gpu_jax import Program

        return Program(peer, *which)
    from .gpu_torch import Program

    return Program(peer, *which, "cuda" if platform == "gpu" else "cpu")


def checked(program, peer, form, divergence, dtype):
    """Returns errors in norm of the value and the gradients at the odd size."""
    arrays = heads.arrays(*ODD)
    if form == "dense":
        arrays = [arrays[0] @ arrays[1], arrays[2] @ arrays[3]]
    if dtype == "bfloat16":
        arrays = [x.astype(ml_dtypes.bfloat16).astype(np.float32) for x in arrays]
    expected = in_float64(form, divergence, [x.astype(np.float64) for x in arrays])
    outputs = program.outputs_of(layout(program, arrays, (1, 3)), dtype)
    actual = [program.to_numpy(x) for x in jax.tree.leaves(outputs)]
    actual = layout(program, actual, (2,))
    errors = [relative_error(x, y) for x, y in zip(actual, expected, strict=True)]
    named = {"value_error": errors[0], "gradient_error": max(errors[1:])}
    return judged(named, peer, dtype)


def judged(errors, peer, dtype):
    """Returns a row of named errors and their bound, which says if one is too large.

    JSON has no infinity, which stands for what is not finite or has another shape.
    """
    tolerance = LARGER.get(peer, TOLERANCES[dtype])
    right = all(error <= tolerance for error in errors.values())
    row = {key: x if np.isfinite(x) else None for key, x in errors.items()}
    row["tolerance"] = tolerance
    return row if right else row | {"state": "WRONG"}


def layout(program, arrays, kernels):
    """Transposes the arrays at these indices, if the program's kernels are."""
    if not program.transposed:
        return arrays
    return [
        np.ascontiguousarray(x.T) if i in kernels else x for i, x in enumerate(arrays)
    ]


def logits_of(form, arrays):
    if form == "dense":
        return arrays
    h, k, th, tk = arrays
    return h @ k, th @ tk


def in_float64(form, divergence, arrays):
    """Computes the mean over tokens and its gradients by the student's arrays."""
    total, d_logits = losses.in_float64(divergence, *logits_of(form, arrays))
    gradients = [d_logits]
    if form == "heads":
        h, k = arrays[:2]
        gradients = [d_logits @ k.T, h.T @ d_logits]
    return [x / len(d_logits) for x in (total, *gradients)]


def error_at_size(program, form, divergence, value, gradients):
    """Checks what can be checked at the size that is timed.

    The gradient of the first and last tokens does not depend on the others. And
    `sum(hidden * d_hidden)` is `sum(kernel * d_kernel)`: both are
    `sum(logits * d_logits)`.
    """
    if not np.isfinite(program.to_numpy(value)):
        return float("inf")

    def some(x):
        return np.concatenate([program.to_numpy(x[:4]), program.to_numpy(x[-4:])])

    arrays, gradients = program.arguments, jax.tree.leaves(gradients)
    tokens, actual = len(arrays[0]), some(gradients[0])
    if form == "dense":
        _, d_logits = losses.in_float64(divergence, *map(some, arrays))
        return relative_error(actual, d_logits / tokens)
    h, k, th, tk = arrays
    k, tk, d_kernel = (program.to_numpy(x) for x in (k, tk, gradients[1]))
    if program.transposed:
        k, tk, d_kernel = k.T, tk.T, d_kernel.T
    d_logits = losses.in_float64(divergence, some(h) @ k, some(th) @ tk)[1]
    by_hidden = np.sum(program.to_numpy(h) * program.to_numpy(gradients[0]))
    by_kernel = np.sum(k * d_kernel)
    return max(
        relative_error(actual, d_logits.astype(np.float32) @ k.T / tokens),
        relative_error(by_kernel, by_hidden),
    )


def median_ms(run, wait, samples=7):
    """Returns the median time of a run, in milliseconds.

    Each sample queues runs for some 50 ms and then waits for the last, so that the time
    to start a run is hidden, as it is in training.
    """

    def sample(runs):
        outputs, start = None, time.perf_counter()
        for _ in range(runs):
            outputs = None  # frees the memory of the last run's
            outputs = run()
        wait(outputs)
        return 1e3 * (time.perf_counter() - start) / runs

    sample(1)  # warms up
    runs = max(1, min(50, round(50 / sample(1))))
    return statistics.median(sample(runs) for _ in range(samples))


KINDS = dict(machine=machine, ceilings=ceilings, check=check, measure=measure)


def reason_of(error):
    """Returns a row: skipped if something is missing, else that it failed."""
    text = str(error).strip() or repr(error)
    state = "failed"
    if "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower():
        state = "out of memory"
    elif isinstance(error, NotImplementedError) or (
        isinstance(error, ModuleNotFoundError)
        and str(error.name).partition(".")[0] in ("torch", "liger_kernel", "triton")
    ):
        state = "skipped"
    return {"state": state, "reason": text.splitlines()[0][:150]}


def main():
    job = json.loads(sys.argv[1])
    rows = KINDS[job.pop("kind")](**job)
    try:
        for row in rows:
            print(json.dumps({"state": "ok"} | row), flush=True)
    except Exception as error:
        print(json.dumps(reason_of(error)), flush=True)


if __name__ == "__main__":
    main()
