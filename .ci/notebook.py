"""Runs examples/distillation.ipynb and compares its outputs with the committed ones.

`make notebook` runs this program, and `make notebook ARGS=--write` replaces the
committed outputs. It exits with 1 if a cell raises, writes to stderr, or shows other
outputs than the committed ones.
"""

import argparse
import os
import re
import sys
from itertools import zip_longest
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError


ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "examples" / "distillation.ipynb"
# Another CPU rounds differently, and training amplifies the difference. Fractions may
# differ by this relative error or by one in the last place; integers must be equal.
TOLERANCE = 0.01
NUMBER = re.compile(r"([-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?)")
PNG = "image/png"
LARGEST = 600 * 1024


def execute(notebook):
    """Returns the notebook with new outputs, from a new kernel."""
    os.environ |= {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}
    fresh = nbformat.from_dict(notebook)
    for cell in code_cells(fresh):
        cell.outputs, cell.execution_count = [], None
    NotebookClient(
        fresh,
        timeout=600,
        kernel_name="python3",
        extra_arguments=["--log-level=ERROR"],  # The kernel warns of its open ports.
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(NOTEBOOK.parent)}},
    ).execute()
    name = {"display_name": "Python 3", "language": "python", "name": "python3"}
    fresh.metadata = {"kernelspec": name, "language_info": {"name": "python"}}
    return fresh


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shown(cell):
    """Returns (kind, text) of each output as a reader sees it, with streams joined."""
    parts = []
    for output in cell.outputs:
        if output.output_type == "stream":
            if parts and parts[-1][0] == output.name:
                parts[-1] = (output.name, parts[-1][1] + output.text)
            else:
                parts.append((output.name, output.text))
        elif PNG in output.get("data", {}):
            parts.append((PNG, ""))
        else:
            data = output.get("data", {})
            parts.append((output.output_type, data.get("text/plain", "")))
    return parts


def same(expected, actual):
    """Returns whether two texts are equal up to spaces and the tolerance."""
    expected, actual = (NUMBER.split(" ".join(x.split())) for x in (expected, actual))
    if len(expected) != len(actual):
        return False
    words = zip(expected[::2], actual[::2], strict=True)
    numbers = zip(expected[1::2], actual[1::2], strict=True)
    return all(a.strip() == b.strip() for a, b in words) and all(
        same_number(a, b) for a, b in numbers
    )


def same_number(expected, actual):
    if "." not in expected:
        return expected == actual
    mantissa, _, exponent = expected.partition("e")
    last_place = 10.0 ** (int(exponent or 0) - len(mantissa.split(".")[1]))
    difference = abs(float(expected) - float(actual))
    return difference <= max(TOLERANCE * abs(float(expected)), 1.01 * last_place)


def problems(committed, fresh):
    for i, cell in enumerate(code_cells(committed), 1):
        if cell.execution_count != i:
            yield f"cell {cell.id}: the cells were not executed in order"
    for old, new in zip(code_cells(committed), code_cells(fresh), strict=True):
        for a, b in zip_longest(shown(old), shown(new), fillvalue=("nothing", "")):
            if a[0] != b[0] or not same(a[1], b[1]):
                yield f"cell {old.id}: the committed output is {a[0]}\n{a[1]}"
                yield f"the new output is {b[0]}\n{b[1]}"
    yield from unfit(fresh)
    yield from unfit(committed)


def unfit(notebook):
    """Yields what must not be in a committed notebook."""
    text = nbformat.writes(notebook)
    for cell in code_cells(notebook):
        yield from (f"cell {cell.id}: {x}" for k, x in shown(cell) if k == "stderr")
    if len(text.encode()) > LARGEST:
        yield f"the notebook has {len(text.encode())} bytes, more than {LARGEST}"
    for folder in (str(ROOT), str(Path.home()) + os.sep, sys.prefix):
        if folder in text:
            yield f"the notebook contains a path of this machine, {folder}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="replace the outputs")
    args = parser.parse_args()
    committed = nbformat.read(NOTEBOOK, as_version=4)
    try:
        fresh = execute(committed)
    except CellExecutionError as error:
        sys.exit(str(error))
    found = list(unfit(fresh) if args.write else problems(committed, fresh))
    if found:
        sys.exit("\n\n".join(found))
    if args.write:
        nbformat.write(fresh, NOTEBOOK)
    what = "written" if args.write else "as committed"
    print(f"{NOTEBOOK.relative_to(ROOT)}: {len(code_cells(fresh))} cells, {what}")


if __name__ == "__main__":
    main()
