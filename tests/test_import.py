"""`import jaxkl` imports no more than it needs, and no folder one above it."""

import ast
from pathlib import Path

import jaxkl

from .helpers import run_python


PACKAGE = Path(jaxkl.__file__).parent
# Of each folder, those that its files may import.
BELOW = {"_util": set(), "_math": {"_util"}, "_torch": {"_util"}}
BELOW["_source"] = BELOW["_divergence"] = {"_math", "_util"}
BELOW["_engine"] = {"_source", "_divergence", "_math", "_util"}
BELOW["_api"] = {"_engine", *BELOW["_engine"]}


def test_imports_only_what_it_needs():
    code = (
        "import sys, jax; before = set(sys.modules)\n"
        "import jaxkl; print(*sorted(set(sys.modules) - before))"
    )
    shown = run_python("-c", code)
    assert shown.returncode == 0, shown.stderr
    new = set(shown.stdout.split())
    assert "jaxkl.losses" in new
    roots = {name.partition(".")[0] for name in new}
    assert not roots & {"torch", "optax", "flax", "chex", "importlib", "email"}
    assert not {name for name in new if name.startswith("jaxkl.parity")}
    assert "jax.experimental.checkify" not in new


def test_no_folder_imports_one_above_it():
    folders = {x.parent.name for x in PACKAGE.glob("_*/*.py")} - {"__pycache__"}
    assert folders == BELOW.keys()
    for folder, below in BELOW.items():
        for file in (PACKAGE / folder).glob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom) and node.level > 1:
                    imported = (node.module or "jaxkl").partition(".")[0]
                    assert imported in below, f"{folder}/{file.name}: {imported}"
