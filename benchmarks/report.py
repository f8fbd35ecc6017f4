"""Writes a result as a table: on a terminal, as Markdown, and as JSON."""

import dataclasses
import json
import os
import platform
from collections import Counter
from importlib import metadata
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table


RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    "jaxkl",
    "jax",
    "jaxlib",
    "optax",
    "ejkernel",
    "tokamax",
    "torch",
    "liger-kernel",
    "libtpu",
)


def machine():
    """Returns what a number depends on besides the code."""
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": {"jax": os.cpu_count(), "torch": _torch_threads()},
        "load average": os.getloadavg()[0],
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {"python": platform.python_version()} | _versions(),
    }


def _cpu():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    facts = dict(line.replace("\t", "").split(":", 1) for line in lines if ":" in line)
    name = facts.get("model name", platform.processor() or "unknown").strip()
    wide = "AVX-512" if "avx512f" in facts.get("flags", "") else ""
    return ", ".join(filter(None, (name, wide)))


def _torch_threads():
    try:
        import torch
    except ImportError:
        return None
    return torch.get_num_threads()


def _versions():
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def header(result, facts, rounds):
    versions = ", ".join(
        f"{name} {version or '(not installed)'}"
        for name, version in facts["versions"].items()
    )
    if any("ms" in row for row in result.rows):
        how = f"median of {rounds} rounds of all peers in turns; ratios: within a round"
    elif any("schedule_ms" in row for row in result.rows):
        how = "compiled; times are of the compiler's schedule, and nothing ran on a TPU"
    else:
        how = "compiled, not timed"
    threads = ", ".join(f"{k} {v}" for k, v in facts["threads"].items() if v)
    return [
        f"{facts['cpu']}; {facts['cores']} cores, {facts['system']}; "
        f"threads: {threads}",
        versions,
        f"{how}; load average at the start: {facts['load average']:.1f}",
    ]


def _mib(size):
    return f"{size / 2**20:.1f}"


def _gib(size):
    return f"{size / 2**30:.3f}"


def _counted(texts):
    """Counts texts, as in `3: a; 2 × b`."""
    parts = [f"{n} × {x}" if n > 1 else x for x, n in Counter(texts).items()]
    return ": ".join(filter(None, (str(len(texts)), "; ".join(parts))))


def table(result):
    """Returns titles and lines of text, without empty columns."""
    large = any("total_bytes" in row for row in result.rows)
    form, unit = (_gib, "GiB") if large else (_mib, "MiB")
    columns = {"": lambda row: row["peer"]}
    for base in result.bases:
        columns[f"÷ {base}"] = lambda row, base=base: _ratio(row, base)
    for title, key, form_ in (
        ("ms, by the schedule", "schedule_ms", "{:.2f}".format),
        ("of it unscheduled, ms", "unscheduled_ms", "{:.2f}".format),
        ("ms", "ms", "{:.1f}".format),
        ("fastest, ms", "fastest_ms", "{:.1f}".format),
        ("rate", "rate", str),
        (f"total, {unit}", "total_bytes", form),
        (f"temp, {unit}", "temp_bytes", form),
        (f"outputs, {unit}", "output_bytes", form),
        (f"arguments, {unit}", "argument_bytes", form if large else None),
        ("reads of student, teacher", "reads", lambda x: ", ".join(map(str, x))),
        ("first run, s", "first_run_s", "{:.1f}".format),
        ("compile, s", "compile_s", "{:.1f}".format),
        ("value off by", "value_error", "{:.0e}".format),
        ("gradient off by", "gradient_error", "{:.0e}".format),
        ("exchanged in a loop", "in_loop", _counted),
        ("exchanged outside", "outside", _counted),
    ):
        if form_ and any(key in row for row in result.rows):
            columns[title] = lambda row, key=key, form_=form_: (
                form_(row[key]) if key in row else "-"
            )
    lines = [[column(row) for column in columns.values()] for row in result.rows]
    if any(row["state"] != "ok" for row in result.rows):
        columns["note"] = None
        for row, line in zip(result.rows, lines, strict=True):
            parts = (row["state"], row.get("reason"))
            line.append("" if row["state"] == "ok" else ": ".join(filter(None, parts)))
    return list(columns), lines


def _ratio(row, base):
    value = row.get("ratios", {}).get(base)
    return "-" if value is None else f"{value:.2f}"


def target_table(targets):
    lines = []
    for x in targets:
        value = "-" if x.value is None else x.form.format(x.value)
        lines.append([x.what, value, "≤ " + x.form.format(x.bound), x.verdict])
    return ["jaxkl", "reached", "bound", ""], lines


def markdown_table(titles, lines):
    rules = [":--", *["--:"] * (len(titles) - 1)]
    return ["| " + " | ".join(cells) + " |" for cells in (titles, rules, *lines)]


def markdown(cell, result, facts, rounds):
    parts = [[f"## {cell.name}"], [cell.title + "."], markdown_table(*table(result))]
    if result.targets:
        parts.append(markdown_table(*target_table(result.targets)))
    parts.append(["- " + line for line in header(result, facts, rounds)])
    parts.append([f"Made by `make bench ARGS='--cell {cell.name}'`."])
    return "\n\n".join("\n".join(part) for part in parts) + "\n"


def show(cell, result, facts, rounds):
    """Prints a result, as Markdown if the output is not a terminal."""
    console = Console()
    if not console.is_terminal:
        print(markdown(cell, result, facts, rounds), flush=True)
        return
    console.print(f"\n[bold]{cell.name}[/bold]  {cell.title}")
    for titles, lines in (table(result), target_table(result.targets)):
        if not lines:
            continue
        shown = Table(box=box.SIMPLE_HEAD)
        for i, title in enumerate(titles):
            shown.add_column(title, justify="right" if i else "left")
        for line in lines:
            style = "red" if {"MISSED", "WRONG"} & set(line) else None
            shown.add_row(*line, style=style)
        console.print(shown)
    console.print(
        *header(result, facts, rounds), sep="\n", style="dim", highlight=False
    )


def save(cell, result, facts, rounds):
    RESULTS.mkdir(exist_ok=True)
    text = markdown(cell, result, facts, rounds)
    (RESULTS / f"{cell.name}.md").write_text(text, encoding="utf-8")
    data = {
        "cell": cell.name,
        "title": cell.title,
        "rounds": rounds,
        "machine": facts,
        "rows": result.rows,
        "targets": [
            dataclasses.asdict(target) | {"verdict": target.verdict}
            for target in result.targets
        ],
    }
    text = json.dumps(data, indent=1, ensure_ascii=False)
    (RESULTS / f"{cell.name}.json").write_text(text + "\n", encoding="utf-8")
