"""`import jaxkl` imports no more than it needs."""

from .helpers import run_python


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
