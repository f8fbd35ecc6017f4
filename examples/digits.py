# `make distill` builds an environment and runs this.
"""Distil a small network from a larger one on real handwritten digits, in one file.

The data are scikit-learn's 1797 images of 8x8 pixels, 500 of them held out. The
teacher, an MLP with two hidden layers of 128, learns from the labels of the other 1297.
The student has one hidden layer of 24 and gets few of those labels, 100 by default. It
is trained in three ways, from the same weights and for the same number of steps:

  labels alone            uses the cross-entropy on the labelled images;
  distilled, same images  adds the teacher's soft outputs on these images, which shows
                          what soft targets are worth by themselves;
  distilled, all images   uses the same loss on all 1297 images; the teacher alone
                          supervises an image without a label.

The teacher has seen every label, so "all images" also learns from them, through the
teacher. The table shows how much gets through, not that labels were unnecessary.
Distillation helps here because labels are few and the student is small. With
`--labels 1297` it does not help, and the program says so.

Each student's loss is one call, with alpha = 0 for labels alone:

  jaxkl.distillation_loss(logits, teacher_logits, divergence=..., temperature=T,
                          labels=labels, alpha=alpha)     # label -100: no label

It is the mean of alpha T² D(teacher, student), at temperature T, plus (1 - alpha) times
the cross-entropy. A seed sets the weights, the choice of labelled images, and the
minibatches. All seeds train at once under `jax.vmap` and share the held-out images, so
the spread is that of training. The program reports the last step and chooses nothing
by looking at the held-out images.

The method is from Hinton, Vinyals, Dean. Distilling the Knowledge in a Neural Network,
2015. https://arxiv.org/abs/1503.02531
"""

import argparse
import json
import math
import sys
import tempfile
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TimeElapsedColumn
from rich.table import Table
from scipy import stats
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import jaxkl


TRAIN, HELD_OUT, BATCH = 1297, 500, 64
TEACHER, TEACHER_STEPS = (64, 128, 128, 10), 1000
STUDENT = (64, 24, 10)
DIVERGENCES = {
    "forward-kl": jaxkl.ForwardKL(),
    "reverse-kl": jaxkl.ReverseKL(),
    "jensen-shannon": jaxkl.JensenShannon(),
}
COLOURS = {  # Okabe and Ito's palette, which is safe for colour-blind readers
    "labels alone": "#D55E00",
    "distilled, same images": "#CC79A7",
    "distilled, all images": "#0072B2",
}
WAYS = tuple(COLOURS)


class MLP(nnx.Module):
    def __init__(self, widths, rngs):
        pairs = zip(widths[:-1], widths[1:], strict=True)
        init = nnx.initializers.lecun_uniform()
        self.layers = nnx.List(
            [nnx.Linear(n, m, kernel_init=init, rngs=rngs) for n, m in pairs]
        )

    def __call__(self, x):
        for layer in self.layers[:-1]:
            x = nnx.relu(layer(x))
        return self.layers[-1](x)


def teacher_loss(logits, batch):
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
    return losses.mean()


def student_loss(logits, batch, *, divergence, temperature):
    return jaxkl.distillation_loss(
        logits,
        batch["teacher_logits"],
        divergence=divergence,
        temperature=temperature,
        labels=batch["labels"],
        alpha=batch["alpha"],
    )


def create(keys, widths, steps):
    """Makes a model and optimizer per key: one structure, with stacked arrays."""
    tx = optax.adamw(optax.cosine_decay_schedule(3e-3, steps), weight_decay=1e-2)
    states = []
    for key in keys:
        model = MLP(widths, nnx.Rngs(key))
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        structure, state = nnx.split((model, optimizer))
        states.append(state)
    return structure, jax.tree.map(lambda *arrays: jnp.stack(arrays), *states)


@partial(jax.jit, static_argnames=("structure", "loss_fn"))
def train(structure, states, runs, images, labels, start, stop, loss_fn):
    """Runs the steps from `start` to `stop`, for all runs at once."""

    def one_run(state, run):
        def step(i, state):
            model, optimizer = nnx.merge(structure, state)
            # A run draws from the first `pool` images of its own order. The first
            # `labelled` of them have a label.
            key = jax.random.fold_in(run["key"], i)
            place = jax.random.randint(key, (BATCH,), 0, run["pool"])
            index = run["order"][place]
            batch = {
                "labels": jnp.where(place < run["labelled"], labels[index], -100),
                "teacher_logits": run["teacher_logits"][index],
                "alpha": run["alpha"],
            }
            grads = nnx.grad(lambda model: loss_fn(model(images[index]), batch))(model)
            optimizer.update(model, grads)
            return nnx.state((model, optimizer))

        return jax.lax.fori_loop(start, stop, step, state)

    return jax.vmap(one_run)(states, runs)


@partial(jax.jit, static_argnames="structure")
def predict(structure, states, images):
    return jax.vmap(lambda state: nnx.merge(structure, state)[0](images))(states)


