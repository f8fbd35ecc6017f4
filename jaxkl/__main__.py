"""The command line: `jaxkl parity`."""

import argparse
import sys

from . import __version__


def main(argv: list[str] | None = None) -> int:
    """Runs a command; what its user must mend is printed, without a traceback."""
    parser = argparse.ArgumentParser(
        "jaxkl", description="KL divergence and distillation losses for JAX."
    )
    parser.add_argument("--version", action="version", version=f"jaxkl {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    from .parity import _cli, ParityError

    _cli.add_arguments(
        commands.add_parser("parity", help=_cli.HELP, description=_cli.HELP)
    )
    arguments = parser.parse_args(argv)
    try:
        return arguments.run(arguments)
    except ParityError as error:
        print(f"jaxkl parity: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
