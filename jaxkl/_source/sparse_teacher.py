"""Teachers given by a few columns of each row, as a user passes them."""

import dataclasses
from typing import Any, Literal, TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from .._util import checks as check
from .base import Given
from .list_source import ListSource


Tail = Literal["renormalize", "drop", "bucket", "uniform", "conditional"]
TAILS = ("renormalize", "drop", "bucket", "uniform", "conditional")


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class SparseTeacher(Given):
    r"""A teacher known by the log-probabilities of `k` columns in each row.

    Let $L$ be the listed columns, $p$ their probabilities and $\rho$ the rest of the
    mass. The tail says what becomes of it:

    - `"bucket"`: the rest is one more outcome, of probability $\rho$ in the teacher and
      $1 - \sum_L q$ in the student: two rows of $k + 1$ outcomes. It is a lower bound
      of the dense divergence.
    - `"renormalize"`: the listed mass is scaled to 1 and $p = 0$ elsewhere, so the
      values need not be normalised. It is biased. Divergences that are infinite where
      $p = 0 < q$, such as `ReverseKL`, refuse it.
    - `"drop"`: the loss is $\sum_L p \log (p / q)$, without the columns outside $L$.
      For `ForwardKL` only; the value may be negative.
    - `"uniform"`: $\rho$ is spread evenly over the columns outside $L$.
    - `"conditional"`: both models are taken given that the outcome is in $L$. The
      listed mass is scaled to 1, and the student is
      $q_v = e^{z_v} / \sum_{w \in L} e^{z_w}$, a softmax over the listed columns alone.
      The other logits have no influence, and a gradient of 0: nothing teaches the
      student to leave mass in the list. Any divergence has a meaning.

    The log-probabilities are at the teacher's temperature already: the `temperature` of
    a loss divides the student's logits only, and must be that of the list. They are
    constants to differentiation, and so are the other arrays. If all columns are
    listed, each tail gives the loss of the dense teacher.

    The rest is $e^{\mathrm{log\_rest}}$. Without it, the rest is
    $\rho = 1 - \sum_L p$, but at least what rounding may hide,
    $\tfrac\epsilon2 \sum_L p\,(1 + |\log p|)$, with the machine epsilon of the dtype in
    which `log_probs` are given: so divergences that are infinite at $p = 0$ stay
    finite. Masses $\sum_L p + \rho$ between 1 and 1.02, as rounding leaves them, are
    scaled to 1.

    Args:
      indices: Columns, integers `[..., k]`. -1 is an empty slot, and repeated columns
        add up. A token whose slots are all empty has nothing to renormalize, and
        nothing that is given: its loss is NaN.
      log_probs: The log-probabilities of these columns, `[..., k]`.
      tail: What becomes of the mass that is not listed.
      log_rest: The log of the mass outside the list, `[...]`, as `top_k_teacher` makes
        it; for the tails `"bucket"` and `"uniform"`. None: see above.
      temperature: The temperature at which the list was made, a number, or an array
        `[]` or `[...]`. The loss's `teacher_temperature`, or its `temperature` if that
        is None, must be the same, to a thousandth: if it is not, that is an error, and
        a loss of NaN where a value is traced. None: it is not known.

    Raises:
      ValueError: For an unknown tail. The loss has one for shapes that do not fit and,
        where values are known, for columns out of range and, with the tails `"bucket"`,
        `"uniform"` and `"drop"`, for a mass above 1.02, as raw logits and probabilities
        have. Where they are traced, the loss of such a token is NaN.

    References:
      Anshumann et al. [Sparse Logit Sampling: Accelerating Knowledge Distillation in
      LLMs](https://arxiv.org/abs/2503.16870), 2025.
    """

    indices: jax.Array
    log_probs: jax.Array
    tail: Tail = dataclasses.field(default="bucket", kw_only=True)
    log_rest: jax.Array | None = dataclasses.field(default=None, kw_only=True)
    temperature: ArrayLike | None = dataclasses.field(default=None, kw_only=True)

    if TYPE_CHECKING:

        def __init__(
            self,
            indices: ArrayLike,
            log_probs: ArrayLike,
            *,
            tail: Tail = "bucket",
            log_rest: ArrayLike | None = None,
            temperature: ArrayLike | None = None,
        ) -> None: ...

    def __post_init__(self):
        check.one_of("tail", self.tail, TAILS)
        if check.is_number(self.temperature):
            check.temperature("temperature", self.temperature, ())

    def tree_flatten_with_keys(self):
        # A temperature that is a number is part of the program.
        static = None if _is_leaf(self.temperature) else self.temperature
        leaves = {name: getattr(self, name) for name in _LEAVES}
        if not _is_leaf(self.temperature):
            leaves["temperature"] = None
        keys = jax.tree_util.GetAttrKey
        return [(keys(name), x) for name, x in leaves.items()], (self.tail, static)

    @classmethod
    def tree_unflatten(cls, static, leaves):
        # They may be anything that JAX puts in the place of a leaf: nothing is checked.
        new = object.__new__(cls)
        tail, temperature = static
        fields = dict(zip(_LEAVES, leaves, strict=True), tail=tail)
        if temperature is not None:
            fields["temperature"] = temperature
        for name, x in fields.items():
            object.__setattr__(new, name, x)
        return new

    def checked(self, name):
        if name == "student":
            raise TypeError("`student` must be logits or a head, got SparseTeacher.")
        indices = check.int_array(f"{name}.indices", self.indices)
        log_probs = check.float_array(f"{name}.log_probs", self.log_probs)
        if indices.ndim == 0 or indices.shape != log_probs.shape:
            raise ValueError(
                f"`{name}.indices` and `{name}.log_probs` must both be [..., k], got "
                f"{indices.shape} and {log_probs.shape}."
            )
        if indices.shape[-1] == 0:
            raise ValueError(
                f"`{name}.indices` must list a column at least, got k = 0."
            )
        log_rest = self.log_rest
        if log_rest is not None:
            log_rest = check.float_array(f"{name}.log_rest", log_rest)
            shape = indices.shape[:-1]
            check.of_shape(f"{name}.log_rest", log_rest, shape, "the batch shape")
            log_rest = log_rest[..., None]
        eps = float(jnp.finfo(log_probs.dtype).eps)
        return ListSource(indices, log_probs, log_rest, tail=self.tail, eps=eps)


_LEAVES = "indices", "log_probs", "log_rest", "temperature"


def _is_leaf(temperature: Any) -> bool:
    return temperature is not None and not check.is_number(temperature)
