"""`jaxkl parity` and `jaxkl parity compare`."""

import argparse
import pathlib
import sys

from ._errors import ParityError


HELP = "compare jaxkl with the installed PyTorch, on a battery of cases"
STDOUT = "-"


def add_arguments(parser: argparse.ArgumentParser) -> None:
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


def _add_output(parser):
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


def _reporting(command):
    """Runs a command: exit status 2, and no traceback, if it cannot be run."""

    def run(arguments):
        try:
            return command(arguments)
        except ParityError as error:
            print(f"jaxkl parity: {error}", file=sys.stderr)
            return 2

    return run


def _battery(arguments):
    from . import _report, _run

    _check_free(arguments, arguments.json, arguments.html)
    talk = lambda line: print(line, file=sys.stderr, flush=True)
    report = _run.run(arguments.group, progress=talk)
    if arguments.json != STDOUT:
        print(_report.table(report))
    if arguments.json:
        _write(arguments, arguments.json, _report.as_json(report))
    if arguments.html:
        from ._html import page

        _write(arguments, arguments.html, page(report))
    return 0 if report.agrees else 1


def _check_free(arguments, *paths):
    """Before the work: nothing is written over."""
    for path in paths:
        if path and path != STDOUT and not arguments.force:
            if pathlib.Path(path).exists():
                raise ParityError(f"{path} exists; --force writes over it")


def _write(arguments, path, text):
    if path == STDOUT:
        print(text)
        return
    try:
        with open(path, "w" if arguments.force else "x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise ParityError(f"cannot write {path}: {error.strerror}") from None
