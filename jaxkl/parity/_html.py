"""A report as one self-contained page, with a picture of its errors in SVG."""

import html
import math

from ._cases import DTYPES, NOT_COMPARED
from ._report import COLUMNS, Group, groups, HOW, place, summary
from ._run import Report
from ._snippet import snippet


SNIPPETS = 50  # failures beyond these are shown without a snippet
WIDTH, HEIGHT = 600, 360  # of the picture
LEFT, RIGHT, TOP, BOTTOM = 55, 10, 40, 30
LOW, HIGH = 0.03125, 1024.0  # ulp; smaller and larger errors are drawn at the edge
_HEADERS = {"peer_ulp": "peer's own"}
_FORMATS = {"numbers": ",", "ulp": ".2f", "peer_ulp": ".3g", "relative": ".1e"}


def page(report: Report) -> str:
    verdict = "good" if report.agrees else "bad"
    versions = ", ".join(f"{k} {v}" for k, v in report.versions.items())
    body = [
        "<h1>jaxkl parity</h1>",
        f'<p class="verdict {verdict}">{_text(summary(report))}</p>',
        f"<p>{_text(versions)}</p>",
        _failures(report),
        "<h2>By group</h2>",
        _table(report),
        f"<p>{_text(HOW)}.</p>",
        _legend(),
        "<h2>Errors by dtype and size</h2>",
        "<p>The largest error of each array in the groups reductions and log_target, "
        "for values and gradients. Filled dots are jaxkl, hollow dots are PyTorch in "
        "the same dtype; both are compared with PyTorch in float64. A line shows what "
        "is allowed for sums.</p>",
        _picture(report),
        "<h2>Not compared</h2><ul>",
        *(f"<li>{_text(x)}</li>" for x in NOT_COMPARED),
        "</ul>",
    ]
    return _PAGE.format(style=_STYLE, body="\n".join(body))


def _table(report: Report) -> str:
    header = "<th>group</th><th></th>" + "".join(
        f'<th class="{_kind(name)}">{_header(name)}</th>' for name in COLUMNS
    )
    rows = "".join(map(_row, groups(report)))
    return f"<table><thead><tr>{header}</tr></thead>\n<tbody>{rows}</tbody></table>"


def _row(group: Group) -> str:
    ends = f"{group.failures} differ" if group.failures else "agreed"
    cells = "".join(
        f'<td class="{_kind(name)}" data-label="{_header(name)}">'
        f"{_text(format(getattr(group, name), _FORMATS.get(name, '')))}</td>"
        for name in COLUMNS
    )
    return (
        f'<tr class="{"bad" if group.failures else ""}">'
        f'<td class="group">{_text(group.name)}</td><td class="verdict">{ends}</td>'
        f"{cells}</tr>\n"
    )


def _header(name: str) -> str:
    return _text(_HEADERS.get(name, name))


def _kind(name: str) -> str:
    return "where" if name == "where" else "number"


def _legend() -> str:
    terms = (f"<dt>{_header(k)}</dt><dd>{_text(v)}</dd>" for k, v in COLUMNS.items())
    return f"<dl>{''.join(terms)}</dl>"


def _failures(report: Report) -> str:
    if report.agrees:
        return ""
    parts = ["<h2>What differs</h2>"]
    for i, result in enumerate(report.failures):
        name = f"{result.group}: {place(result)}"
        problem = f"<p>{_text(result.difference.problem)}</p>"
        code = ""
        if i < SNIPPETS:
            code = f"<pre><code>{_text(snippet(result))}</code></pre>"
        parts.append(
            f"<details{' open' * (i == 0)}><summary>{_text(name)}</summary>"
            f"{problem}{code}</details>"
        )
    return "\n".join(parts)


def _text(x: object) -> str:
    return html.escape(str(x))


def _picture(report: Report) -> str:
    points = _points(report)
    if not points:
        return "<p>These groups were not run.</p>"
    sizes = sorted({size for _, size in points})
    step = (WIDTH - LEFT - RIGHT) / len(sizes)
    parts = [_axis(), *(_swatch(i, dtype) for i, dtype in enumerate(DTYPES))]
    for i, size in enumerate(sizes):
        x = LEFT + (i + 0.5) * step
        parts.append(_label(x, HEIGHT - 6, f"{size:,} numbers", "middle"))
    for (dtype, size), (ours, theirs, allowed) in points.items():
        shift = (DTYPES.index(dtype) - 1.5) * step / 6
        x = LEFT + (sizes.index(size) + 0.5) * step + shift
        parts.append(_dash(x, allowed, dtype))
        parts.append(_dot(x - 5, ours, dtype, f"jaxkl, {dtype}, {size}", True))
        if dtype != "float64":  # all are compared with PyTorch in float64
            parts.append(_dot(x + 5, theirs, dtype, f"PyTorch, {dtype}, {size}", False))
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="Largest error in ulp by dtype and size">{"".join(parts)}</svg>'
    )


