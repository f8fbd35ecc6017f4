"""Any function of hidden states and parameters in place of logits, as a user has it."""

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any, TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from .._util import checks as check
from .._util.compat import zeros
from .base import Given
from .function_source import FunctionSource, OfLeaves


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FunctionHead(Given):
    r"""Any function from hidden states to logits, in place of these logits.

    $$ \mathrm{logits} = \mathrm{apply}(\mathrm{params}, \mathrm{hidden}) $$

    is made a tile of tokens at a time, and so is its gradient, by `jax.vjp`: logits are
    never all in memory. A final norm with its head, a head with LoRA factors, or a head
    of 8-bit weights are such functions. For one product with a bias and a soft cap,
    `LinearHead` also has the lean plan, which makes a few columns at a time, and needs
    no `param_specs`.

    It is a pytree, whose floating-point parameters and hidden states get gradients.
    Integers, bools and random keys have none (float0, as of `jax.grad`), and parameters
    that are not differentiated cost nothing. Gradients of parameters are summed over
    tiles in float32, and rounded once to the dtype of their array.

    On an accelerator, a function that keeps nothing as wide as the logits for its
    gradient, such as a norm and a product, has its gradient made of many tokens at
    once, as `LinearHead` has. For that it runs once more, but the compiler leaves out
    the product that makes the logits. A function that does keep such an array, such as
    one that ends in a soft cap, is pulled back a tile at a time.

    On a mesh, each device has all parameters, and the devices of `token_axes` and of
    `vocab_axis` take tokens each. If both models can be split, a function by its
    `param_specs`, the devices of `vocab_axis` split the columns instead. Inside your
    own `shard_map`, with `axis_name`, `apply` makes the columns of its device from the
    parameters that it is given there.

    Tokens that do not count may hold NaN, or zeros, where a norm may have no gradient.
    Columns beyond `vocab_size` have no part in the loss, but the gradient of `apply`
    must be finite there.

    Args:
      apply: `(params, hidden) -> logits`, for any number of tokens: from
        `[tokens, hidden]` it makes `[tokens, vocab]`, each row from its own token. It
        must be hashable, and everything that is differentiated or traced must come in
        `params`. It is part of the program, and functions are told apart by identity:
        define it once, outside the training loop, or each step compiles again.
      params: Any pytree of arrays: a Flax NNX state, the variables of Linen, a dict
        with None in it.
      hidden: Hidden states, `[..., hidden]`.
      param_specs: A `jax.sharding.PartitionSpec` for each array of `params`, or for
        groups of them (a prefix of the pytree), over `vocab_axis` alone. Where a mesh
        has a `vocab_axis`, `apply` then gets the parts of the parameters that a device
        holds, and makes an equal part of the columns. The mesh must divide the
        vocabulary.

    Example:
      A norm before the head:

      >>> import jax, jax.numpy as jnp
      >>> def apply(params, x):
      ...     x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)
      ...     return (x * params["scale"][None, :]) @ params["kernel"]
      >>> params = dict(scale=jnp.ones(2), kernel=jnp.array([[0.0, 0.5], [0.0, 0.5]]))
      >>> head = jaxkl.FunctionHead(apply, params, jnp.full((1, 2), 3.0))
      >>> print(f"{jaxkl.distillation_loss(jnp.zeros((1, 2)), head):.4f}")
      0.1109
    """

    apply: Callable[[Any, jax.Array], jax.Array] = dataclasses.field(
        metadata={"static": True}
    )
    params: Any
    hidden: jax.Array
    param_specs: Any = dataclasses.field(
        default=None, kw_only=True, metadata={"static": True}
    )

    if TYPE_CHECKING:

        def __init__(
            self,
            apply: Callable[[Any, jax.Array], jax.Array],
            params: Any,
            hidden: ArrayLike,
            *,
            param_specs: Any = None,
        ) -> None: ...

    def __post_init__(self):
        if not callable(self.apply):
            raise TypeError(f"`apply` must be callable, got {self.apply!r}.")
        if not isinstance(self.apply, Hashable):
            raise TypeError(f"`apply` must be hashable, got {self.apply!r}.")
        if self.param_specs is not None:
            specs = _Specs.of(self.param_specs)
            object.__setattr__(self, "param_specs", specs)

    def checked(self, name):
        hidden = check.float_array(f"{name}.hidden", self.hidden)
        if hidden.ndim == 0 or hidden.shape[-1] == 0:
            raise ValueError(
                f"`{name}.hidden` must be [..., hidden], got shape {hidden.shape}."
            )
        pairs, structure = jax.tree.flatten_with_path(self.params)
        leaves = tuple(
            _as_array(f"{name}.params{jax.tree_util.keystr(path)}", x)
            for path, x in pairs
        )
        specs = None
        if self.param_specs is not None:
            specs = self.param_specs.of_leaves(f"{name}.param_specs", self.params)
        f = OfLeaves(self.apply, structure)
        is_present = jnp.ones_like(hidden[..., :1], bool)
        made_type = _logits_type(name, f, leaves, hidden)
        return FunctionSource(
            leaves,
            hidden,
            is_present,
            ~is_present,
            apply=f,
            specs=specs,
            made_type=made_type,
        )


