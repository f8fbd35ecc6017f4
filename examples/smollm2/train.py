# `make distill-lm` builds an environment and runs this.
"""Distils SmolLM2-135M into a student of six of its thirty layers.

    make distill-lm                                  # the teacher runs online
    make distill-lm ARGS="--steps 500 --batch 4"     # longer
    make distill-lm ARGS="--on-policy 0.5"           # and on the student's own text

The same student is trained twice, on the same windows of text in the same order: once
distilled, and once on the labels alone. With --on-policy it is trained once more, with
a share of the steps on its own continuations of the windows. To resume an interrupted
run, even one that was killed in the middle of a save, run the same command again.
"""

import contextlib
import dataclasses
import json
import logging
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

import cache as caches
import data
import jaxkl
import model
import options
import report
from log import Log
from step import (
    divergence_loss,
    evaluate,
    hidden_states,
    labels_alone,
    online,
    policy_loss,
    spec,
    student_text,
    Task,
    train_step,
)


WAYS = ("distilled", "on-policy", "labels")
ONE = options.Schedule("constant", 1.0, 1.0)


def parse_arguments(arguments=None):
    parser = options.parser(__doc__)
    options.add_data(parser)
    add = parser.add_argument
    count, nonzero = options.integer(0), options.integer(1)
    add("--output", type=Path, default=Path("out/smollm2"), help="folder")
    add("--ways", nargs="+", choices=WAYS, help="students to train (default: all)")
    add("--layers", type=options.layers, default="0,1,8,16,24,29", help="to keep")
    add("--steps", type=nonzero, default=40, help="updates")
    add("--batch", type=nonzero, default=2, help="windows at a time")
    add("--accumulate", type=nonzero, default=1, help="batches for each update")
    add("--learning-rate", type=options.positive, default=1e-3, help="peak")
    add("--seed", type=count, default=0, help="of the order of windows")
    add(
        "--divergence",
        type=options.divergence,
        default="forward-kl",
        help="NAME or NAME:PARAMETER=VALUE, of " + ", ".join(options.DIVERGENCES),
    )
    add(
        "--temperature",
        type=options.schedule(options.positive),
        default="1",
        help="a number, linear:FROM:TO or cosine:FROM:TO over the steps",
    )
    add(
        "--alpha",
        type=options.schedule(options.share),
        default="1",
        help="weight of the divergence, in the same form; the labels get 1 - alpha",
    )
    add(
        "--on-policy",
        type=options.share,
        default=0.0,
        help="share of the steps of one more student that are on its own text",
    )
    add(
        "--prompt-length",
        type=nonzero,
        help="tokens of a window before the student's own (default: half)",
    )
    add("--sample-temperature", type=options.positive, default=1.0, help="of own text")
    add(
        "--policy-gradient",
        action="store_true",
        help="loss on own text: from the log-probabilities of its tokens alone",
    )
    add("--cache", type=Path, help="teacher cache: a folder that cache.py wrote")
    add(
        "--tail",
        choices=("bucket", "renormalize", "uniform", "drop"),
        default="bucket",
        help="how a top-k cache treats the other columns",
    )
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="compute")
    add("--mesh", type=options.mesh, help="data=N,model=M: shard over N * M devices")
    add("--real", action="store_true", help="use real devices for the mesh")
    add("--save-every", type=nonzero, default=20, help="steps")
    add("--evaluate-every", type=nonzero, default=20, help="steps")
    add("--prompt", type=options.some, default="The import statement", help="sample's")
    args = parser.parse_args(arguments)
    sizes = args.mesh or {"data": 1}
    if args.batch % sizes["data"]:
        parser.error(
            f"argument --mesh: data={sizes['data']} does not divide --batch "
            f"{args.batch}"
        )
    check_on_policy(parser, args)
    options.make_folder(parser, args.output)
    return parser, args


def check_on_policy(parser, args):
    """Fills in the defaults that depend on other options."""
    if args.ways is None:
        args.ways = [way for way in WAYS if args.on_policy or way != "on-policy"]
    if not args.on_policy:
        if "on-policy" in args.ways:
            parser.error("argument --ways: on-policy needs --on-policy above 0")
        for name in "prompt-length", "policy-gradient":
            if getattr(args, name.replace("-", "_")):
                parser.error(f"argument --{name}: needs --on-policy above 0")
        return
    if args.prompt_length is None:
        args.prompt_length = args.length // 2
    if args.prompt_length > args.length:
        parser.error(f"argument --prompt-length: is above --length {args.length}")
    if args.cache:
        parser.error(
            "argument --on-policy: cannot be used with --cache, which holds nothing "
            "about text that the student writes"
        )
    if args.policy_gradient and args.sample_temperature != 1:
        parser.error("argument --policy-gradient: needs --sample-temperature 1")


