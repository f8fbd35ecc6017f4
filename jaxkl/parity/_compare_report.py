"""Comparisons of a user's files, as text and as JSON."""

import json

from ._measure import plain
from ._report import aligned


def text(comparisons) -> str:
    return "\n\n".join(map(_text, comparisons))


def _text(c):
    arrays = ", ".join(f"{name} {what}" for name, what in c.arrays.items())
    lines = [f"{c.path}: {arrays}", "", "kl_div in jaxkl and in PyTorch:"]
    lines += aligned([_both(r) for r in c.both], left=(0, 1))
    if c.recorded:
        lines += ["", f"Recorded, beside {c.formula}:"]
        lines += aligned([_recorded(r) for r in c.recorded], left=(0, 1, 2))
    for mistake in c.mistakes:
        lines += ["", f"{mistake.name}:", f"  {mistake.evidence}"]
    return "\n".join([*lines, "", "agreed" if c.agrees else "NOT agreed"])


def _both(r):
    d = r.difference
    verdict = d.problem or f"agree to {d.ulp:.2f} ulp"
    shown = "" if d.actual is None else f"{d.actual:.9g}"
    place = f"{r.quantity}{list(d.index) if d.index else ''}"
    return f"  {place}", verdict, shown


def _recorded(r):
    numbers = ""
    if r.expected.ndim == 0:
        numbers = f"recorded {float(r.recorded.item()):.9g}, right {r.expected:.9g}"
    return f"  {r.name}", "agrees" if r.agrees else "DIFFERS", numbers


def as_json(comparisons) -> str:
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
            "recorded": [_as_json(r) for r in c.recorded],
            "mistakes": [{"name": m.name, "evidence": m.evidence} for m in c.mistakes],
        }
        for c in comparisons
    ]
    return json.dumps(plain(content), indent=1, ensure_ascii=False)


def _as_json(r):
    numbers = {}
    if r.expected.ndim == 0:
        numbers = {
            "recorded": float(r.recorded.item()),
            "right": float(r.expected),
        }
    return {"name": r.name, "agrees": r.agrees} | numbers
