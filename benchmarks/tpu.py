"""Compiles the losses with XLA's TPU compiler. It needs no TPU and runs nothing.

The times are computed from the compiler's schedule (`schedule.py`).
"""

import dataclasses
import functools as ft

from .compiled import compile_for_tpu
from .harness import Cell, find, ratio, Result, Target
from .losses import DIVERGENCES
from .programs import Job, PRODUCTS, PRODUCTS_OF_ONE


OURS, PLAIN, NARROW = "jaxkl", "plain JAX", "plain JAX, bf16 logits"
BASES = (PRODUCTS, PRODUCTS_OF_ONE, PLAIN)
HEADS = (OURS, PLAIN, PRODUCTS)
PLANS = {"jaxkl, fast": "fast", "jaxkl, lean": "lean"}
EVERYONE = (OURS, PLAIN, "optax", "ejkernel")
TIMED = ("v5e", "v5p", "v6e")
# Bounds of memory, and what they are of
GIB = {"temp, GiB": "temp_bytes", "total, GiB": "total_bytes"}
SHARE = "temp ÷ one bf16 array of logits"


@dataclasses.dataclass(frozen=True)
class Case:
    """One loss and size on one kind of TPU, and the programs to compare.

    The bounds are those of the first program: of its time ÷ that of another one, or of
    its memory.
    """

    tpu: str
    loss: str
    tokens: int
    vocab: int
    hidden: int | None = None
    programs: tuple[str, ...] = (OURS, PLAIN)
    bounds: dict[str, float] = dataclasses.field(default_factory=dict)

    def row(self, program):
        sizes = (self.tokens, self.hidden, self.vocab)
        title = f"{self.tpu} {'×'.join(str(n) for n in sizes if n)}"
        # The products are the same for each loss.
        of_loss = program not in (PRODUCTS, PRODUCTS_OF_ONE)
        return ", ".join([title, *[self.loss] * of_loss, program])

    def job(self, program):
        name, logits, plan = program, "float32", PLANS.get(program)
        if program == NARROW:
            name, logits = PLAIN, None
        elif plan is not None:
            name = OURS
        shape = dict(tokens=self.tokens, vocab=self.vocab, hidden=self.hidden)
        return Job(name, loss=self.loss, logits=logits, plan=plan, **shape)

    def targets(self, rows):
        name = self.row(self.programs[0])
        facts = find(rows, name)
        for what, bound in self.bounds.items():
            form = "{:.2f}"
            if what in GIB:
                size = facts.get(GIB[what])
                value = None if size is None else size / 2**30
            elif what == SHARE:
                size, form = facts.get("temp_bytes"), "{:.4f}"
                value = None if size is None else size / (2 * self.tokens * self.vocab)
            else:
                value = ratio(rows, "schedule_ms", name, self.row(what))
                what = f"time ÷ {what}"
            yield Target(f"{name}: {what}", value, bound, form)


def compile_all(tpu, jobs):
    """Returns the rows of `{name: job}` on one kind of TPU."""
    try:
        found = compile_for_tpu(tpu, list(jobs.values()))
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


def run(cases, settings):
    """Compiles the programs of all cases, and compares those of each case."""
    if settings.smoke:
        tiny = dict(tokens=256, vocab=4096, hidden=cases[0].hidden and 128)
        cases = [dataclasses.replace(cases[0], **tiny)]
    jobs = {tpu: {} for tpu in dict.fromkeys(case.tpu for case in cases)}
    for case in cases:
        for program in case.programs:
            jobs[case.tpu][case.row(program)] = case.job(program)
    rows = [row for tpu, named in jobs.items() for row in compile_all(tpu, named)]
    for case in cases:
        for program in case.programs:
            own = find(rows, name := case.row(program))
            ratios = {
                base: ratio(rows, "schedule_ms", name, case.row(base)) for base in BASES
            }
            own["ratios"] = {k: x for k, x in ratios.items() if x is not None}
    targets = [target for case in cases for target in case.targets(rows)]
    bases = [x for x in BASES if any(x in row.get("ratios", ()) for row in rows)]
    return Result(rows, targets, tuple(bases))