def optimizer_of(args):
    warmup = args.steps // 10
    rate = optax.warmup_cosine_decay_schedule(
        0.0, args.learning_rate, warmup, args.steps, args.learning_rate / 10
    )
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.95))


def make_task(args, way, teacher, cache, structure, mesh):
    """The task on the fixed text, and that on the student's own."""
    teacher_structure, _ = nnx.split(teacher.model)
    source, of_source, temperature, alpha = labels_alone, jaxkl.ForwardKL(), ONE, ONE
    if way != "labels":
        source = online(teacher_structure) if cache is None else cache.source
        of_source, temperature, alpha = args.divergence, args.temperature, args.alpha
    task = Task(
        structure,
        teacher_structure,
        divergence_loss,
        source,
        of_source,
        temperature.over(args.steps),
        alpha.over(args.steps),
        mesh if args.mesh else None,
        args.prompt_length,
        teacher.end,
    )
    if args.policy_gradient:
        return task, dataclasses.replace(task, loss=policy_loss)
    if alpha == ONE:
        return task, task
    # Own text has no labels.
    return task, dataclasses.replace(task, alpha=ONE.over(args.steps))


def place(tree, mesh, *axes):
    """Shards the arrays over the mesh, by default over `axes`."""
    put = lambda path, x: jax.device_put(x, NamedSharding(mesh, spec(path, P(*axes))))
    return jax.tree.map_with_path(put, tree)


def held_out(args, teacher, corpus, mesh):
    """Makes batches of the held-out windows, with the teacher's hidden states."""
    shape = -1, args.batch, args.length
    padding = -len(corpus.held_out.tokens) % args.batch
    pad = lambda x, value: np.pad(x, ((0, padding), (0, 0)), constant_values=value)
    batches = {
        "tokens": pad(corpus.held_out.tokens, 0).reshape(shape),
        "labels": pad(corpus.held_out.labels, -100).reshape(shape),
    }
    batches = place(batches, mesh, None, "data")
    model = place(nnx.state(teacher.model), mesh)
    embedding = place({"embedding": teacher.embedding}, mesh)["embedding"]
    structure, _ = nnx.split(teacher.model)
    hidden = hidden_states(structure, model, embedding, batches["tokens"])
    return batches | {"hidden": hidden}


def training_batches(args, corpus, cache, step, mesh):
    size = args.batch * args.accumulate
    indices = data.batch_indices(args.seed, step, size, len(corpus.train.tokens))
    batches = {
        "tokens": corpus.train.tokens[indices],
        "labels": corpus.train.labels[indices],
    }
    if cache is not None:
        batches |= cache.read(indices)
    split = lambda x: x.reshape(args.accumulate, args.batch, *x.shape[1:])
    return place(jax.tree.map(split, batches), mesh, None, "data")


