"""The commands `jaxkl parity` and `jaxkl parity compare`."""

import argparse
import os
import pathlib
import sys
from collections.abc import Callable

from ._compare import compare
from ._errors import ParityError, require_torch
from ._files import MAX_BYTES, NAMES, read
from ._html import page
from ._report import as_json, comparisons_as_json, comparisons_as_text, table
from ._run import run


HELP = "compare jaxkl with the installed PyTorch, on a battery of cases"
COMPARE = "compare your own arrays, and name the mistake if a recorded loss differs"
FILES = (
    f".npz, .safetensors or .pt with the arrays {', '.join(NAMES[:2])}, and as far as "
    f"recorded {', '.join(NAMES[2:7])}; or with the logits student and teacher, for "
    "distillation_loss; or two .npy files, an input and its target"
)
STDOUT = "-"
Command = Callable[[argparse.Namespace], int]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Gives the parser all options; `arguments.run(arguments)` is the exit status."""
    _add_output(parser)
    parser.add_argument(
        "--html", metavar="FILE", help="write a self-contained page with the report"
    )
    parser.add_argument(
        "--group",
        action="append",
        metavar="NAME",
        help="run this group only; may be given several times",
    )
    parser.set_defaults(run=_reporting(_battery))
    commands = parser.add_subparsers(metavar="compare FILE…")
    _add_compare(commands.add_parser("compare", help=COMPARE, description=COMPARE))


def _add_compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE", help=FILES)
    parser.add_argument(
        "--reduction",
        choices=("none", "sum", "mean", "batchmean"),
        default="batchmean",
        help="what the recorded loss is meant to be (default: batchmean)",
    )
    parser.add_argument(
        "--log-target", action="store_true", help="target holds log-probabilities"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        metavar="T",
        help="the recorded loss is meant to be T² times kl_div (default: the file's)",
    )
    parser.add_argument(
        "--max-bytes",
        type=int,
        default=MAX_BYTES,
        metavar="N",
        help=f"refuse files with larger arrays (default: {MAX_BYTES})",
    )
    _add_output(parser)
    parser.set_defaults(run=_reporting(_compare))


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json",
        nargs="?",
        const=STDOUT,
        metavar="FILE",
        help="write the report as JSON, to standard output if no FILE is given",
    )
    parser.add_argument(
        "--force", action="store_true", help="write over files that exist"
    )


def _reporting(command: Command) -> Command:
    """A command that cannot be run says why and exits with 2, without a traceback."""

    def run(arguments: argparse.Namespace) -> int:
        try:
            return command(arguments)
        except ParityError as error:
            print(f"jaxkl parity: {error}", file=sys.stderr)
            return 2

    return run


def _battery(arguments: argparse.Namespace) -> int:
    _check_outputs(arguments.force, arguments.json, arguments.html)
    talk = lambda line: print(line, file=sys.stderr, flush=True)
    report = run(arguments.group, progress=talk)
    if arguments.json != STDOUT:
        print(table(report))
    if arguments.json:
        _write(arguments.json, as_json(report), arguments.force)
    if arguments.html:
        _write(arguments.html, page(report), arguments.force)
    return 0 if report.agrees else 1


def _compare(arguments: argparse.Namespace) -> int:
    require_torch()
    _check_outputs(arguments.force, arguments.json)
    options = arguments.reduction, arguments.log_target, arguments.temperature
    recordings = read(arguments.files, arguments.max_bytes)
    comparisons = [compare(recording, *options) for recording in recordings]
    if arguments.json != STDOUT:
        print(comparisons_as_text(comparisons))
    if arguments.json:
        _write(arguments.json, comparisons_as_json(comparisons), arguments.force)
    return 0 if all(c.agrees for c in comparisons) else 1


def _check_outputs(force: bool, *paths: str | None) -> None:
    """Finds out before the work whether the files can be written."""
    for path in paths:
        if path and path != STDOUT:
            _check_output(pathlib.Path(path), force)


def _check_output(path: pathlib.Path, force: bool) -> None:
    if path.is_dir():
        raise ParityError(f"cannot write {path}: it is a directory")
    if path.exists() and not force:
        raise ParityError(f"{path} exists; --force writes over it")
    if not path.parent.is_dir():
        raise ParityError(f"cannot write {path}: there is no directory {path.parent}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ParityError(f"cannot write {path}: permission denied")


def _write(path: str, text: str, force: bool) -> None:
    if path == STDOUT:
        print(text)
        return
    try:
        with open(path, "w" if force else "x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise ParityError(f"cannot write {path}: {error.strerror}") from None