llama = ft.partial(Case, tokens=8192, hidden=4096, vocab=128256)
logits = ft.partial(Case, tokens=4096, vocab=128256)
OTHER_LOSSES = [name for name in DIVERGENCES if name != "forward-kl"]
HEAD_CASES = [
    llama(
        "v5e",
        "forward-kl",
        programs=(*HEADS, NARROW, "optax", "ejkernel"),
        bounds={PRODUCTS: 1.22, PLAIN: 1.0, "temp, GiB": 2.75, "total, GiB": 6.0},
    ),
    *(
        llama(
            tpu,
            "forward-kl",
            programs=HEADS,
            bounds={PRODUCTS: bound, PLAIN: 1.05, "temp, GiB": 3.0},
        )
        for tpu, bound in (("v5p", 1.35), ("v6e", 1.6))
    ),
    *(llama(tpu, loss) for tpu in TIMED for loss in OTHER_LOSSES),
    Case(
        "v5e",
        "reverse-kl",
        tokens=4096,
        hidden=2304,
        vocab=256000,
        programs=HEADS,
        bounds={PRODUCTS: 1.45, PLAIN: 1.0, "temp, GiB": 3.0},
    ),
    Case("v5e", "forward-kl", 8192, 151936, 1024, HEADS),
    Case("v6e", "forward-kl", 8192, 256128, 2048, HEADS),
    llama("v4", "forward-kl", bounds={"temp, GiB": 3.0}),
    llama("tpu7x", "forward-kl", bounds={"temp, GiB": 5.0}),  # its rates are unknown
]
BOUNDS = {"forward-kl": {PLAIN: 0.9}, "jensen-shannon": {PLAIN: 1.15}}
DENSE_CASES = [
    *(
        logits(
            "v5e", loss, programs=EVERYONE, bounds={**BOUNDS.get(loss, {}), SHARE: 0.05}
        )
        for loss in DIVERGENCES
    ),
    *(logits(tpu, loss) for tpu in ("v5p", "v6e") for loss in DIVERGENCES),
    *(
        Case(tpu, "reverse-kl", 2048, 151936, bounds={PLAIN: 0.95})
        for tpu in ("v5p", "v6e")
    ),
]
TOP_K_CASES = [Case(tpu, "top-k", 8192, 128256) for tpu in TIMED]
KL_DIV_CASES = [logits(tpu, "kl_div", programs=(OURS, PLAIN, "optax")) for tpu in TIMED]
LABEL_CASES = [
    *(
        llama(
            tpu,
            "cross-entropy",
            programs=(OURS, PLAIN, PRODUCTS_OF_ONE, "optax", "tokamax"),
            bounds=bounds,
        )
        for tpu, bounds in (
            ("v5e", {PRODUCTS_OF_ONE: 1.2, PLAIN: 1.0, "temp, GiB": 2.75}),
            ("v5p", {}),
            ("v6e", {}),
        )
    ),
    *(
        llama(
            tpu,
            "log-probs",
            programs=(OURS, PLAIN, PRODUCTS, "optax"),
            bounds={PRODUCTS: 1.1} if tpu == "v5e" else {},
        )
        for tpu in TIMED
    ),
]

HOW = "compiled for TPUs, bf16: value and gradient"
CELLS = [
    Cell(
        "tpu-heads",
        f"Heads, tokens × H × V, {HOW} to hidden and kernel",
        ft.partial(run, HEAD_CASES),
    ),
    Cell(
        "tpu-labels",
        f"A head and labels, tokens × H × V, {HOW} to hidden and kernel",
        ft.partial(run, LABEL_CASES),
    ),
    Cell("tpu-dense", f"Logits, tokens × V, {HOW}", ft.partial(run, DENSE_CASES)),
    Cell(
        "tpu-top-k",
        f"Logits and a teacher of 64 columns a token, {HOW}",
        ft.partial(run, TOP_K_CASES),
    ),
    Cell(
        "tpu-kl_div",
        f"kl_div of log-probabilities, tokens × V, {HOW}",
        ft.partial(run, KL_DIV_CASES),
    ),
]