def train(args, way, teacher, corpus, cache, mesh, judged, progress):
    """Trains a student, from its last checkpoint if it has one, and returns it."""
    cache = cache if way == "distilled" else None
    directory = args.output.absolute() / way
    student = model.student_of(teacher, args.layers)
    optimizer = nnx.Optimizer(student, optimizer_of(args), wrt=nnx.Param)
    structure, state = nnx.split((student, optimizer))
    state = place(state, mesh)
    task, own_task = make_task(args, way, teacher, cache, structure, mesh)
    frozen = {"embedding": teacher.embedding, "kernel": teacher.embedding.T}
    if args.on_policy or (way == "distilled" and cache is None):
        frozen["teacher"] = nnx.state(teacher.model)
    frozen = place(frozen, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    step = jax.jit(
        train_step,
        static_argnums=0,
        donate_argnums=1,
        out_shardings=(shardings, None),
    )
    judge = jax.jit(partial(evaluate, task))
    windows = NamedSharding(mesh, P(None, "data"))
    rewrite = jax.jit(partial(student_text, task), out_shardings=windows)

    # Do not save in the background: the next step donates the buffers being saved.
    keep = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    with contextlib.ExitStack() as stack:
        folder = directory / "checkpoints"
        manager = stack.enter_context(ocp.CheckpointManager(folder, options=keep))
        start = manager.latest_step() or 0
        if start:
            like = jax.tree.map(ocp.tree.to_shape_dtype_struct, state)
            state = manager.restore(start, args=ocp.args.StandardRestore(like))
        log = stack.enter_context(Log(directory, start))
        bar = progress.add_task(way, total=args.steps, completed=start, note="")
        if start == 0:
            log.write(0, "held-out", jax.device_get(judge(state, frozen, judged)))
        for i in range(start, args.steps):
            began = time.perf_counter()
            batches = training_batches(args, corpus, cache, i, mesh)
            own = way == "on-policy" and data.is_own_text(args.seed, i, args.on_policy)
            if own:
                key = jax.random.fold_in(jax.random.key(args.seed), i)
                temperature = args.sample_temperature
                batches = rewrite(state, frozen, batches, key, temperature)
            by = own_task if own else task
            state, metrics = step(by, state, frozen, batches, jnp.asarray(i))
            metrics = jax.device_get(metrics)
            if not np.isfinite(metrics["loss"]):
                sys.exit(f"train.py: {way}: the loss of step {i + 1} is not finite")
            speed = batches["tokens"].size / (time.perf_counter() - began)
            if way == "labels":  # no teacher metrics
                metrics = {k: metrics[k] for k in ("loss", "cross_entropy", "tokens")}
            if own:  # no labels
                metrics.pop("cross_entropy", None)
            split = "own-text" if own else "train"
            log.write(i + 1, split, metrics, tokens_per_second=speed)
            note = f"loss {metrics['loss']:.3f}  {speed:4.0f} tokens/s"
            progress.update(bar, completed=i + 1, note=note)
            last = i + 1 == args.steps
            if last or (i + 1) % args.evaluate_every == 0:
                metrics = jax.device_get(judge(state, frozen, judged))
                log.write(i + 1, "held-out", metrics)
            if last or (i + 1) % args.save_every == 0:
                manager.save(i + 1, args=ocp.args.StandardSave(state))
    student, _ = nnx.merge(structure, state)
    return student


def check_settings(args, teacher, corpus, cache):
    """Raises an error if the run was started with other settings."""
    free = "output", "ways", "mesh", "real", "save_every", "prompt", "teacher", "text"
    settings = {k: str(v) for k, v in vars(args).items() if k not in free}
    settings |= caches.identity(teacher, corpus)
    settings["cache"] = cache and cache.manifest
    path = args.output / "settings.json"
    if path.exists():
        try:
            caches.check_same(path, json.loads(path.read_text()), settings)
        except ValueError as error:
            raise ValueError(f"{error} Take another --output, or delete it.") from None
    caches.replace_file(path, json.dumps(settings, indent=1).encode() + b"\n")


def make_mesh(args):
    sizes = args.mesh or {"data": 1, "model": 1}
    count = sizes["data"] * sizes["model"]
    if args.mesh and not args.real:  # must run before JAX initializes devices
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", count)
    if count > (found := jax.device_count()):
        raise ValueError(f"--mesh is of {count} devices, and there are {found}.")
    axes = tuple(sizes.values()), tuple(sizes)
    kinds = (AxisType.Auto,) * 2
    return jax.make_mesh(*axes, axis_types=kinds, devices=jax.devices()[:count])


def main():
    parser, args = parse_arguments()
    logging.getLogger("absl").setLevel(logging.ERROR)
    sys.stdout.reconfigure(errors="replace")
    try:
        mesh = make_mesh(args)
        print("Loading the teacher", flush=True)
        teacher = model.load(args.teacher or model.teacher_file(), args.dtype)
        students = {"untrained": model.student_of(teacher, args.layers)}
        sizes = {"vocabulary": len(teacher.embedding), "MLP": teacher.config.ffn}
        for what, size in sizes.items():
            if size % (parts := mesh.shape["model"]):
                message = f"--mesh: model={parts} does not divide the {what}, {size}."
                raise ValueError(message)
        cuts = args.length, args.held_out, args.windows
        corpus = data.load(args.text, teacher.tokenizer, *cuts)
        length = args.prompt_length
        if length and np.all(corpus.held_out.labels[:, length - 1] < 0):
            raise ValueError(
                f"--prompt-length: no held-out window is longer than the prompt, "
                f"{length} tokens."
            )
        cache = None
        if args.cache:
            cache = caches.Cache.open(args.cache, teacher, corpus, args.tail)
            cache.check(args.divergence, args.temperature)
        check_settings(args, teacher, corpus, cache)
    except (ValueError, OSError) as error:
        parser.exit(1, f"train.py: {error}\n")
    windows = len(corpus.train.tokens)
    print(
        f"{teacher.name}, on {corpus.name}: {windows} windows of {args.length} tokens, "
        f"and {args.held_out} held out",
        flush=True,
    )
    columns = ("{task.description:9}", BarColumn(20), MofNCompleteColumn())
    columns += (TimeRemainingColumn(), "{task.fields[note]}")
    with Progress(*columns) as progress:
        judged = held_out(args, teacher, corpus, mesh)
        for way in args.ways:
            students[way] = train(
                args, way, teacher, corpus, cache, mesh, judged, progress
            )
    report.show(args)
    report.samples(args, teacher, students)
    print(f"Wrote {report.draw(args)}, and in {args.output} metrics.csv and events")


if __name__ == "__main__":
    main()
