"""The arguments of a loss, each checked and made an array or a source."""

from collections.abc import Mapping
from typing import Any, get_args, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from .._divergence.catalogue import check_callable, foreign_members
from .._engine.comparison import Comparison
from .._engine.operands import Operands, PlanName
from .._engine.sharding import as_layout, Layout
from .._engine.student_terms import Label
from .._math.vocabulary import Vocabulary
from .._source.base import as_source, flattened, Given, Source
from .._source.function_head import FunctionSource
from .._util import checks as check
from .._util.compat import varying_axes
from .options import Options


IGNORED_LABEL = -100


def as_vocabulary(
    vocab_size: int | None, sources: Mapping[str, Source], axis_name: str | None
) -> Vocabulary:
    """The vocabulary of the models, by the names of their arguments."""
    if vocab_size is not None:
        vocab_size = check.positive_int("vocab_size", vocab_size)
    widths = {name: x.width for name, x in sources.items() if x.width is not None}
    (first, width), *_ = widths.items()
    differ = " and ".join(map(str, widths.values()))
    if axis_name is not None:
        if len(set(widths.values())) > 1:
            raise ValueError(
                "`student` and `teacher` must hold slices of the same vocabulary on "
                f"each device of axis {axis_name!r}, got {differ} columns."
            )
        vocab = Vocabulary.slice_of(axis_name, width, vocab_size)
        if vocab.size > vocab.width * vocab.shards:
            raise ValueError(
                f"`vocab_size` must be at most the {vocab.width * vocab.shards} "
                f"columns of all devices of axis {axis_name!r}, got {vocab_size}."
            )
        return vocab
    if vocab_size is None and len(set(widths.values())) > 1:
        raise ValueError(
            f"`student` and `teacher` must have the same vocabulary, got {differ} "
            f"columns; with padding columns, pass `vocab_size`.{_as_hidden(sources)}"
        )
    if vocab_size is not None and vocab_size > min(widths.values()):
        others = (f", and of `{k}`, {v}" for k, v in widths.items() if k != first)
        raise ValueError(
            f"`vocab_size` must be at most the columns of `{first}`, "
            f"{width}{''.join(others)}, got {vocab_size}.{_as_hidden(sources)}"
        )
    return Vocabulary.whole(width if vocab_size is None else vocab_size)


def _as_hidden(models: Mapping[str, Source]) -> str:
    """What to look for if a function makes as many columns as its argument has."""
    return "".join(
        f" `{name}.apply` makes as many columns as its hidden states have, {x.width}: "
        "if it returns hidden states, multiply them by the matrix of the head."
        for name, x in models.items()
        if isinstance(x, FunctionSource) and x.width == x.hidden.shape[-1]
    )


def check_slices(axis_name: str, operands: Operands, labels: str = "labels") -> None:
    """Checks that the vocabulary, and nothing else, is spread over the axis.

    `labels` is the argument that holds them.
    """
    for name, source in zip(("student", "teacher"), operands.sources, strict=False):
        array = source.vocab_array
        if array is not None and axis_name not in varying_axes(array):
            raise ValueError(
                f"`{name}` must hold a slice of the vocabulary on each device of axis "
                f"{axis_name!r}, got the same columns on all of them."
            )
    compared = [x for x in operands.terms if isinstance(x, Comparison)]
    replicated = {
        "where": operands.mask,
        labels: [x.labels for x in operands.terms if isinstance(x, Label)],
        "temperature": operands.student_temperature,
        "teacher_temperature": [x.temperature for x in compared],
        "weights": operands.weights,
        "divergence": [x.parameters for x in compared],
        "teacher": [x for x in operands.sources if x.width is None],
    }
    for name, arrays in replicated.items():
        if any(axis_name in varying_axes(x) for x in jax.tree.leaves(arrays)):
            raise ValueError(
                f"`{name}` must be the same on all devices of axis {axis_name!r}, over "
                "which only the vocabulary is spread; got an array that varies over it."
            )


def per_token(
    x: ArrayLike | None, shape: tuple[int, ...], dtype: jnp.dtype
) -> jax.Array | None:
    """A number, or an array that is a scalar or of `shape`, as `[B]`. None is kept."""
    if x is None:
        return None
    return jnp.broadcast_to(jnp.asarray(x, dtype), shape).reshape(-1)


def as_mask(where: ArrayLike, shape: tuple[int, ...]) -> jax.Array:
    """The tokens to keep, bool `[B]`."""
    mask = check.bool_array("where", where)
    return check.of_shape("where", mask, shape, "the batch shape").reshape(-1)


def as_labels(
    given: ArrayLike | None,
    mask: jax.Array | None,
    shape: tuple[int, ...],
    vocab_size: int,
) -> jax.Array:
    """The labels, `[B]`; those of tokens in `mask` are checked if they are known."""
    labels = check.int_array("labels", given)
    check.of_shape("labels", labels, shape, "the batch shape")
    none = f"{IGNORED_LABEL} for no label"
    check_columns("labels", given, labels, mask, vocab_size, IGNORED_LABEL, none)
    return labels.reshape(-1)


