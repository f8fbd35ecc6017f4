"""The arguments of a public function as one record.

The fields have the names of the function's parameters, so that the function can make
the record of its `locals()`, before it does anything else. A name too many or too few
is an error in every call. The defaults are in the signature, where users read them.
An error for a keyword argument that is not there says what may be meant.
"""

import difflib
import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast, Literal, ParamSpec, TypeVar

from jax.sharding import AbstractMesh, Mesh
from jax.typing import ArrayLike

from .._divergence.catalogue import Divergence
from .._engine.operands import PlanName
from .._source.base import Given


F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")

Reduction = Literal["none", "sum", "mean"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Options:
    """What every function takes that walks over the tokens of a student."""

    student: ArrayLike | Given
    where: ArrayLike | None
    vocab_size: int | None
    axis_name: str | None
    mesh: Mesh | AbstractMesh | None
    token_axes: str | Sequence[str] | None
    vocab_axis: str | None
    tile: int | None
    plan: PlanName | None


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelOptions(Options):
    """The arguments of `cross_entropy`, which those of a distillation loss have too."""

    labels: ArrayLike | None
    label_smoothing: ArrayLike
    z_loss: ArrayLike
    weights: ArrayLike | None
    reduction: Reduction
    normalizer: ArrayLike | None


@dataclass(frozen=True, kw_only=True, eq=False)
class LossOptions(LabelOptions):
    """The arguments of `distillation_loss`."""

    teacher: ArrayLike | Given
    divergence: Divergence
    temperature: ArrayLike
    teacher_temperature: ArrayLike | None
    t_squared: bool
    alpha: ArrayLike | None
    differentiate_teacher: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class MetricsOptions(LossOptions):
    """Those of `distillation_loss_with_metrics`."""

    per_token_metrics: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenOptions(Options):
    """The arguments of `token_log_probs`."""

    tokens: ArrayLike
    temperature: ArrayLike
    with_entropy: bool


def arguments_of(
    public: F, record: Callable[..., T]
) -> Callable[[Callable[[T], Any]], F]:
    """Makes a function of a record one that has the arguments of `public`.

    To type checkers it is `public`, whose overloads a `ParamSpec` would lose.
    """
    signature = inspect.signature(public)

    def decorate(f: Callable[[T], Any]) -> F:
        def of_arguments(*args, **kwargs):
            try:
                bound = signature.bind(*args, **kwargs)
            except TypeError:
                public(*args, **kwargs)  # Its own error says more.
                raise
            bound.apply_defaults()
            return f(record(**bound.arguments))

        functools.update_wrapper(of_arguments, f)
        of_arguments.__signature__ = signature
        of_arguments.__annotations__ = public.__annotations__
        return cast(F, of_arguments)

    return decorate


P = ParamSpec("P")
R = TypeVar("R")

# The names that other libraries have for ours.
_MEANT = {
    "mask": "where",
    "attention_mask": "where",
    "loss_mask": "where",
    "sample_weight": "weights",
    "sample_weights": "weights",
    "T": "temperature",
    "tau": "temperature",
    "targets": "labels",
    "num_items_in_batch": "normalizer",
    "chunk_size": "tile",
}


def suggest_keywords(f: Callable[P, R]) -> Callable[P, R]:
    """`f`, whose `TypeError` for an unknown keyword argument says what may be meant."""
    known = inspect.signature(f).parameters

    @functools.wraps(f)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in kwargs:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                meant = _MEANT.get(name) or "".join(near)
                hint = f"; did you mean `{meant}`?" if meant else ""
                raise TypeError(
                    f"{f.__name__}() got an unexpected keyword argument `{name}`{hint}"
                )
        return f(*args, **kwargs)

    return checked
