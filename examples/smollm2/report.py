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
}
OWN_TEXT = {"own_kl": "KL on own text"}


def held_out(output, way):
    """Returns the held-out rows of a run's metrics.csv."""
    rows = log.read(output / way / "metrics.csv")
    return [row for row in rows if row["split"] == "held-out"]


def tokens(output, way):
    """Returns the number of tokens in a student's losses."""
    rows = log.read(output / way / "metrics.csv")
    return sum(int(row["tokens"]) for row in rows if row["tokens"])


def cells(row, columns=COLUMNS):
    return [
        f"{100 * float(row[name]):.1f}"
        if name == "top1_agreement"
        else f"{float(row[name]):.3f}"
        for name in columns
    ]


def show(args):
    """Prints the table of students."""
    print(
        f"\n{args.held_out * args.length} held-out tokens; students of "
        f"{len(args.layers)} layers, after {args.steps} steps; nats:"
    )
    table = Table("student", box=box.SIMPLE_HEAD)
    columns = COLUMNS | OWN_TEXT if args.on_policy else COLUMNS
    for title in ("tokens", *columns.values()):
        table.add_column(title, justify="right")
    before = held_out(args.output, args.ways[0])[0]
    table.add_row("untrained", "0", *cells(before, columns))
    for way in args.ways:
        row = held_out(args.output, way)[-1]
        count = str(tokens(args.output, way))
        table.add_row(NAMES[way], count, *cells(row, columns))
    Console(width=88).print(table)


def samples(args, teacher, students):
    print(f'After "{args.prompt}":')
    for name, student in {"teacher": teacher.model, **students}.items():
        text = continuation(teacher, student, args.prompt, 24)
        print(f"  {NAMES.get(name, name):12}  {' '.join(text.split())}")


def draw(args):
    path = args.output / "curves.png"
    judged = {"kl": "KL(teacher ‖ student) on held-out text, nats"}
    if args.on_policy:
        judged["own_kl"] = "KL(student ‖ teacher) on own text, nats"
    count = 1 + len(judged)
    figure = Figure(figsize=(10 if count == 2 else 13, 4.2), layout="constrained")
    left, *others = figure.subplots(1, count)
    for way in args.ways:
        style = dict(color=COLOURS[way], label=NAMES[way], linewidth=2)
        metrics = args.output / way / "metrics.csv"
        left.plot(*log.curve(metrics, "train", "loss"), **style)
        if way == "on-policy":
            own = log.curve(metrics, "own-text", "loss")
            left.plot(*own, ".", color=COLOURS[way])
        for axes, name in zip(others, judged, strict=True):
            curve = log.curve(metrics, "held-out", name)
            axes.plot(*curve, marker="o", **style)
    dots = " (dots: own text)" if args.on_policy else ""
    left.set_title(f"Loss on the batches{dots}, nats")
    for axes, title in zip(others, judged.values(), strict=True):
        axes.set_title(title)
    for axes in left, *others:
        axes.set(xlabel="step", xlim=(0, args.steps), ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend()
    figure.savefig(path, dpi=110)
    return path
