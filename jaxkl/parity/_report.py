"""A report as a table, and as JSON."""

import dataclasses
import json

from ._cases import NOT_COMPARED
from ._measure import ELEMENTWISE, plain
from ._run import Report, Result
from ._snippet import snippet


HOW = (
    "The peer is PyTorch; in the groups of optax it is optax. Dtype, shape, NaN and "
    "infinities must be the peer's in the same dtype. Finite numbers are compared with "
    "the peer in float64, on the same numbers"
)
# Of the table, by their names in `Group`.
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
    where: str  # of the largest error in ulp, or the first that does not agree


def groups(report: Report) -> list[Group]:
    found: dict[str, list[Result]] = {}
    for result in report.results:
        found.setdefault(result.group, []).append(result)
    return [_group(name, results) for name, results in found.items()]


def _group(name, results):
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
    """Plain text: a row a group, then what does not agree."""
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
    lines += aligned([header, *rows], left=(0, 5, 6))
    lines += ["", *(f"{place(r)}: {r.difference.problem}" for r in report.failures)]
    return "\n".join(lines + [summary(report)])


def summary(report: Report) -> str:
    total = len({id(r.case) for r in report.results})
    if report.agrees:
        return f"all {total} cases agreed"
    failed = len({id(r.case) for r in report.failures})
    return f"{failed} of {total} cases DIFFER"


def aligned(rows, left) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


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
    return json.dumps(plain(content), indent=1, ensure_ascii=False)


def _result(result):
    case = {
        "group": result.group,
        "case": result.case.name,
        "peer": result.case.peer,
        "quantity": result.quantity,
        "agrees": result.agrees,
    }
    found = dataclasses.asdict(result.difference)
    return case | found | ({} if result.agrees else {"snippet": snippet(result)})
