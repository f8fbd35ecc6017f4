"""The errors by dtype and size, as SVG."""

import math

from ._cases import DTYPES
from ._run import Report


WIDTH, HEIGHT = 600, 360
LEFT, RIGHT, TOP, BOTTOM = 55, 10, 40, 30
LOW, HIGH = 0.03125, 1024.0  # ulp; what is smaller or larger is drawn at the edge


def picture(report: Report) -> str:
    points = _points(report)
    if not points:
        return "<p>These groups were not run.</p>"
    sizes = sorted({size for _, size in points})
    column = {size: i for i, size in enumerate(sizes)}
    step = (WIDTH - LEFT - RIGHT) / len(sizes)
    parts = [_axis(), *(_legend(i, dtype) for i, dtype in enumerate(DTYPES))]
    for size, i in column.items():
        x = LEFT + (i + 0.5) * step
        label = f"{size:,} numbers"
        parts.append(_label(x, HEIGHT - 6, label, "middle"))
    for (dtype, size), (ours, theirs, allowed) in points.items():
        shift = (DTYPES.index(dtype) - 1.5) * step / 6
        x = LEFT + (column[size] + 0.5) * step + shift
        parts.append(_dash(x, allowed, dtype))
        parts.append(_dot(x - 5, ours, dtype, f"jaxkl, {dtype}, {size}", True))
        if dtype != "float64":  # there it is what all are compared with
            parts.append(_dot(x + 5, theirs, dtype, f"PyTorch, {dtype}, {size}", False))
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="Largest error in ulp by dtype and size">{"".join(parts)}</svg>'
    )


def _points(report):
    """(dtype, size) -> largest error of jaxkl, of PyTorch, and the largest allowed."""
    points = {}
    for r in report.results:
        if r.case.group not in ("reductions", "log_target"):
            continue
        key = r.case.dtypes[0], math.prod(r.case.arguments[0])
        found = r.difference.ulp, r.difference.peer_ulp, r.difference.allowed
        old = points.get(key, (0.0, 0.0, 0.0))
        points[key] = tuple(map(max, old, found))
    return points


def _height(ulp):
    share = math.log2(min(max(ulp, LOW), HIGH) / LOW) / math.log2(HIGH / LOW)
    return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def _axis():
    lines = []
    for power in range(-5, 11, 3):
        y = _height(2.0**power)
        text = f"{2**power}" if power >= 0 else f"1/{2**-power}"
        lines.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" '
            'stroke="var(--line)"/>' + _label(LEFT - 8, y + 4, text, "end")
        )
    return "".join(lines) + _label(8, TOP - 18, "ulp")


def _legend(i, dtype):
    x = LEFT + 60 + i * 120
    return _dot_at(x, TOP - 22, dtype, dtype, True) + _label(x + 10, TOP - 18, dtype)


def _dash(x, ulp, dtype):
    y = _height(ulp)
    return (
        f'<line x1="{x - 14:.1f}" x2="{x + 14:.1f}" y1="{y:.1f}" y2="{y:.1f}" '
        f'stroke="var(--{dtype})" stroke-width="2"/>'
    )


def _dot(x, ulp, dtype, title, filled):
    return _dot_at(x, _height(ulp), dtype, f"{title}: {ulp:.3g} ulp", filled)


def _dot_at(x, y, dtype, title, filled):
    fill = f"var(--{dtype})" if filled else "var(--paper)"
    return (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{fill}" '
        f'stroke="var(--{dtype})" stroke-width="2"><title>{title}</title></circle>'
    )


def _label(x, y, text, anchor="start"):
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'
