"""The commands `jaxkl parity` and `jaxkl parity compare`."""

import argparse
import sys

from ._compare import compare
from ._errors import require_torch
from ._files import MAX_BYTES, NAMES, read
from ._report import comparison_as_text, table
from ._run import run


HELP = "compare jaxkl with the installed PyTorch, on a battery of cases"
COMPARE = "compare your own arrays, and name the mistake if a recorded loss differs"
FILES = (
    f".npz, .safetensors or .pt with the arrays {', '.join(NAMES[:2])}, and as far as "
    f"recorded {', '.join(NAMES[2:7])}; or with the logits student and teacher, for "
    "distillation_loss; or two .npy files, an input and its target"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Gives the parser all options; `arguments.run(arguments)` is the exit status."""
    parser.add_argument(
        "--group",
        action="append",
        metavar="NAME",
        help="run this group only; may be given several times",
    )
    parser.set_defaults(run=_battery)
    commands = parser.add_subparsers(metavar="compare FILE…")
    own = commands.add_parser("compare", help=COMPARE, description=COMPARE)
    own.set_defaults(run=_compare)
    own.add_argument("files", nargs="+", metavar="FILE", help=FILES)
    own.add_argument(
        "--reduction",
        choices=("none", "sum", "mean", "batchmean"),
        default="batchmean",
        help="what the recorded loss is meant to be (default: batchmean)",
    )
    own.add_argument(
        "--log-target", action="store_true", help="target holds log-probabilities"
    )
    own.add_argument(
        "--temperature",
        type=float,
        metavar="T",
        help="the recorded loss is meant to be T² times kl_div (default: the file's)",
    )
    own.add_argument(
        "--max-bytes",
        type=int,
        default=MAX_BYTES,
        metavar="N",
        help=f"refuse files with larger arrays (default: {MAX_BYTES})",
    )


def _battery(arguments: argparse.Namespace) -> int:
    talk = lambda line: print(line, file=sys.stderr, flush=True)
    report = run(arguments.group, progress=talk)
    print(table(report))
    return 0 if report.agrees else 1


def _compare(arguments: argparse.Namespace) -> int:
    require_torch()
    options = arguments.reduction, arguments.log_target, arguments.temperature
    recordings = read(arguments.files, arguments.max_bytes)
    comparisons = [compare(recording, *options) for recording in recordings]
    print("\n\n".join(map(comparison_as_text, comparisons)))
    return 0 if all(c.agrees for c in comparisons) else 1