@jax.jit
def judge(student_logits, teacher_logits, labels):
    """Returns accuracy in % and KL(teacher || student) in nats at T = 1, per run."""

    def one_run(student, teacher):
        _, metrics = jaxkl.distillation_loss_with_metrics(student, teacher)
        return 100 * jnp.mean(student.argmax(-1) == labels), metrics.kl

    return jax.vmap(one_run)(student_logits, teacher_logits)


def experiment(args, progress):
    """Returns teacher accuracy [seed], steps [time] and curves [2, time, way, seed]."""
    digits = load_digits()
    images, test_images, labels, test_labels = train_test_split(
        jnp.asarray(digits.data / 16, jnp.float32),
        jnp.asarray(digits.target, jnp.int32),
        test_size=HELD_OUT,
        stratify=digits.target,
        random_state=0,
    )
    seeds = jnp.arange(args.seed, args.seed + args.seeds)
    keys = jax.vmap(lambda seed: jax.random.split(jax.random.key(seed), 5))(seeds)
    teacher_key, student_key, order_key, teacher_batches, student_batches = keys.T

    def each(*values):  # expands one value per way of training to one per run
        return jnp.repeat(jnp.asarray(values), args.seeds)

    def all_ways(array):
        return jnp.concatenate([array] * len(WAYS))

    runs = {
        "key": teacher_batches,
        "order": jax.vmap(lambda key: jax.random.permutation(key, TRAIN))(order_key),
        "pool": each(TRAIN),
        "labelled": each(TRAIN),
        "alpha": each(0.0),
        "teacher_logits": jnp.zeros((args.seeds, TRAIN, 10)),  # no teacher here
    }
    structure, states = create(teacher_key, TEACHER, TEACHER_STEPS)
    for i in progress.track(range(0, TEACHER_STEPS, 50), description="teacher"):
        states = train(structure, states, runs, images, labels, i, i + 50, teacher_loss)
        jax.block_until_ready(states)
    test_teacher = predict(structure, states, test_images)
    teacher_accuracy, _ = judge(test_teacher, test_teacher, test_labels)

    runs = {
        "key": all_ways(student_batches),
        "order": all_ways(runs["order"]),
        "pool": each(args.labels, args.labels, TRAIN),
        "labelled": each(args.labels, args.labels, args.labels),
        "alpha": each(0.0, args.alpha, args.alpha),
        "teacher_logits": all_ways(predict(structure, states, images)),
    }
    divergence = DIVERGENCES[args.divergence]
    loss_fn = partial(student_loss, divergence=divergence, temperature=args.temperature)
    structure, states = create(student_key, STUDENT, args.steps)
    states, test_teacher = jax.tree.map(all_ways, (states, test_teacher))
    times = np.unique(np.linspace(0, args.steps, 41, dtype=int)).tolist()
    parts = list(zip([0, *times[:-1]], times, strict=True))
    curves = []
    for start, stop in progress.track(parts, description="students"):
        states = train(structure, states, runs, images, labels, start, stop, loss_fn)
        test_student = predict(structure, states, test_images)
        curves.append(judge(test_student, test_teacher, test_labels))
        jax.block_until_ready(curves)
    curves = np.moveaxis(np.asarray(curves, float), 0, 1)  # [2, time, run]
    curves = curves.reshape(2, len(times), len(WAYS), args.seeds)
    return np.asarray(teacher_accuracy, float), times, curves


def summary(values):
    mean, std = float(values.mean()), float(values.std(ddof=1))
    return {"mean": mean, "std": std, "per_seed": values.tolist()}


def paired(first, second):
    """Returns the mean difference over seeds, its standard error, and its sign.

    The sign is 0 unless the 95 % interval of Student's t excludes 0.
    """
    difference = first - second
    mean, error = float(difference.mean()), float(stats.sem(difference))
    clear = abs(mean) > stats.t.ppf(0.975, len(difference) - 1) * error
    return {"mean": mean, "standard_error": error, "sign": int(clear * np.sign(mean))}


def report(args, teacher_accuracy, accuracy, kl):
    """Prints the table and its conclusions, and returns the numbers."""
    pools = (args.labels, args.labels, TRAIN)
    rows = {"teacher": {"labels": TRAIN, "images": TRAIN}}
    rows["teacher"]["accuracy"] = summary(teacher_accuracy)
    for way, pool, a, k in zip(WAYS, pools, accuracy, kl, strict=True):
        rows[way] = {"labels": args.labels, "images": pool}
        rows[way] |= {"accuracy": summary(a), "kl": summary(k)}

    table = Table(box=box.SIMPLE_HEAD)
    for title in ("", "labels", "images", "accuracy, %", "KL to teacher"):
        table.add_column(title, justify="right" if title else "left", no_wrap=True)
    for name, row in rows.items():
        cells = ["{mean:.2f} ± {std:.2f}".format(**row["accuracy"])]
        cells += ["{mean:.4f} ± {std:.4f}".format(**row["kl"]) if "kl" in row else "-"]
        table.add_row(name, str(row["labels"]), str(row["images"]), *cells)
    print(f"{HELD_OUT} held-out images; mean ± standard deviation, {args.seeds} seeds;")
    print("KL(teacher || student) in nats at temperature 1:")
    Console(width=80).print(table)

    print("Differences in accuracy, paired by seed, mean ± standard error:")
    words = {1: "beats", 0: "does not clearly differ from", -1: "does WORSE than"}
    differences = {}
    for i, j in ((1, 0), (2, 1), (2, 0)):
        a, k = paired(accuracy[i], accuracy[j]), paired(kl[i], kl[j])
        differences[f"{WAYS[i]} - {WAYS[j]}"] = {"accuracy": a, "kl": k}
        print(f'  "{WAYS[i]}" {words[a["sign"]]} "{WAYS[j]}":')
        points = "{mean:+.2f} ± {standard_error:.2f} points".format(**a)
        nats = "{mean:+.4f} ± {standard_error:.4f} nats".format(**k)
        print(f"    {points} of accuracy, {nats} of KL to the teacher")
    if differences[f"{WAYS[2]} - {WAYS[0]}"]["accuracy"]["sign"] < 1:
        print("So with these settings distillation did NOT beat labels alone.")
    return {"rows": rows, "differences": differences}


