"""`python -m jaxkl.parity`, the same as `jaxkl parity`."""

import sys

from jaxkl.__main__ import main


if __name__ == "__main__":
    sys.exit(main(["parity", *sys.argv[1:]]))
