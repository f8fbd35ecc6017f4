"""The models of a loss: their logits have the same tokens and the same vocabulary."""

from typing import NamedTuple

import jax
from jax.typing import ArrayLike

from .._engine.layout import as_layout, Layout
from .._math.vocabulary import Vocabulary
from .._source.base import flattened, Given, Source
from .._source.logits import as_source
from .._util import checks as check
from .arguments import as_mask, as_vocabulary
from .options import Options


PLANS = ("fast", "lean")


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
        check.one_of("plan", plan, PLANS)
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
