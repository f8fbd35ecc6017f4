"""Reports a run as a table, sample continuations and a picture."""

from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

import log
import model


COLOURS = {"distilled": "#0072B2", "labels": "#D55E00"}  # Okabe and Ito's palette
NAMES = {"distilled": "distilled", "labels": "labels alone"}
COLUMNS = {
    "kl": "KL to teacher",
    "top1_agreement": "same top-1, %",
    "cross_entropy": "cross-entropy",
}


def held_out(output, way):
    """Returns the held-out rows of a run's metrics.csv."""
    rows = log.read(output / way / "metrics.csv")
    return [row for row in rows if row["split"] == "held-out"]


def cells(row):
    return [
        f"{100 * float(row[name]):.1f}"
        if name == "top1_agreement"
        else f"{float(row[name]):.3f}"
        for name in COLUMNS
    ]


def show(args):
    """Prints the table of students."""
    tokens = args.steps * args.accumulate * args.batch * args.length
    print(
        f"\n{args.held_out * args.length} held-out tokens; students of "
        f"{len(args.layers)} layers, trained on {tokens} tokens in {args.steps} steps; "
        "nats:"
    )
    table = Table("student", "steps", box=box.SIMPLE_HEAD)
    for title in COLUMNS.values():
        table.add_column(title, justify="right")
    before = held_out(args.output, args.ways[0])[0]
    table.add_row("untrained", "0", *cells(before))
    for way in args.ways:
        row = held_out(args.output, way)[-1]
        table.add_row(NAMES[way], row["step"], *cells(row))
    Console(width=80).print(table)


def samples(args, teacher, students):
    print(f'After "{args.prompt}":')
    for name, student in {"teacher": teacher.model, **students}.items():
        text = model.continuation(teacher, student, args.prompt, 24)
        print(f"  {NAMES.get(name, name):12}  {' '.join(text.split())}")


def draw(args):
    path = args.output / "curves.png"
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for way in args.ways:
        style = dict(color=COLOURS[way], label=NAMES[way], linewidth=2)
        metrics = args.output / way / "metrics.csv"
        left.plot(*log.curve(metrics, "train", "loss"), **style)
        right.plot(*log.curve(metrics, "held-out", "kl"), marker="o", **style)
    left.set_title("Loss on the batches, nats")
    right.set_title("KL(teacher ‖ student) on held-out text, nats")
    for axes in left, right:
        axes.set(xlabel="step", xlim=(0, args.steps), ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend()
    figure.savefig(path, dpi=110)
    return path
