"""What the command line shows, as text and as JSON."""

import dataclasses
import json
import math
from collections.abc import Collection, Sequence
from typing import Any

from ._cases import NOT_COMPARED
from ._compare import Comparison, Recorded
from ._measure import ELEMENTWISE
from ._run import Report, Result
from ._snippet import snippet


HOW = (
    "The peer is PyTorch; in the groups of optax it is optax. Dtype, shape, NaN and "
    "infinities must be the peer's in the same dtype. Finite numbers are compared with "
    "the peer in float64, on the same numbers"
)
# What the fields of `Group` mean, as the page and the JSON explain them.
COLUMNS = {
    "cases": "how many calls were made in both frameworks",
    "numbers": "how many numbers were compared",
    "ulp": "the largest error of jaxkl, in units in the last place of the result's "
    "dtype, at the size of the terms that are added up; "
    f"{ELEMENTWISE:g} are allowed, and for a sum of n terms √n more",
    "peer_ulp": "the largest error of the peer itself, in the same units: how far it "
    "is in the case's dtype from what it gives in float64. It is huge where dtypes are "
    "mixed: there PyTorch rounds to the narrower one and returns the wider one",
    "relative": "the largest error of jaxkl, divided by the size of the terms that are "
    "added up",
    "where": "the case, the quantity and the index of the largest error in ulp, or of "
    "the first that does not agree",
}


@dataclasses.dataclass(frozen=True)
class Group:
    """One row of the table."""

    name: str
    cases: int
    numbers: int
    failures: int
    ulp: float
    peer_ulp: float
    relative: float
    where: str  # the largest error in ulp, or the first that does not agree


def groups(report: Report) -> list[Group]:
    """The rows of the table."""
    found: dict[str, list[Result]] = {}
    for result in report.results:
        found.setdefault(result.group, []).append(result)
    return [_group(name, results) for name, results in found.items()]


def _group(name: str, results: list[Result]) -> Group:
    failed = [r for r in results if not r.agrees]
    worst = failed[0] if failed else max(results, key=lambda r: r.difference.ulp)
    differences = [r.difference for r in results]
    return Group(
        name,
        len({id(r.case) for r in results}),
        sum(d.numbers for d in differences),
        len(failed),
        max(d.ulp for d in differences),
        max(d.peer_ulp for d in differences),
        max(d.relative for d in differences),
        place(worst) if failed or worst.difference.ulp else "",
    )


def place(result: Result) -> str:
    """The case, the quantity and the index of its largest error."""
    text = f"{result.case.name}: {result.quantity}"
    index = result.difference.index
    return text + (str(list(index)) if index else "")


def table(report: Report) -> str:
    """Plain text: one row for each group, then what does not agree."""
    header = "group", "cases", "numbers", "ulp", "relative", "where", ""
    rows = [
        (
            g.name,
            str(g.cases),
            f"{g.numbers:,}",
            f"{g.ulp:.2f}",
            f"{g.relative:.1e}",
            g.where,
            f"{g.failures} DIFFER" if g.failures else "agreed",
        )
        for g in groups(report)
    ]
    lines = [", ".join(f"{k} {v}" for k, v in report.versions.items()), ""]
    lines += _aligned([header, *rows], left=(0, 5, 6))
    lines += ["", *(f"{place(r)}: {r.difference.problem}" for r in report.failures)]
    return "\n".join(lines + [summary(report)])


def summary(report: Report) -> str:
    total = len({id(r.case) for r in report.results})
    if report.agrees:
        return f"all {total} cases agreed"
    failed = len({id(r.case) for r in report.failures})
    return f"{failed} of {total} cases DIFFER"


def as_json(report: Report) -> str:
    content = {
        "agrees": report.agrees,
        "summary": summary(report),
        "versions": report.versions,
        "how": HOW,
        "columns": COLUMNS,
        "not_compared": NOT_COMPARED,
        "groups": [dataclasses.asdict(g) for g in groups(report)],
        "results": [_result(r) for r in report.results],
    }
    return _dumps(content)


def _result(result: Result) -> dict[str, Any]:
    case = {
        "group": result.group,
        "case": result.case.name,
        "peer": result.case.peer,
        "quantity": result.quantity,
        "agrees": result.agrees,
    }
    found = dataclasses.asdict(result.difference)
    return case | found | ({} if result.agrees else {"snippet": snippet(result)})


def comparisons_as_text(comparisons: Sequence[Comparison]) -> str:
    return "\n\n".join(map(_comparison, comparisons))


def _comparison(c: Comparison) -> str:
    arrays = ", ".join(f"{name} {what}" for name, what in c.arrays.items())
    function = "distillation_loss" if c.formula.of_models else "kl_div"
    lines = [f"{c.path}: {arrays}", "", f"{function} in jaxkl and in PyTorch:"]
    lines += _aligned([_both(r) for r in c.both], left=(0, 1))
    if c.recorded:
        lines += ["", f"Recorded, beside {c.formula}:"]
        lines += _aligned([_recorded(r) for r in c.recorded], left=(0, 1, 2))
    for mistake in c.mistakes:
        lines += ["", f"{mistake.name}:", f"  {mistake.evidence}"]
    return "\n".join([*lines, "", "agreed" if c.agrees else "NOT agreed"])


def _both(r: Result) -> tuple[str, ...]:
    d = r.difference
    verdict = d.problem or f"agree to {d.ulp:.2f} ulp"
    shown = "" if d.actual is None else f"{d.actual:.9g}"
    place = f"{r.quantity}{list(d.index) if d.index else ''}"
    return f"  {place}", verdict, shown


def _recorded(r: Recorded) -> tuple[str, ...]:
    numbers = ""
    if r.expected.ndim == 0:
        numbers = f"recorded {float(r.recorded.item()):.9g}, right {r.expected:.9g}"
    return f"  {r.name}", "agrees" if r.agrees else "DIFFERS", numbers


def comparisons_as_json(comparisons: Sequence[Comparison]) -> str:
    content = [
        {
            "path": c.path,
            "agrees": c.agrees,
            "arrays": c.arrays,
            "formula": str(c.formula),
            "both": [
                {
                    "quantity": r.quantity,
                    "agrees": r.agrees,
                    "ulp": r.difference.ulp,
                    "jaxkl": r.difference.actual,
                    "PyTorch": r.difference.expected,
                }
                for r in c.both
            ],
            "recorded": [_recorded_as_json(r) for r in c.recorded],
            "mistakes": [dataclasses.asdict(m) for m in c.mistakes],
        }
        for c in comparisons
    ]
    return _dumps(content)


def _recorded_as_json(r: Recorded) -> dict[str, Any]:
    numbers = {}
    if r.expected.ndim == 0:
        numbers = {
            "recorded": float(r.recorded.item()),
            "right": float(r.expected),
        }
    return {"name": r.name, "agrees": r.agrees} | numbers


def _aligned(rows: Sequence[Sequence[str]], left: Collection[int]) -> list[str]:
    """One line for each row; the columns in `left` are left-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _dumps(content: Any) -> str:
    return json.dumps(_plain(content), indent=1, ensure_ascii=False)


def _plain(x: Any) -> Any:
    """Writes NaN and infinities by name, because JSON has no such numbers."""
    if isinstance(x, dict):
        return {k: _plain(v) for k, v in x.items()}
    if isinstance(x, list | tuple):
        return [_plain(v) for v in x]
    return x if not isinstance(x, float) or math.isfinite(x) else str(x)
