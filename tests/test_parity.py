"""`jaxkl parity`: the battery agrees with PyTorch and optax, and it can fail."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkl
from jaxkl import parity
from jaxkl.__main__ import main
from jaxkl.parity import _cases, _data, _measure, _report, _run

from .cases import rarely
from .helpers import run_python


QUICK = (
    "legacy arguments", "errors", "shapes", "dtypes", "special values", "second order",
)  # fmt: skip
SLOW = "optax", "reductions", "log_target"
# Of the reference, which differs at special values.
OF_REFERENCE = "legacy arguments", "errors", "shapes", "dtypes"


@pytest.mark.parametrize("group", [*QUICK, *rarely(*SLOW)])
def test_all_agree(group):
    report = parity.run([group], progress=lambda line: None)
    assert report.agrees and not report.failures, _report.table(report)
    assert not jax.config.read("jax_enable_x64")
    assert group == "errors" or sum(r.difference.numbers for r in report.results) > 20
    for r in _report.groups(report).get("reductions", ()):  # not of the gradients
        if r.case.dtypes[0] in ("float16", "bfloat16"):
            assert r.difference.ulp <= 0.5001  # rounded once


def test_the_battery_is_complete():
    cases = parity.battery()
    assert len({(c.group, c.name) for c in cases}) == len(cases) == 297
    assert {c.group for c in cases} == {*QUICK, *SLOW}
    assert sum(c.group == "errors" for c in cases) == 9


@pytest.mark.parametrize("group", [*OF_REFERENCE[:2], *rarely(*OF_REFERENCE[2:])])
def test_the_reference_agrees(monkeypatch, group):
    monkeypatch.setattr(jaxkl, "kl_div", jaxkl.reference.kl_div)
    report = parity.run([group], progress=lambda line: None)
    assert report.agrees, _report.table(report)


@pytest.mark.parametrize("dtype", rarely("float32", "float64"))
@pytest.mark.parametrize("log_target", [False, True])
def test_second_order_at_other_cotangents(dtype, log_target):
    """Beside those of the battery, also where both are 0."""
    more = dict(make=_data.second_order, kind="second_order", dtypes=(dtype, dtype))
    cases = [
        _cases._case("", str(c), "none", log_target, _data.special, *c, **more)
        for c in ((0.0, 0.0), (0.0, -3.0), (1.0, 1.0))
    ]
    # At a negative target PyTorch's 0 · log(-1) = 0, which a linear rule cannot have.
    cases[0] = dataclasses.replace(cases[0], quantities=("d2_input", "d2_target"))
    assert _run.run_cases(cases, progress=lambda line: None).agrees


# -- It can fail

kl_div = jaxkl.kl_div


def mutant(change):
    """`kl_div` changed, of input, target, and its other arguments in their order."""

    def wrong(x, t, size_average=None, reduce=None, reduction="mean", log_target=False):
        return change(x, t, (size_average, reduce, reduction, log_target))

    return wrong


def mean_for_batchmean(x, t, o):
    return kl_div(x, t, *o[:2], o[2].replace("batchmean", "mean"), o[3])


def half_a_gradient(x, t, o):
    return kl_div(x, (t + jax.lax.stop_gradient(t)) / 2, *o)


def bfloat16_inside(x, t, o):
    return kl_div(x.astype(jnp.bfloat16), t, *o).astype(x.dtype)


def accepts_all_dtypes(x, t, o):
    return kl_div(x.astype(float), t.astype(float), *o)


MUTANTS = {
    "log_target dropped": (
        lambda x, t, o: kl_div(x, t, *o[:3]),
        "log_target, special values, second order",
    ),
    "batchmean": (mean_for_batchmean, "reductions, shapes, legacy arguments"),
    "zero gradient": (
        lambda x, t, o: jax.lax.stop_gradient(kl_div(x, t, *o)),
        "shapes, second order",
    ),
    "half a gradient": (half_a_gradient, "shapes, second order"),
    "dtype": (
        lambda x, t, o: kl_div(x, t, *o).astype(jnp.float32),
        "dtypes, reductions",
    ),
    "bfloat16 inside": (bfloat16_inside, "reductions"),
    "no NaN": (
        lambda x, t, o: jnp.nan_to_num(kl_div(x, t, *o), nan=0.0),
        "special values",
    ),
    "shape": (lambda x, t, o: kl_div(x, t, *o)[None], "shapes, legacy arguments"),
    "silent": (
        lambda x, t, o: kl_div(x, t, None, None, "sum", o[3]),
        "legacy arguments",
    ),
    "accepts all dtypes": (accepts_all_dtypes, "errors"),
    "raises": (lambda x, t, o: 1 / 0, "shapes, second order"),
}


# The cases of each group that are quick and have caught a mutant.
SAMPLE = {
    "reductions": r"float64 \(1, 8\)|float32 \(16, 256\)",
    "log_target": r"float32 \(1, 8\)",
    "legacy arguments": r"kl_div.*'(mean|batchmean|unknown)'",
    "shapes": r"\(2, 3, 5\)|\(0, 3\)",
    "dtypes": r"bfloat16 \(2, 3\), bfloat16 \(2, 3\)",
    "special values": "float64",
    "second order": r"float64 \(2, 3\), \(2, 3\).*log_target",
    "errors": "",
}


@pytest.mark.parametrize("change, groups", MUTANTS.values(), ids=MUTANTS)
def test_reports_a_wrong_kl_div(monkeypatch, change, groups):
    monkeypatch.setattr(jaxkl, "kl_div", mutant(change))
    groups = groups.split(", ")
    cases = [c for c in parity.battery(optax=False) if c.group in groups]
    cases = [c for c in cases if re.search(SAMPLE[c.group], c.name)]
    report = _run.run_cases(cases, progress=lambda line: None)
    assert {r.case.group for r in report.failures} == set(groups)
    assert not report.agrees and "DIFFER" in _report.summary(report)


@pytest.mark.slow
def test_reports_wrong_losses(monkeypatch):
    right = jaxkl.losses.kl_divergence
    wrong = lambda x, t, axis, where=None: right(x, t, axis)
    monkeypatch.setattr(jaxkl.losses, "kl_divergence", wrong)
    report = parity.run(["optax"], progress=lambda line: None)
    assert report.failures
    assert all("where" in r.case.name for r in report.failures)


@pytest.mark.parametrize(
    "actual, problem",
    [
        (np.float32([1, 2]), ""),
        (np.float32([1, 2 + 5 * 2**-22]), "5 ulp, 4 allowed"),
        (np.float64([1, 2]), "dtype float64, expected float32"),
        (np.float32([[1, 2]]), "shape (1, 2), expected (2,)"),
        (np.float32([1, np.nan]), "nan where 2.0 is expected"),
        (np.float32([1, np.inf]), "inf where 2.0 is expected"),
    ],
)
def test_difference(actual, problem):
    expected = np.float32([1, 2])
    found = _measure.difference(actual, expected, expected, np.abs(expected), 1)
    assert found.problem == problem


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_special_values_must_be_the_same(number):
    expected, every = np.float32([number]), np.float32([np.nan, np.inf, -np.inf, 0])
    for actual in np.split(every, 4):
        found = _measure.difference(actual, expected, expected, np.ones(1), 1)
        assert (not found.problem) == np.array_equal(actual, expected, equal_nan=True)


# -- The command


def test_command(capsys):
    assert main(["parity", "--group", "errors"]) == 0
    shown = capsys.readouterr()
    assert shown.out.endswith("\nall 9 cases agreed\n")
    assert shown.err == "errors: 9 cases\n"
    assert main(["parity", "--group", "nonsense"]) == 2
    assert "there are reductions, " in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"jaxkl {jaxkl.__version__}\n"


def test_exit_status_of_a_mismatch(monkeypatch, capsys):
    monkeypatch.setattr(jaxkl, "kl_div", mutant(accepts_all_dtypes))
    assert main(["parity", "--group", "errors"]) == 1
    shown = capsys.readouterr().out
    assert "DIFFER" in shown and "expected error" in shown


def test_without_pytorch():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from jaxkl.__main__ import main; sys.exit(main(['parity']))"
    )
    shown = run_python("-c", code)
    assert shown.returncode == 2
    assert 'pip install "torch==2.13.0"' in shown.stderr
    assert "Traceback" not in shown.stderr


@pytest.mark.parametrize("command", [[], ["parity"], ["parity", "compare"]])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith(" ".join(["usage: jaxkl", *command]))
