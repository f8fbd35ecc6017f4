"""Measures and draws temporary memory against the size of the vocabulary.

`python -m benchmarks --cell memory` measures and draws; `python -m benchmarks.memory`
only draws, from the numbers in `benchmarks/results/memory.json`.
"""

import json
from pathlib import Path

from .compiled import compiled
from .harness import Cell, Result
from .programs import Job
from .report import RESULTS
from .tpu import compile_all


PICTURE = Path(__file__).parent.parent / "docs" / "images" / "memory.png"
TOKENS, HIDDEN = 8192, 4096
DEVICES = {"CPU": "float32", "TPU v5e": "bfloat16"}
COLOURS = {"plain JAX": "#D55E00", "jaxkl": "#0072B2"}  # Okabe and Ito's palette
LEAST = 1 / 16  # MiB: lower values are drawn here, and the axis says so
LINES = {"heads": "-", "logits": "--"}


def run(settings):
    vocabs = [2**n for n in range(13, 19)]
    if settings.smoke:
        vocabs = vocabs[:1]
    rows = []
    for device, dtype in DEVICES.items():
        facts, jobs = {}, {}
        for implementation in COLOURS:
            for form in LINES:
                for vocab in vocabs:
                    hidden = HIDDEN if form == "heads" else None
                    name = f"{device}, {implementation}, {form}, {vocab}"
                    jobs[name] = Job(implementation, TOKENS, vocab, hidden, dtype)
                    facts[name] = dict(
                        device=device,
                        implementation=implementation,
                        form=form,
                        vocab=vocab,
                    )
        if device == "CPU":
            new = [
                {"peer": name, "state": "ok", "required": True} | compiled(job)
                for name, job in jobs.items()
            ]
        else:
            new = compile_all("v5e", jobs)
        for row in new:
            row.pop("total_bytes", None)
            rows.append(row | facts[row["peer"]])
    if not settings.smoke:
        draw(rows)
    return Result(rows, [])


def draw(rows):
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    present = [d for d in DEVICES if any(_points(rows, d, *c) for c in _curves())]
    figure = Figure(figsize=(4.8 * len(present), 4.4), layout="constrained")
    panels = figure.subplots(1, len(present), sharey=True, squeeze=False)[0]
    labels = []
    for axes, device in zip(panels, present, strict=True):
        vocabs, ends = sorted({row["vocab"] for row in rows}), []
        for implementation, form in _curves():
            points = _points(rows, device, implementation, form)
            colour = COLOURS[implementation]
            style = dict(color=colour, linestyle=LINES[form], linewidth=2)
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, **style)
            text = f"{implementation}, {form}"
            if points[-1][0] < vocabs[-1]:
                text += ", then OOM"
            ends.append((points[-1], text, colour))
        axes.set(xscale="log", yscale="log", xlabel="vocabulary")
        axes.set_xlim(vocabs[0] * 0.85, vocabs[-1] * 5)
        axes.set_xticks(vocabs, [f"{v // 1024}k" for v in vocabs])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_title(f"{device}, {DEVICES[device]}", loc="left", fontsize=10)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        labels.append((axes, ends))
    sizes = {2**n: _size(2**n) for n in range(-4, 18, 3)}
    sizes[LEAST] = f"≤ {_size(LEAST)}"
    panels[0].set_yticks(list(sizes), list(sizes.values()))
    panels[0].yaxis.set_minor_locator(NullLocator())
    panels[0].set_ylabel("temporary memory")
    figure.suptitle(
        f"Forward KL of {TOKENS} tokens, value and gradient: memory beside arguments "
        "and results",
        fontsize=11,
    )
    for axes, ends in labels:  # now the limits are known
        _label(axes, ends)
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, dpi=120)


def _label(axes, ends):
    """Labels each curve at its end, at least a line of text above the one below."""
    height = axes.get_window_extent().height * 72 / axes.figure.dpi
    below = -float("inf")
    for (vocab, mib), text, colour in sorted(ends, key=lambda end: end[0][1]):
        place = axes.transAxes.inverted().transform(
            axes.transData.transform((vocab, mib))
        )
        at = place[1] * height
        moved = max(at, below + 12)
        below = moved
        axes.annotate(
            text,
            (vocab, mib),
            (8, moved - at),
            textcoords="offset points",
            color=colour,
            verticalalignment="center",
            fontsize=9,
        )


def _size(mib):
    if mib >= 1024:
        return f"{mib // 1024:g} GiB"
    return f"{mib:g} MiB" if mib >= 1 else f"{mib * 1024:g} KiB"


def _curves():
    return [(implementation, form) for implementation in COLOURS for form in LINES]


def _points(rows, device, implementation, form):
    """Returns the points of one curve: vocabulary and MiB."""
    return [
        (row["vocab"], max(row["temp_bytes"] / 2**20, LEAST))
        for row in rows
        if row["state"] == "ok"
        and (row["device"], row["implementation"], row["form"])
        == (device, implementation, form)
    ]


CELLS = [
    Cell(
        "memory",
        f"Temporary memory by vocabulary: forward-kl, T = 2, {TOKENS} tokens, H "
        f"{HIDDEN} for heads: value and gradient, compiled only",
        run,
    )
]


if __name__ == "__main__":
    data = json.loads((RESULTS / "memory.json").read_text(encoding="utf-8"))
    draw(data["rows"])