def draw(path, args, teacher_accuracy, times, accuracy, kl):
    """Draws curves [time, way, seed]: the mean, and a band of all seeds."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, values in (left, accuracy), (right, kl):
        for i, (way, colour) in enumerate(COLOURS.items()):
            curves = values[:, i]
            axes.plot(times, curves.mean(-1), color=colour, linewidth=2, label=way)
            low, high = curves.min(-1), curves.max(-1)
            axes.fill_between(times, low, high, color=colour, alpha=0.2, linewidth=0)
        axes.set(xlabel="step", xlim=(0, times[-1]))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    best = teacher_accuracy.mean()
    left.axhline(best, color="black", linestyle="--", linewidth=1.5, label="teacher")
    # The axis omits the first steps, where every student climbs from 10 %.
    left.set_ylim(max(0, min(accuracy[-1].min(), best) - 12), 100)
    left.set_title("Accuracy on held-out images, %")
    left.legend(loc="lower right", reverse=True)
    right.set_yscale("log")
    right.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    right.yaxis.set_major_formatter("{x:g}")
    right.set_title("KL(teacher ‖ student) on held-out images, nats")
    figure.suptitle(
        f"Digits: labels for {args.labels} of {TRAIN} training images; "
        f"{args.divergence}, T = {args.temperature:g}, α = {args.alpha:g}; "
        f"mean and range of {args.seeds} seeds"
    )
    figure.savefig(path, dpi=110)


def number(convert, accept, expected):
    """Makes an argparse type that converts the text and checks it with `accept`."""

    def parse(text):
        try:
            if accept(value := convert(text)):
                return value
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")

    return parse


def parse_arguments():
    text = "Distil a small network from a larger one on real handwritten digits."
    style = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=text, formatter_class=style)

    def integer(low, high):
        expected = f"an integer from {low} to {high}"
        return number(int, lambda n: low <= n <= high, expected)

    positive = number(float, lambda x: 0 < x < math.inf, "a number above 0")
    weight = number(float, lambda x: 0 <= x <= 1, "a number from 0 to 1")
    for name, default, convert, text in (
        ("temperature", 4.0, positive, "divides both models' logits in the divergence"),
        ("alpha", 0.9, weight, "weight of the divergence; the labels get 1 - alpha"),
        (
            "labels",
            100,
            integer(1, TRAIN),
            "training images with a label for the students",
        ),
        ("steps", 2000, integer(1, 10**6), f"minibatches of {BATCH} per student"),
        ("seed", 0, integer(0, 2**30), "the first seed"),
        ("seeds", 8, integer(2, 1000), "how many seeds; a spread needs two"),
        ("output", Path("out/digits"), Path, "folder for the picture and the numbers"),
    ):
        parser.add_argument(f"--{name}", default=default, type=convert, help=text)
    kinds = dict(choices=DIVERGENCES, default="forward-kl")
    parser.add_argument("--divergence", help="of student from teacher", **kinds)
    args = parser.parse_args()
    try:  # check before the training, not after
        args.output.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.output).close()
    except OSError as error:
        parser.error(f"argument --output: cannot write there: {error}")
    return args


def main():
    args = parse_arguments()
    sys.stdout.reconfigure(errors="replace")  # the terminal may lack "±"
    with Progress("{task.description:8}", BarColumn(), TimeElapsedColumn()) as progress:
        teacher_accuracy, times, (accuracy, kl) = experiment(args, progress)
    if not np.isfinite(kl).all():
        sys.exit("digits.py: a student's held-out KL to the teacher is not finite")
    numbers = report(args, teacher_accuracy, accuracy[-1], kl[-1])
    settings = vars(args) | {"output": str(args.output)}
    metrics, picture = args.output / "metrics.json", args.output / "digits.png"
    metrics.write_text(json.dumps({"settings": settings} | numbers, indent=1) + "\n")
    draw(picture, args, teacher_accuracy, times, accuracy, kl)
    print(f"Wrote {metrics} and {picture}")


if __name__ == "__main__":
    main()
