"""Runs cells, prints their tables and writes them to `benchmarks/results/`."""

import argparse
import os
import sys


# If libtpu is installed, JAX would otherwise search a minute for a TPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from . import (
    ceilings,
    dense,
    given,
    heads,
    labels,
    memory,
    plans,
    report,
    sharded,
    sparse,
    tpu,
)
from .harness import Settings


CELLS = {
    cell.name: cell
    for module in (
        ceilings,
        given,
        dense,
        sparse,
        heads,
        labels,
        tpu,
        plans,
        sharded,
        memory,
    )
    for cell in module.CELLS
}


def parse_arguments():
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--cell",
        metavar="NAME",
        action="append",
        help="a cell name or a prefix of names; may be repeated; default: all",
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=Settings.rounds,
        help="timed runs of each peer; 0 compiles and checks (default: %(default)s)",
    )
    parser.add_argument(
        "--smoke",
        action="store_true",
        help="use tiny shapes to test the harness; write no file",
    )
    parser.add_argument("--list", action="store_true", help="list the cells and exit")
    args = parser.parse_args()
    if args.rounds < 0:
        parser.error(f"argument --rounds: expected 0 or more, got {args.rounds}")
    for name in args.cell or ():
        if not any(cell.startswith(name) for cell in CELLS):
            parser.error(f"argument --cell: no {name!r} in {', '.join(CELLS)}")
    return args


def main():
    args = parse_arguments()
    prefixes = tuple(args.cell or [""])
    cells = [cell for name, cell in CELLS.items() if name.startswith(prefixes)]
    if args.list:
        for cell in cells:
            print(f"{cell.name:22}{cell.title}")
        return
    settings = Settings(args.rounds, args.smoke)
    if args.smoke:
        print("Tiny shapes, not those of the titles: these numbers mean nothing.\n")
    wrong, missed = [], []
    for cell in cells:
        facts = report.machine()
        result = cell.run(settings)
        report.show(cell, result, facts, settings.rounds)
        if not args.smoke:
            report.save(cell, result, facts, settings.rounds)
        for row in result.rows:
            if row["state"] == "WRONG" and row["required"]:
                wrong.append(f"{cell.name}: {row['peer']}")
        missed += [
            f"{cell.name}: {target.what}"
            for target in result.targets
            if target.verdict == "MISSED"
        ]
    for what, names in (("Missed bounds", missed), ("WRONG results", wrong)):
        if names and not args.smoke:
            print(f"{what}:", *names, sep="\n  ")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
