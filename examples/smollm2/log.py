"""Writes metrics.csv and TensorBoard events of a run that may be interrupted."""

import csv

from tensorboardX import SummaryWriter


SHOWN = ("loss", "divergence", "kl", "cross_entropy", "top1_agreement", "own_kl")
SHOWN += ("tokens",)
COLUMNS = ("step", "split", *SHOWN)


def read(path):
    """Reads the rows of metrics.csv, without a last one that was cut off."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [row for row in rows if None not in row.values()]


def curve(path, split, name):
    """Returns the steps and values of a column."""
    rows = [row for row in read(path) if row["split"] == split and row[name]]
    return [int(row["step"]) for row in rows], [float(row[name]) for row in rows]


class Log:
    def __init__(self, directory, start):
        """Continues after step `start`, or starts afresh at 0; drops later rows."""
        path = directory / "metrics.csv"
        kept = [row for row in read(path) if start and int(row["step"]) <= start]
        temporary = path.with_suffix(".tmp")
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(kept)
        temporary.replace(path)
        self.file = path.open("a", newline="")
        self.writer = csv.DictWriter(self.file, COLUMNS)
        self.events = SummaryWriter(str(directory), purge_step=start + 1)

    def write(self, step, split, values, **events):
        numbers = {name: f"{values[name]:.8g}" for name in SHOWN if name in values}
        self.writer.writerow({"step": step, "split": split, **numbers})
        self.file.flush()
        for name, value in (values | events).items():
            self.events.add_scalar(f"{split}/{name}", value, step)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.file.close()
        self.events.close()
