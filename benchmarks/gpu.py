"""Measures heads and dense logits on a GPU: `python benchmarks/gpu.py`.

It needs JAX and, for its peers, torch: no network, and nothing else to install. Every
result is first compared with float64. Each job has a process, and thus a peak of
memory, of its own; a job that fails does not end the others. Without a GPU the sizes
are small, and the numbers only show that the command works.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent
DIVERGENCES = "forward-kl", "reverse-kl", "jensen-shannon"
LARGE = 8192, 4096, 128256  # tokens, hidden, vocab
SMALL = 128, 64, 1000
PEERS = "plain JAX", "torch.compile", "Liger", "torch eager"  # beside jaxkl
LIMIT = 100  # seconds of a job


def parse_arguments(arguments):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--small",
        action="store_true",
        help="use small sizes, as without a GPU; the numbers mean nothing",
    )
    parser.add_argument(
        "--divergence",
        choices=DIVERGENCES,
        default=DIVERGENCES[0],
        help="the one that is timed; all are checked (default: %(default)s)",
    )
    parser.add_argument(
        "--peer",
        metavar="NAME",
        action="append",
        help=f"jaxkl, {', '.join(PEERS)}; may be repeated; default: all",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=460,
        help="time for everything; what is left then is skipped (default: %(default)s)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="the JSON; default: benchmarks/results/gpu-DEVICE.json, and for small "
        "sizes none",
    )
    args = parser.parse_args(arguments)
    for name in args.peer or ():
        if name not in ("jaxkl", *PEERS):
            parser.error(f"argument --peer: no {name!r} in jaxkl, {', '.join(PEERS)}")
    return args


def jobs(args, sizes):
    """Yields the work and the job of each process, what matters most first."""
    tiles = (64,) if sizes == SMALL else (1024, 512, 2048, 4096)
    *others, last = PEERS
    yield "ceilings", dict(kind="ceilings", sizes=sizes)
    for options in ({}, {"tile": 16}, {"plan": "lean"}):
        checked = (args.divergence,) if options and sizes == SMALL else DIVERGENCES
        job = dict(kind="check", peer="jaxkl", options=options, divergences=checked)
        yield "check", job
    for peer, options in (
        ("jaxkl", {}),
        *((peer, {}) for peer in others),
        ("jaxkl", {"plan": "lean"}),
        *(("jaxkl", {"tile": tile}) for tile in tiles),
        (last, {}),
    ):
        job = dict(kind="measure", peer=peer, options=options, sizes=sizes)
        for form in ("heads", "dense"):
            if (peer, form) != ("Liger", "dense"):  # its chunked loss takes only heads
                yield form, job | dict(form=form, divergence=args.divergence)


def run(job, limit, environment):
    """Runs a job in a process; returns its rows, of which the last may be a reason."""
    command = [sys.executable, "-m", "benchmarks.gpu_job", json.dumps(job)]
    options = dict(cwd=ROOT, env=environment, encoding="utf-8", errors="replace")
    try:
        done = subprocess.run(command, capture_output=True, timeout=limit, **options)
    except subprocess.TimeoutExpired as error:
        rows = _rows(_text(error.stdout))
        reason = f"it was stopped after {limit:.0f} s"
        return [*rows, {"state": "stopped", "reason": reason}]
    rows = _rows(done.stdout)
    if done.returncode or not rows:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        reason = f"exit code {done.returncode}: {last[0][:150]}"
        rows.append({"state": "failed", "reason": reason})
    return rows


def _text(output):
    return output.decode("utf-8", "replace") if isinstance(output, bytes) else output


def _rows(output):
    lines = (output or "").splitlines()
    return [json.loads(line) for line in lines if line.startswith('{"')]


def find_device():
    """Returns facts about the device, and the environment for JAX to use it.

    Without a GPU that is the CPU, and JAX's reason is printed.
    """
    environment = os.environ | {
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # else the peak is not the loss's
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    asked = os.environ.get("JAX_PLATFORMS")
    for platform in [asked] if asked else ["cuda", "cpu"]:
        environment["JAX_PLATFORMS"] = platform
        (facts,) = run({"kind": "machine"}, LIMIT, environment)
        if facts["state"] == "ok":
            return facts, environment
        print(f"JAX has no {platform}: {facts['reason']}", file=sys.stderr)
    sys.exit(1)


def measure(args, sizes, facts, environment, end):
    """Runs all jobs; returns their rows."""
    rows = []
    for work, job in jobs(args, sizes):
        peer = job.get("peer", "")
        if args.peer and peer and peer not in args.peer:
            continue
        options = job.get("options", {})
        name = ", ".join([peer, *(f"{k}={v}" for k, v in options.items())])
        if peer:
            job["platform"] = facts["platform"]
        start = time.monotonic()
        left = end - start
        if left < 10:
            new = [{"state": "stopped", "reason": f"{args.seconds:.0f} s were used up"}]
        else:
            new = run(job, min(LIMIT, left), environment)
        required = peer in ("", "jaxkl", "plain JAX")
        for row in new:
            rows.append({"work": work, "peer": name, "required": required} | row)
        states = ", ".join(sorted({row["state"] for row in new}))
        seconds = f"{time.monotonic() - start:.1f} s"
        print(f"{work:9} {name:18} {seconds:>7}  {states}", file=sys.stderr, flush=True)
    return with_ratios(rows)


def with_ratios(rows):
    """Adds the ratio of each time to that of its minimum, by the measured rates.

    Heads need four products. Dense logits are read, both, and a gradient is written.
    """
    ceiling = {row["peer"]: row for row in rows if row["work"] == "ceilings"}
    if len(ceiling) != 4:
        return rows
    copy, logits, *gradients = (row["ms"] for row in ceiling.values())
    least = {"heads": 2 * logits + sum(gradients), "dense": 1.5 * copy}
    return [
        row | {"ratio": row["ms"] / least[row["work"]]}
        if row["work"] in least and row.get("ms")
        else row
        for row in rows
    ]


def failures(rows):
    """Returns the rows that make the exit code 1.

    These are wrong results, whoever made them, errors of jaxkl and plain JAX, and
    checks that were not finished, unless jaxkl has no such option.
    """
    return [
        row
        for row in rows
        if row["state"] == "WRONG"
        or (row["state"] == "failed" and row["required"])
        or (row["work"] == "check" and row["state"] not in ("ok", "skipped"))
    ]


COLUMNS = {
    "ms": ("ms", "{:.2f}"),
    "÷ least": ("ratio", "{:.2f}"),
    "GB/s": ("gb_per_s", "{:.0f}"),
    "TFLOP/s": ("tflop_per_s", "{:.1f}"),
    "peak GiB": ("peak_bytes", None),
    "compiler's peak": ("peak_of_compiler_bytes", None),
    "temp GiB": ("temp_bytes", None),
    "outputs GiB": ("output_bytes", None),
    "value off by": ("value_error", "{:.0e}"),
    "gradient": ("gradient_error", "{:.0e}"),
    "at this size": ("error_at_size", "{:.0e}"),
    "compile s": ("compile_s", "{:.1f}"),
}


def table(rows):
    """Returns lines of text, without empty columns."""
    columns = {
        title: column
        for title, column in COLUMNS.items()
        if any(row.get(column[0]) is not None for row in rows)
    }
    lines = [["", *columns, ""]]
    for row in rows:
        names = (row["peer"], *map(row.get, ("form", "divergence", "dtype")))
        cells = [", ".join(filter(None, names))]
        for key, form in columns.values():
            value = row.get(key)
            if form is None and value is not None:
                value, form = value / 2**30, "{:.3f}"
            cells.append("-" if value is None else form.format(value))
        state = "" if row["state"] == "ok" else row["state"]
        lines.append([*cells, ": ".join(filter(None, (state, row.get("reason"))))])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i in (0, len(widths) - 1) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


def show(data):
    tokens, hidden, vocab = data["sizes"]
    titles = {
        "ceilings": "What the device can do",
        "check": "Against float64, at a small odd size",
        "heads": f"Heads, {tokens} tokens × {hidden} × {vocab}, bfloat16, value and "
        "gradient; least: four products",
        "dense": f"Logits [{tokens}, {vocab}], bfloat16, value and gradient; least: "
        "reading both and writing the gradient at the rate of the copy",
    }
    for work, title in titles.items():
        rows = [row for row in data["rows"] if row["work"] == work]
        if rows:
            print(f"\n{title}", *table(rows), sep="\n")
    machine = data["machine"]
    versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items() if v)
    print(f"\n{machine['device']}, driver {machine['driver']}; {versions}")


def main(arguments=None):
    args = parse_arguments(arguments)
    start = time.monotonic()
    facts, environment = find_device()
    sizes = SMALL if args.small or facts["platform"] != "gpu" else LARGE
    if sizes == SMALL:
        print("These sizes are small: the numbers show nothing.", file=sys.stderr)
    rows = measure(args, sizes, facts, environment, start + args.seconds)
    data = {
        "machine": {k: v for k, v in facts.items() if k != "state"},
        "sizes": sizes,
        "divergence": args.divergence,
        "seconds": round(time.monotonic() - start),
        "rows": rows,
    }
    show(data)
    output = args.output
    if output is None and sizes == LARGE:
        name = re.sub("[^a-z0-9]+", "-", facts["device"].lower()).strip("-")
        output = ROOT / "benchmarks" / "results" / f"gpu-{name}.json"
    if output:
        text = json.dumps(data, indent=1, ensure_ascii=False)
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text + "\n", encoding="utf-8")
    bad = failures(rows)
    for row in bad:
        print(f"{row['state']}: {row['work']}, {row['peer']}", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
