"""`jaxkl parity`: the battery agrees with PyTorch and optax, and it can fail."""

import importlib.metadata
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkl
from jaxkl import parity
from jaxkl.__main__ import main
from jaxkl.parity import _html, _measure, _report, _run, _snippet

from .helpers import run_python


whole = pytest.mark.slow  # the battery takes a minute


@pytest.fixture(scope="module")
def report():
    return parity.run(progress=lambda line: None)


@whole
def test_all_agree(report):
    assert report.agrees, _report.table(report)
    assert not report.failures


@whole
def test_every_group_compares_numbers(report):
    groups = {g.name: g for g in _report.groups(report)}
    promised = (
        *("reductions", "log_target", "legacy arguments", "shapes", "dtypes"),
        *("special values", "reductions, gradients", "second order", "optax"),
    )
    for name in promised:
        assert groups[name].cases > 1 and groups[name].numbers > 20
    assert groups["errors"].cases == 9


@whole
def test_no_case_twice(report):
    names = [(r.group, r.case.name, r.quantity) for r in report.results]
    assert len(set(names)) == len(names)


@whole
def test_half_precision_is_nearer_than_pytorch(report):
    for r in report.results:
        if r.group == "reductions" and r.case.dtypes[0] in ("float16", "bfloat16"):
            # Half an ulp: rounded once.
            assert r.difference.ulp <= 0.5001
            assert r.difference.ulp <= r.difference.peer_ulp + 1e-3


@whole
def test_json(report):
    content = json.loads(_report.as_json(report))
    assert content["agrees"] and len(content["results"]) == len(report.results)
    assert content["versions"]["torch"] == importlib.metadata.version("torch")


@whole
def test_page_needs_nothing_else(report):
    page = _html.page(report)
    assert not re.search(r"(src|href)=|url\(|@import|<script", page)
    assert page.count("<circle") > 20 and "cases agreed" in page


def test_page_explains_its_columns():
    page = _html.page(run_sample(["errors", "shapes"]))
    (table,) = re.findall(r"<table>(.*?)</table>", page, re.DOTALL)
    headers = re.findall(r"<th[^>]*>([^<]*)</th>", table)[2:]
    assert headers[:2] == ["cases", "numbers"] and "peer&#x27;s own" in headers
    explained = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", page))
    assert list(explained) == headers
    assert "error of the peer itself" in explained["peer&#x27;s own"]
    # On a narrow screen each cell stands alone, beside its label.
    rows = re.findall(r"<tr[^>]*><td.*?</tr>", table)
    assert len(rows) == 3  # values, their gradients, errors
    for row in rows:
        assert re.findall(r'data-label="(.*?)"', row) == headers


# -- It can fail

kl_div = jaxkl.kl_div


def mutant(change):
    def wrong(
        input,
        target,
        size_average=None,
        reduce=None,
        reduction="mean",
        log_target=False,
    ):
        return change(input, target, (size_average, reduce, reduction, log_target))

    return wrong


def zero_gradient(x, t, options):
    return jax.lax.stop_gradient(kl_div(x, t, *options))


def half_gradient_of_target(x, t, options):
    return kl_div(x, (t + jax.lax.stop_gradient(t)) / 2, *options)


