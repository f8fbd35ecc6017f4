"""Compares the plans for two heads on TPUs: time beside memory.

`python -m benchmarks --cell tpu-plans` compiles and draws; `python -m benchmarks.plans`
only draws, from the numbers in `benchmarks/results/tpu-plans.json`.
"""

import functools as ft
import json
from pathlib import Path

from . import tpu
from .harness import Cell, find
from .programs import PRODUCTS
from .report import RESULTS


PICTURE = Path(__file__).parent.parent / "docs" / "images" / "plans.png"
heads = ft.partial(tpu.Case, tokens=8192, hidden=4096, vocab=131072)
CASES = [
    heads(
        chip,
        "forward-kl",
        programs=("jaxkl, lean", "jaxkl, fast", tpu.PLAIN, PRODUCTS),
        bounds={PRODUCTS: bound, "temp, GiB": 0.4},
    )
    for chip, bound in (("v5e", 2.0), ("v6e", 2.5))
]
DRAWN = CASES[0]
COLOURS = {"plain JAX": "#D55E00"}  # Okabe and Ito's palette
OURS = "#0072B2"


def run(settings):
    result = tpu.run(CASES, settings)
    if not settings.smoke:
        draw(result.rows)
    return result


def draw(rows):
    """Draws two panels of bars: the time of each program, and its memory."""
    from matplotlib.figure import Figure

    products = find(rows, DRAWN.row(PRODUCTS)).get("schedule_ms")
    shown = {
        program: row
        for program in DRAWN.programs  # from below
        if program != PRODUCTS and (row := find(rows, DRAWN.row(program)))
    }
    if not shown:
        return
    figure = Figure(figsize=(9.6, 1.6 + 0.45 * len(shown)), layout="constrained")
    time, memory = figure.subplots(1, 2, sharey=True)
    for axes, key, unit, title in (
        (time, "schedule_ms", 1, "ms by the compiler's schedule"),
        (memory, "temp_bytes", 2**30, "temporary memory, GiB"),
    ):
        values = [row[key] / unit for row in shown.values()]
        colours = [COLOURS.get(program, OURS) for program in shown]
        bars = axes.barh(list(shown), values, color=colours, height=0.6)
        form = "%.0f" if key == "schedule_ms" else "%.2f"
        axes.bar_label(bars, fmt=form, padding=4, fontsize=9)
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlim(0, 1.15 * max(values))
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
    if products is not None:
        time.axvline(products, color="black", linestyle=":", linewidth=1.5)
        text = f"ms by the compiler's schedule (dotted: four products, {products:.0f})"
        time.set_title(text, loc="left", fontsize=10)
    figure.suptitle(
        f"Forward KL of two heads on a TPU {DRAWN.tpu}, as compiled: {DRAWN.tokens} "
        f"tokens, H {DRAWN.hidden}, V {DRAWN.vocab}, bf16, value and gradient",
        fontsize=11,
    )
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, dpi=120)


CELLS = [
    Cell(
        "tpu-plans",
        f"Plans for heads, tokens × H × V, {tpu.HOW} to hidden and kernel",
        run,
    )
]


if __name__ == "__main__":
    data = json.loads((RESULTS / "tpu-plans.json").read_text(encoding="utf-8"))
    draw(data["rows"])
