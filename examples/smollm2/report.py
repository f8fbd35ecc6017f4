"""Reports a run as a table, sample continuations and a picture."""

from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

import log
from sample import continuation


# Okabe and Ito's palette.
COLOURS = {"distilled": "#0072B2", "on-policy": "#009E73", "labels": "#D55E00"}
NAMES = {"distilled": "distilled", "on-policy": "on-policy", "labels": "labels alone"}
COLUMNS = {
    "kl": "KL to teacher",
    "top1_agreement": "same top-1, %",
    "cross_entropy": "cross-entropy",
    "own_kl": "KL on own text",
}


def held_out(output, way):
    """Returns the held-out rows of a run's metrics.csv."""
    rows = log.read(output / way / "metrics.csv")
    return [row for row in rows if row["split"] == "held-out"]


def tokens(output, way):
    """Returns the number of tokens in a student's losses."""
    rows = log.read(output / way / "metrics.csv")
    return sum(int(row["tokens"]) for row in rows if row["tokens"])


def cells(row):
    return [
        f"{100 * float(row[name]):.1f}"
        if name == "top1_agreement"
        else f"{float(row[name]):.3f}"
        for name in COLUMNS
    ]


def show(args):
    """Prints the table of students."""
    print(
        f"\n{args.held_out * args.length} held-out tokens; students of "
        f"{len(args.layers)} layers, after {args.steps} steps; nats:"
    )
    table = Table("student", box=box.SIMPLE_HEAD)
    for title in ("tokens", *COLUMNS.values()):
        table.add_column(title, justify="right")
    before = held_out(args.output, args.ways[0])[0]
    table.add_row("untrained", "0", *cells(before))
    for way in args.ways:
        row = held_out(args.output, way)[-1]
        count = str(tokens(args.output, way))
        table.add_row(NAMES[way], count, *cells(row))
    Console(width=88).print(table)


def samples(args, teacher, students):
    print(f'After "{args.prompt}":')
    for name, student in {"teacher": teacher.model, **students}.items():
        text = continuation(teacher, student, args.prompt, 24)
        print(f"  {NAMES.get(name, name):12}  {' '.join(text.split())}")


def draw(args):
    path = args.output / "curves.png"
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    panels = left, middle, right = figure.subplots(1, 3)
    for way in args.ways:
        style = dict(color=COLOURS[way], label=NAMES[way], linewidth=2)
        metrics = args.output / way / "metrics.csv"
        left.plot(*log.curve(metrics, "train", "loss"), **style)
        own = log.curve(metrics, "own-text", "loss")
        left.plot(*own, ".", color=COLOURS[way])
        middle.plot(*log.curve(metrics, "held-out", "kl"), marker="o", **style)
        right.plot(*log.curve(metrics, "held-out", "own_kl"), marker="o", **style)
    left.set_title("Loss on the batches (dots: own text), nats")
    middle.set_title("KL(teacher ‖ student) on held-out text, nats")
    right.set_title("KL(student ‖ teacher) on own text, nats")
    for axes in panels:
        axes.set(xlabel="step", xlim=(0, args.steps), ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend()
    figure.savefig(path, dpi=110)
    return path
