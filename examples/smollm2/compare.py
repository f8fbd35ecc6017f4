# `make distill-lm` builds the environment of this program, .venv.
"""Compares teacher caches: what each costs to store, and how good its student is.

    .venv/bin/python examples/smollm2/compare.py

For each of a few seeds, all students start the same and see the same windows in the
same order. One more student learns from the teacher online, and one from labels alone.
The program does not repeat work that is already done.
"""

import dataclasses
import itertools
from pathlib import Path

import numpy as np
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Table

import cache as caches
import data
import model
import options
import report
import train


KINDS = {
    "hidden": ("hidden", None),
    "top-8": ("top-k", 8),
    "top-64": ("top-k", 64),
    "sampled-8": ("sampled", 8),
    "sampled-64": ("sampled", 64),
}
# Name, cache and tail of each student.
ROWS = (
    ("online", None, "bucket"),
    ("hidden states", "hidden", "bucket"),
    ("top-8, tail bucket", "top-8", "bucket"),
    ("top-8, renormalised", "top-8", "renormalize"),
    ("top-64, tail bucket", "top-64", "bucket"),
    ("top-64, renormalised", "top-64", "renormalize"),
    ("sampled 8", "sampled-8", "renormalize"),
    ("sampled 64", "sampled-64", "renormalize"),
    ("labels alone", None, "bucket"),
)


def write_caches(output, teacher, corpus, progress):
    made = {}
    for name, (kind, k) in KINDS.items():
        folder = output / "caches" / name
        folder.mkdir(parents=True, exist_ok=True)
        temperature = None if kind == "hidden" else 1.0
        settings = dict(kind=kind, k=k, temperature=temperature, seed=0)
        settings["dtype"] = "float16"
        caches.write(folder, teacher, corpus, settings, 64, progress)
        made[name] = caches.Cache.open(folder, teacher, corpus)
    return made


def settings_of(args, name, tail, seed):
    """Makes train.py's settings, with a separate folder for this student."""
    values = {
        "length": args.length,
        "windows": args.windows,
        "held-out": args.held_out,
        "layers": ",".join(map(str, args.layers)),
        "steps": args.steps,
        "evaluate-every": args.steps,
        "save-every": args.steps,
        "seed": seed,
        "tail": tail,
        "output": args.output / name / f"seed-{seed}",
    }
    return train.parse_arguments([f"--{k}={v}" for k, v in values.items()])[1]


def train_student(own, way, teacher, corpus, cache, mesh, judged, progress):
    """Trains a student if necessary, and returns its last held-out row."""
    train.check_settings(own, teacher, corpus, cache)
    if not report.held_out(own.output, way)[1:]:
        train.train(own, way, teacher, corpus, cache, mesh, judged, progress)
    return report.held_out(own.output, way)[-1]


def show(results, made, tokens, seeds, vocab):
    print(f"\n{tokens} tokens; mean ± standard deviation of {seeds} seeds:")
    table = Table("teacher", "bytes a token", box=box.SIMPLE_HEAD)
    for title in report.COLUMNS.values():
        table.add_column(title, justify="right")
    for name, cache, _ in ROWS:
        cells = []
        for column in report.COLUMNS:
            percent = 100 if column == "top1_agreement" else 1
            values = percent * np.array([float(row[column]) for row in results[name]])
            places = 1 if percent == 100 else 3
            cells.append(
                f"{values.mean():.{places}f} ± {values.std(ddof=1):.{places}f}"
            )
        size = f"{made[cache].bytes_per_token:.0f}" if cache else "-"
        table.add_row(name, size, *cells)
    Console(width=88).print(table)
    print(f"All logits in float16 would be {2 * vocab} bytes a token.")


def parse_arguments():
    parser = options.parser(__doc__)
    options.add_data(parser)
    parser.set_defaults(windows=160)
    add = parser.add_argument
    add("--output", type=Path, default=Path("out/compare"), help="folder")
    add("--layers", type=options.layers, default="0,1,8,16,24,29", help="kept")
    add("--steps", type=options.integer(1), default=30, help="updates of each student")
    add("--seeds", type=options.integer(2), default=3, help="a spread needs two")
    args = parser.parse_args()
    options.make_folder(parser, args.output)
    return parser, args


def main():
    parser, args = parse_arguments()
    columns = ("{task.description:20}", BarColumn(20), MofNCompleteColumn())
    columns += (TimeRemainingColumn(), "{task.fields[note]}")
    try:
        teacher = model.load(args.teacher or model.teacher_file())
        cuts = args.length, args.held_out, args.windows
        corpus = data.load(args.text, teacher.tokenizer, *cuts)
        some = settings_of(args, "online", "bucket", 0)
        mesh = train.make_mesh(some)
        results = {name: [] for name, _, _ in ROWS}
        with Progress() as progress:
            made = write_caches(args.output, teacher, corpus, progress)
        with Progress(*columns) as progress:
            judged = train.held_out(some, teacher, corpus, mesh)
            for seed, (name, cache, tail) in itertools.product(range(args.seeds), ROWS):
                own = settings_of(args, name, tail, seed)
                way = "labels" if name == "labels alone" else "distilled"
                source = cache and dataclasses.replace(made[cache], tail=tail)
                run = own, way, teacher, corpus, source, mesh, judged, progress
                results[name].append(train_student(*run))
    except (ValueError, OSError) as error:
        parser.exit(1, f"compare.py: {error}\n")
    tokens = args.steps * some.batch * args.length
    show(results, made, tokens, args.seeds, len(teacher.embedding))


if __name__ == "__main__":
    main()