MUTANTS = {
    "log_target dropped": (
        lambda x, t, o: kl_div(x, t, *o[:3]),
        ("log_target", "special values", "second order"),
    ),
    "mean for batchmean": (
        lambda x, t, o: kl_div(
            x, t, *o[:2], o[2].replace("batchmean", "mean"), log_target=o[3]
        ),
        ("reductions", "shapes", "legacy arguments"),
    ),
    "zero gradient": (zero_gradient, ("shapes", "second order")),
    "half a gradient": (half_gradient_of_target, ("shapes", "second order")),
    "dtype": (
        lambda x, t, o: kl_div(x, t, *o).astype(jnp.float32),
        ("dtypes", "reductions"),
    ),
    "bfloat16 inside": (
        lambda x, t, o: kl_div(x.astype(jnp.bfloat16), t, *o).astype(x.dtype),
        ("reductions",),
    ),
    "no NaN": (
        lambda x, t, o: jnp.nan_to_num(kl_div(x, t, *o), nan=0.0),
        ("special values",),
    ),
    "shape": (lambda x, t, o: kl_div(x, t, *o)[None], ("shapes", "legacy arguments")),
    "silent": (
        lambda x, t, o: kl_div(x, t, None, None, "sum", o[3]),
        ("legacy arguments",),
    ),
    "accepts all dtypes": (
        lambda x, t, o: kl_div(x.astype(float), t.astype(float), *o),
        ("errors",),
    ),
    "raises": (lambda x, t, o: 1 / 0, ("shapes", "second order")),
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


def run_sample(groups):
    cases = [c for c in parity.battery(optax=False) if c.group in groups]
    cases = [c for c in cases if re.search(SAMPLE[c.group], c.name)]
    assert {c.group for c in cases} == set(groups)
    return _run.run_cases(cases, progress=lambda line: None)


@pytest.mark.parametrize("change, groups", MUTANTS.values(), ids=MUTANTS)
def test_reports_a_wrong_kl_div(monkeypatch, change, groups):
    monkeypatch.setattr(jaxkl, "kl_div", mutant(change))
    report = run_sample(groups)
    assert {r.case.group for r in report.failures} == set(groups)
    assert not report.agrees and "DIFFER" in _report.summary(report)


@pytest.mark.slow
def test_reports_wrong_losses(monkeypatch):
    right = jaxkl.losses.kl_divergence
    wrong = lambda x, t, axis, where: right(x, t, axis)
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
    expected = np.float32([number])
    for actual in (np.float32([x]) for x in (np.nan, np.inf, -np.inf, 0.0)):
        found = _measure.difference(actual, expected, expected, np.ones(1), 1)
        assert (not found.problem) == np.array_equal(actual, expected, equal_nan=True)


# -- The snippets


@pytest.mark.slow
def test_a_snippet_shows_both_frameworks(monkeypatch, tmp_path):
    dropped, _ = MUTANTS["log_target dropped"]
    monkeypatch.setattr(jaxkl, "kl_div", mutant(dropped))
    report = run_sample(["second order"])
    page = _html.page(report)
    assert "differ" in page and page.count("<pre>") == min(
        len(report.failures), _html.SNIPPETS
    )
    failure = report.failures[0]
    program = tmp_path / "snippet.py"
    program.write_text(_snippet.snippet(failure), encoding="utf-8")
    # A process where nothing is wrong: all three print the same number.
    shown = run_python(program)
    assert shown.returncode == 0, shown.stderr
    lines = dict(line.split(": ", 1) for line in shown.stdout.splitlines())
    assert list(lines) == ["jaxkl", "PyTorch", "PyTorch in float64"]
    assert lines["jaxkl"] == lines["PyTorch"]
    expected = f"{failure.quantity}{list(failure.difference.index)} = "
    assert lines["jaxkl"].startswith(expected)


@whole
def test_every_snippet_compiles(report):
    functions = set()
    for r in report.results:
        key = r.case.function, r.case.make, r.case.peer
        if key not in functions:
            functions.add(key)
            compile(_snippet.snippet(r), r.case.name, "exec")
    assert len(functions) >= 7


# -- The command


def test_command(capsys, tmp_path):
    html, numbers = tmp_path / "report.html", tmp_path / "report.json"
    command = ["parity", "--group", "errors"]
    assert main([*command, "--html", str(html), "--json", str(numbers)]) == 0
    assert "all 9 cases agreed" in capsys.readouterr().out
    assert html.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert json.loads(numbers.read_text(encoding="utf-8"))["agrees"]

    # Nothing is written over, and nothing is run in vain.
    html.write_text("mine")
    assert main([*command, "--html", str(html)]) == 2
    error = capsys.readouterr().err
    assert "exists" in error and "errors: " not in error
    assert html.read_text() == "mine"
    assert main([*command, "--html", str(html), "--force"]) == 0
    assert html.read_text(encoding="utf-8") != "mine"
    capsys.readouterr()

    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["summary"] == "all 9 cases agreed"
    assert main(["parity", "--group", "nonsense"]) == 2
    assert "there are reductions, " in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--html", "--json"])
@pytest.mark.parametrize("path", ["no/page", "file/page", "folder"])
def test_what_cannot_be_written_is_said_first(tmp_path, capsys, option, path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    path = tmp_path / path
    command = ["parity", "--group", "errors", option, str(path), "--force"]
    assert main(command) == 2
    shown = capsys.readouterr()
    assert f"cannot write {path}: " in shown.err
    assert "errors: 9 cases" not in shown.err and not shown.out


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"jaxkl {jaxkl.__version__}\n"


def test_exit_status_of_a_mismatch(monkeypatch, capsys):
    accepts, _ = MUTANTS["accepts all dtypes"]
    monkeypatch.setattr(jaxkl, "kl_div", mutant(accepts))
    assert main(["parity", "--group", "errors"]) == 1
    shown = capsys.readouterr().out
    assert "DIFFER" in shown and "expected error" in shown


@whole
def test_leaves_x64_as_it_was(report):
    assert not jax.config.read("jax_enable_x64")


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
def test_help(command):
    shown = run_python("-m", "jaxkl", *command, "--help")
    assert shown.returncode == 0
    assert shown.stdout.startswith(" ".join(["usage: jaxkl", *command]))