def _as_array(name: str, x: Any) -> jax.Array:
    if not (hasattr(x, "dtype") or check.is_number(x) or isinstance(x, bool)):
        raise TypeError(f"`{name}` must be an array, got {type(x).__name__}.")
    return check.array(name, x, "numbers")


def _logits_type(name: str, apply: Any, leaves: tuple[Any, ...], hidden: jax.Array):
    """The type of the logits of some tokens, once it is checked."""
    width = hidden.shape[-1]
    f = lambda leaves, hidden: apply(leaves, zeros(hidden, (2, width)))
    try:
        jaxpr, out = jax.make_jaxpr(f, return_shape=True)(leaves, hidden)
    except Exception as error:
        _check_order(name, apply, leaves, hidden)
        error.add_note(
            f"`{name}.apply` was called as apply(params, hidden), with hidden "
            f"{hidden.dtype.name}{[2, width]}."
        )
        raise
    if any(map(check.is_traced, jaxpr.consts)):
        raise ValueError(
            f"`{name}.apply` must not close over traced values: pass them in `params`, "
            "or they would have no gradient."
        )
    is_array = isinstance(out, jax.ShapeDtypeStruct)
    if not is_array or len(out.shape) != 2 or out.shape[0] != 2:
        got = jax.tree.map(lambda x: list(x.shape), out)
        raise ValueError(
            f"`{name}.apply` must make logits [tokens, vocab] from hidden states "
            f"[tokens, hidden]: of {[2, width]} it makes {got}."
        )
    if out.dtype.name not in check.FLOAT_DTYPES:
        raise TypeError(
            f"`{name}.apply` must make floating-point logits, one of "
            f"{', '.join(check.FLOAT_DTYPES)}; got {out.dtype.name}."
        )
    return jaxpr.out_avals[0]


def _check_order(name: str, apply: Any, leaves: tuple[Any, ...], hidden: jax.Array):
    """Checks that `apply`, which fails, does not take its arguments in reverse."""
    reverse = lambda leaves, hidden: apply.apply(
        zeros(hidden, (2, hidden.shape[-1])), apply.structure.unflatten(leaves)
    )
    try:
        out = jax.eval_shape(reverse, leaves, hidden)
    except Exception:
        return
    if getattr(out, "shape", ())[:-1] == (2,):
        raise ValueError(
            f"`{name}.apply` must be `(params, hidden) -> logits`: it fails, and as "
            "`(hidden, params) -> logits` it does not. Swap its arguments."
        )


@dataclasses.dataclass(frozen=True)
class _Specs:
    """A pytree of `PartitionSpec`, hashable."""

    leaves: tuple[Any, ...]
    structure: Any  # of the pytree

    @classmethod
    def of(cls, specs: Any) -> "_Specs":
        if isinstance(specs, cls):
            return specs
        leaves, structure = jax.tree.flatten(specs, is_leaf=lambda x: isinstance(x, P))
        for x in leaves:
            if not isinstance(x, P):
                raise TypeError(
                    f"`param_specs` must be a pytree of PartitionSpec, got {x!r} in it."
                )
        return cls(tuple(leaves), structure)

    def of_leaves(self, name: str, params: Any) -> tuple[Any, ...]:
        """One for each array of `params`."""
        try:
            specs = self.structure.flatten_up_to(params)
        except ValueError as error:
            raise ValueError(
                f"`{name}` must have the structure of `params`, or of a part of it "
                f"from the top: {error}"
            ) from error
        pairs = zip(self.leaves, specs, strict=True)
        return tuple(
            spec
            for spec, subtree in pairs
            for _ in range(len(jax.tree.leaves(subtree)))
        )