def _points(report: Report) -> dict[tuple[str, int], tuple[float, float, float]]:
    """The largest errors of jaxkl and of PyTorch, and the largest that is allowed."""
    points: dict[tuple[str, int], tuple[float, float, float]] = {}
    for r in report.results:
        if r.case.group not in ("reductions", "log_target"):
            continue
        key = r.case.dtypes[0], math.prod(r.case.arguments[0])
        ours, theirs, allowed = points.get(key, (0.0, 0.0, 0.0))
        points[key] = (
            max(ours, r.difference.ulp),
            max(theirs, r.difference.peer_ulp),
            max(allowed, r.difference.allowed),
        )
    return points


def _height(ulp: float) -> float:
    share = math.log2(min(max(ulp, LOW), HIGH) / LOW) / math.log2(HIGH / LOW)
    return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def _axis() -> str:
    lines = []
    for power in range(-5, 11, 3):
        y = _height(2.0**power)
        text = f"{2**power}" if power >= 0 else f"1/{2**-power}"
        lines.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" '
            'stroke="var(--line)"/>' + _label(LEFT - 8, y + 4, text, "end")
        )
    return "".join(lines) + _label(8, TOP - 18, "ulp")


def _swatch(i: int, dtype: str) -> str:
    x = LEFT + 60 + i * 120
    return _dot_at(x, TOP - 22, dtype, dtype, True) + _label(x + 10, TOP - 18, dtype)


def _dash(x: float, ulp: float, dtype: str) -> str:
    y = _height(ulp)
    return (
        f'<line x1="{x - 14:.1f}" x2="{x + 14:.1f}" y1="{y:.1f}" y2="{y:.1f}" '
        f'stroke="var(--{dtype})" stroke-width="2"/>'
    )


def _dot(x: float, ulp: float, dtype: str, title: str, filled: bool) -> str:
    return _dot_at(x, _height(ulp), dtype, f"{title}: {ulp:.3g} ulp", filled)


def _dot_at(x: float, y: float, dtype: str, title: str, filled: bool) -> str:
    fill = f"var(--{dtype})" if filled else "var(--paper)"
    return (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{fill}" '
        f'stroke="var(--{dtype})" stroke-width="2"><title>{title}</title></circle>'
    )


def _label(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>jaxkl parity</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2433; --paper: #fff; --line: #c9ced8;
  --good: #14703a; --bad: #b3261e; --soft: #f3f5f8;
  --float16: #b45309; --bfloat16: #7c3aed; --float32: #1d6fd1; --float64: #0f766e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8f0; --paper: #14181f;
  --line: #3b4350; --good: #5fd38d; --bad: #ff8a80; --soft: #1d232d;
  --float16: #f5a349; --bfloat16: #b794f6; --float32: #6cb2ff; --float64: #4fd1c0; } }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink);
  background: var(--paper); max-width: 72rem; margin: 0 auto; padding: 1rem; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2rem; }
p, li { max-width: 48rem; overflow-wrap: anywhere; }
p.verdict { font-size: 1.4rem; font-weight: 600; }
.verdict { color: var(--good); } .bad.verdict, .bad .verdict { color: var(--bad); }
table { border-collapse: collapse; font-size: .9rem; }
th, td { text-align: left; padding: .3rem .7rem; white-space: nowrap; }
tr { border-bottom: 1px solid var(--line); }
.number { text-align: right; font-variant-numeric: tabular-nums; }
td.where { white-space: normal; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem;
  max-width: 48rem; font-size: .9rem; }
dt { font-weight: 600; } dd { margin: 0; }
@media (max-width: 60rem) { /* each row becomes a card, with its labels */
  table, tbody { display: block; } thead { display: none; }
  tr { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr));
    gap: 0 1rem; padding: .5rem 0; }
  td, td.number { padding: 0; text-align: left; white-space: normal; }
  td.group { grid-column: 1 / -2; font-weight: 600; } td:empty { display: none; }
  td.verdict { grid-column: -2; } td.where { grid-column: 1 / -1; }
  td[data-label]::before { content: attr(data-label) " "; opacity: .75; } }
pre { background: var(--soft); padding: .8rem; overflow-x: auto; font-size: .85rem; }
details { border: 1px solid var(--line); border-radius: .4rem; padding: .4rem .8rem;
  margin: .5rem 0; }
summary { cursor: pointer; overflow-wrap: anywhere; }
svg { width: 100%; max-width: 48rem; height: auto; display: block; }
svg text { fill: var(--ink); font: 14px system-ui, sans-serif; }
@media (max-width: 30rem) { svg text { font-size: 19px; } }
"""