def as_tokens(
    given: ArrayLike, mask: jax.Array | None, shape: tuple[int, ...], vocab_size: int
) -> tuple[jax.Array, tuple[int, ...]]:
    """Tokens, `[B]` or several in each place, `[B, k]`, and their shape before.

    Those in `mask` are checked if they are known.
    """
    tokens = check.int_array("tokens", given)
    if tokens.shape != shape and tokens.shape[:-1] != shape:
        raise ValueError(
            f"`tokens` must have the batch shape {shape}, or an axis more for several "
            f"tokens in each place, got {tokens.shape}."
        )
    none = "-1 for an empty slot"
    check_columns("tokens", given, tokens, mask, vocab_size, -1, none)
    k = tokens.shape[len(shape) :]
    if k == (0,):
        raise ValueError(f"`tokens` must hold a token at least, got {tokens.shape}.")
    # A single one costs no gather.
    return tokens.reshape(-1, *k) if k != (1,) else tokens.reshape(-1), tokens.shape


def check_columns(
    name: str,
    given: Any,
    columns: jax.Array,
    mask: jax.Array | None,
    vocab_size: int,
    none: int,
    what: str,
) -> None:
    """Checks that the columns of tokens in `mask` exist or are `none`, if known."""
    if not (check.is_known(columns) and check.is_known(mask)):
        return
    known = np.asarray(columns)
    bad = (known != none) & ((known < 0) | (known >= vocab_size))
    if mask is not None:
        kept = np.asarray(mask)
        bad &= np.broadcast_to(
            kept[:, None], (kept.size, bad.size // max(kept.size, 1))
        ).reshape(bad.shape)
    if bad.any():
        raise ValueError(
            f"`{name}` must be in [0, {vocab_size}), or {what}, got "
            f"{np.asarray(given)[bad][0]}."
        )


def check_divergence(
    divergence: Any, vocab: Vocabulary, teacher: Source, is_spread: bool
) -> None:
    """Checks that it is a pure elementwise function that can be a static argument.

    `is_spread` is whether the vocabulary is spread over devices.
    """
    check_callable("divergence", divergence)
    sees_any_width = teacher.width is None or is_spread
    for own in foreign_members(divergence):
        _check_elementwise(own, vocab.size, sees_any_width)


def _check_elementwise(divergence: Any, vocab_size: int, sees_any_width: bool) -> None:
    """Checks it on two arrays as wide as the vocabulary.

    If it sees any width, they have one column more, so that a function that holds an
    array with an entry for each column fails.
    """
    name = "`divergence`"
    width = vocab_size + 1 if sees_any_width else vocab_size
    arg = jax.ShapeDtypeStruct((2, width), jnp.float32)
    of = f"{arg.dtype.name}{list(arg.shape)}"
    try:
        jaxpr = jax.make_jaxpr(divergence)(arg, arg)
    except (TypeError, ValueError) as error:
        hint = (
            " With a SparseTeacher, or a vocabulary that is spread over devices, it "
            "must not hold an array with an entry a column."
        )
        raise ValueError(
            f"{name} must be elementwise, for arrays of any shape, and {divergence!r} "
            f"fails for two of {of}: {error}{hint if sees_any_width else ''}"
        ) from error
    if any(map(check.is_traced, jaxpr.consts)):
        raise ValueError(
            f"{name} must not close over traced values, as {divergence!r} does: make "
            "them Python numbers."
        )
    out = jaxpr.out_avals
    if [(x.shape, x.dtype) for x in out] != [(arg.shape, arg.dtype)]:
        got = ", ".join(f"{x.dtype.name}{list(x.shape)}" for x in out)
        raise ValueError(
            f"{name} must be elementwise: of two {of} it must make one, got {got}."
        )


class CheckedModels(NamedTuple):
    """What any walk over tokens is given, its tokens flattened to one axis."""

    sources: tuple[Source, ...]  # the student, and the teacher if there is one
    vocab: Vocabulary
    mask: jax.Array | None  # [B], of `where`
    layout: Layout | None
    batch_shape: tuple[int, ...]


def checked_models(options: Options, *teachers: ArrayLike | Given) -> CheckedModels:
    tile, plan, axis_name = options.tile, options.plan, options.axis_name
    if tile is not None:
        tile = check.positive_int("tile", tile)
    if plan is not None:
        check.one_of("plan", plan, get_args(PlanName))
    if plan == "lean" and tile is not None:
        raise ValueError(
            f'`tile` must be None with plan="lean", which has no tiles; got {tile}.'
        )
    layout = as_layout(options.mesh, options.token_axes, options.vocab_axis, axis_name)
    given = zip(("student", "teacher"), (options.student, *teachers), strict=False)
    sources = {name: as_source(name, x) for name, x in given}
    for name, source in sources.items():
        if plan == "lean" and not source.makes_blocks:
            raise ValueError(
                f'`plan` must not be "lean" with a FunctionHead as `{name}`, whose '
                "columns can be made together only; take a LinearHead or another plan."
            )
        if layout is not None and not source.splits_columns:
            layout = layout.without_vocab_axis()
    shape, *others = (source.batch_shape for source in sources.values())
    if any(other != shape for other in others):
        raise ValueError(
            "`student` and `teacher` must have the same batch shape, got "
            f"{shape} and {others[0]}."
        )
    sources = {name: flattened(source) for name, source in sources.items()}
    vocab = as_vocabulary(options.vocab_size, sources, axis_name)
    mask = None if options.where is None else as_mask(options.where, shape)
    return CheckedModels(tuple(sources.values()), vocab, mask, layout, shape)
