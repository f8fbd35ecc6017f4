"""What the command line shows, as plain text."""

from collections.abc import Collection, Sequence

from ._compare import Comparison, Recorded
from ._formula import as_models
from ._run import Report, Result


def table(report: Report) -> str:
    """One row for each group, then what does not agree, and the summary."""
    header = "group", "cases", "numbers", "ulp", "relative", "where", ""
    rows = [_row(name, results) for name, results in groups(report).items()]
    return "\n".join(
        [
            ", ".join(f"{k} {v}" for k, v in report.versions.items()),
            "",
            *_aligned([header, *rows], left=(0, 5, 6)),
            "",
            *(f"{_place(r)}: {r.difference.problem}" for r in report.failures),
            summary(report),
        ]
    )


def groups(report: Report) -> dict[str, list[Result]]:
    """The results of each row of the table, which has gradients apart from values."""
    found: dict[str, list[Result]] = {}
    for r in report.results:
        gradients = ", gradients" * r.quantity.startswith("d_")
        found.setdefault(r.case.group + gradients, []).append(r)
    return found


def summary(report: Report) -> str:
    total = _cases(report.results)
    if report.agrees:
        return f"all {total} cases agreed"
    return f"{_cases(report.failures)} of {total} cases DIFFER"


def _cases(results: Sequence[Result]) -> int:
    return len({id(r.case) for r in results})


def _row(name: str, results: list[Result]) -> tuple[str, ...]:
    failed = [r for r in results if not r.agrees]
    worst = failed[0] if failed else max(results, key=lambda r: r.difference.ulp)
    differences = [r.difference for r in results]
    return (
        name,
        str(_cases(results)),
        f"{sum(d.numbers for d in differences):,}",
        f"{max(d.ulp for d in differences):.2f}",
        f"{max(d.relative for d in differences):.1e}",
        _place(worst) if failed or worst.difference.ulp else "",
        f"{len(failed)} DIFFER" if failed else "agreed",
    )


def _place(result: Result) -> str:
    """The case, the quantity and the index of its largest error."""
    return f"{result.case.name}: {_quantity(result)}"


def _quantity(result: Result) -> str:
    index = result.difference.index
    return result.quantity + (str(list(index)) if index else "")


def comparison_as_text(c: Comparison) -> str:
    """Both frameworks, what was recorded, and the mistakes, each with its evidence."""
    arrays = ", ".join(f"{name} {what}" for name, what in c.arrays.items())
    function = "distillation_loss" if c.formula.of_models else "kl_div"
    lines = [arrays, "", f"{function} in jaxkl and in PyTorch:"]
    lines += _aligned([_both(r) for r in c.both], left=(0, 1))
    if c.recorded:
        lines += ["", f"Recorded, beside {c.formula}:"]
        lines += _aligned([_recorded(r) for r in c.recorded], left=(0, 1, 2))
    for mistake in c.mistakes:
        lines += ["", f"{mistake.name}:", f"  {mistake.evidence}"]
    text = "\n".join([*lines, "", "agreed" if c.agrees else "NOT agreed"])
    return f"{c.path}: {as_models(text) if c.formula.of_models else text}"


def _both(r: Result) -> tuple[str, ...]:
    d = r.difference
    verdict = d.problem or f"agree to {d.ulp:.2f} ulp"
    return f"  {_quantity(r)}", verdict, "" if d.actual is None else f"{d.actual:.9g}"


def _recorded(r: Recorded) -> tuple[str, ...]:
    numbers = ""
    if r.expected.ndim == 0:
        numbers = f"recorded {float(r.recorded.item()):.9g}, right {r.expected:.9g}"
    return f"  {r.name}", "agrees" if r.agrees else "DIFFERS", numbers


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
