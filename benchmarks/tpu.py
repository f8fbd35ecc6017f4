"""Compiles the losses with XLA's TPU compiler. It needs no TPU and runs nothing."""

from .compiled import Job, tpu_memory, TPUS
from .harness import Cell, find, ratio, Result, Target
from .losses import DIVERGENCES


GIB = 2**30
IMPLEMENTATIONS = ("jaxkl", "plain JAX")


def compile_all(tpu, jobs):
    """Returns the rows of `{name: job}` on one kind of TPU."""
    try:
        found = tpu_memory(tpu, list(jobs.values()))
    except (ImportError, RuntimeError) as error:
        found = [{"error": str(error)}] * len(jobs)
    rows = []
    for name, facts in zip(jobs, found, strict=True):
        row = {"peer": name, "state": "ok", "required": False}
        if "error" in facts:
            rows.append(row | {"state": "skipped", "reason": facts["error"][:100]})
            continue
        parts = ("argument_bytes", "output_bytes", "temp_bytes")
        rows.append(row | facts | {"total_bytes": sum(facts[part] for part in parts)})
    return rows


def run_heads(settings):
    shape = dict(tokens=8192, hidden=4096, vocab=128256)
    if settings.smoke:
        shape = dict(tokens=256, hidden=128, vocab=4096)
    rows, targets = [], []
    for tpu in list(TPUS)[: 1 if settings.smoke else None]:
        jobs = {f"{tpu}, {name}": Job(name, **shape) for name in IMPLEMENTATIONS}
        new = compile_all(tpu, jobs)
        rows += new
        ours, plain = jobs
        if tpu == "v5e":
            for what, key, bound in (
                ("arguments + outputs + temp", "total_bytes", 6.0),
                ("temp", "temp_bytes", 2.75),
            ):
                value = find(new, ours).get(key)
                value = None if value is None else value / GIB
                targets.append(Target(f"{tpu}: {what}, GiB", value, bound))
        else:  # about the same as on v5e
            both = [*new, *(row for row in rows if row["peer"] == "v5e, jaxkl")]
            value = ratio(both, "temp_bytes", ours, "v5e, jaxkl")
            targets.append(Target(f"{tpu}: temp ÷ v5e's", value, 2.0))
    return Result(rows, targets)


def run_dense(settings):
    shape = dict(tokens=4096, vocab=128256)
    if settings.smoke:
        shape = dict(tokens=256, vocab=4096)
    jobs = {
        f"{name}, {divergence}": Job(name, divergence=divergence, **shape)
        for divergence in DIVERGENCES
        for name in IMPLEMENTATIONS
    }
    rows, targets = compile_all("v5e", jobs), []
    logits = 2 * shape["tokens"] * shape["vocab"]
    for divergence in DIVERGENCES:
        temp = find(rows, f"jaxkl, {divergence}").get("temp_bytes")
        share = None if temp is None else temp / logits
        what = f"{divergence}: temp ÷ one bf16 array of logits"
        targets.append(Target(what, share, 0.05, "{:.4f}"))
    return Result(rows, targets)


CELLS = [
    Cell(
        "tpu-heads",
        "Compiled for TPUs: heads of H 4096, V 128256, bf16, 8192 tokens, forward-kl: "
        "value and gradient to hidden and kernel",
        run_heads,
    ),
    Cell(
        "tpu-dense",
        "Compiled for TPU v5e: logits [4096, 128256] bf16: value and gradient",
        run_dense,
    ),
]
