"""Any function of hidden states and parameters in place of logits.

`jax.vjp` of the function gives all gradients together, so that none is made for a token
that is not counted, and the function runs once for the logits and for them.
"""

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any, ClassVar, TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from .._math.numerics import zero_unless
from .._util import checks as check
from .._util.compat import abstract_eval, zeros
from .._util.trees import combine, select
from .base import Given, Kind, pad_to_width, Source


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


@dataclasses.dataclass(frozen=True)
class OfLeaves:
    """`apply` as a function of the leaves of `params`: the engine makes trees of flags
    and of dtypes, which a user's pytree need not allow for."""

    apply: Callable[[Any, jax.Array], jax.Array]
    structure: Any  # of the pytree

    def __call__(self, leaves, hidden):
        return self.apply(self.structure.unflatten(leaves), hidden)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FunctionSource(Source):
    """A `FunctionHead` that is checked."""

    leaves: tuple[Any, ...]
    hidden: Any
    # bool [B, 1]. A token that is absent can have no weight: the engine has masked it,
    # or added it as padding, and all its rows are 0. An unsound one has weight 0, and
    # the function may have no gradient there.
    is_present: Any
    is_unsound: Any
    made: Any = None  # the logits of `apply`, and what pulls their gradient back
    apply: OfLeaves = dataclasses.field(kw_only=True, metadata={"static": True})
    specs: tuple[Any, ...] | None = dataclasses.field(
        kw_only=True, metadata={"static": True}
    )
    # That of the logits of some tokens, with the columns of all devices of a mesh.
    made_type: Any = dataclasses.field(kw_only=True, metadata={"static": True})

    kind: ClassVar[Kind] = "head"
    shared: ClassVar[frozenset[str]] = frozenset({"leaves"})
    makes_blocks: ClassVar[bool] = False
    pulls_back_uncounted: ClassVar[bool] = False

    def checked(self, name):
        del name
        return self

    @property
    def batch_shape(self):
        return self.hidden.shape[:-1]

    @property
    def vocab_array(self):
        return self.made_type

    def pad_columns(self, width):
        if width != self.width:
            raise ValueError(
                "`param_specs` must be None for a vocabulary that the mesh does not "
                f"divide, or with fewer columns than the other model: `apply` makes "
                f"{self.width} columns, and the devices need {width} together."
            )
        return self

    def partition_specs(self, token_axes, vocab_axis):
        specs = (P(),) * len(self.leaves)
        if vocab_axis is not None:
            assert self.specs is not None
            specs = self.specs
            axes = {vocab_axis, None}
            for spec in specs:
                if not axes.issuperset(spec):
                    raise ValueError(
                        f"`param_specs` must be over `vocab_axis`, {vocab_axis!r}, "
                        f"alone, got {spec}."
                    )
        rows = P(token_axes or None, None)
        return dataclasses.replace(
            self, leaves=specs, hidden=rows, is_present=rows, is_unsound=rows
        )

    @property
    def passes_float16(self):
        return self.vocab_array.dtype == jnp.float16

    @property
    def splits_columns(self):
        return self.specs is not None

    def with_weightless(self, weightless, dropped):
        # A weight of 0 may be differentiated, and with it, later, the gradients: they
        # must be those at the token's own hidden states, unless it holds junk. A norm
        # may be NaN at zeros, as padding holds them.
        is_sound = jnp.isfinite(self.hidden).all(axis=-1) & self.hidden.any(axis=-1)
        return dataclasses.replace(
            self,
            is_present=self.is_present & ~dropped[:, None],
            is_unsound=self.is_unsound | (weightless & ~is_sound)[:, None],
        )

    def linearized(self, asked, *, with_terms=False):
        """With its logits made, as `apply` is to run once for them and the gradient."""
        if not jax.tree.leaves(asked):
            return self
        arrays = self.leaves, self.hidden
        chosen = select((asked.leaves, asked.hidden), arrays)

        def f(chosen):
            leaves, hidden = combine(chosen, arrays)
            return self._rows(leaves, hidden, self.is_present & ~self.is_unsound)

        logits, pull = jax.vjp(f, chosen)
        if with_terms:
            # The gradient of a weight of 0 is what `apply` makes of the token.
            logits = self._rows(*arrays, self.is_present)
        else:
            is_nan = self.is_present & self.is_unsound
            logits = jnp.where(is_nan, jnp.nan, logits)
        return dataclasses.replace(self, made=(logits, pull))

    def logits(self, dtype, vocab):
        if self.made is None:
            x = self._rows(self.leaves, self.hidden, self.is_present)
        else:
            x, _ = self.made
        if vocab.axis_name is not None and x.shape[-1] != vocab.width:
            raise ValueError(
                f"`apply` must make {vocab.width} columns on each device of mesh axis "
                f"{vocab.axis_name!r}, got {x.shape[-1]}."
            )
        return vocab.fit(x.astype(dtype))

    def _rows(
        self, leaves: tuple[Any, ...], hidden: jax.Array, is_own: jax.Array
    ) -> jax.Array:
        """The logits, of an ordinary vector for the tokens that are not `is_own`.

        0 · NaN is NaN in the gradient of a shared array, and of zeros, too, a norm may
        be NaN.
        """
        ordinary = jnp.linspace(1, 2, hidden.shape[-1], dtype=hidden.dtype)
        ordinary = jnp.broadcast_to(ordinary, hidden.shape)
        f = self.apply
        for _ in hidden.shape[2:]:
            # To reshape would gather tokens that are spread over devices.
            f = jax.vmap(f, in_axes=(None, 0))
        return f(leaves, jnp.where(is_own, hidden, ordinary))

    def output_dtype(self, dtype):
        """That of the logits that `apply` makes, whose gradient it takes. It is never
        float16, in which the gradient of a mean would underflow."""
        made = self.vocab_array.dtype
        return dtype if made == jnp.float16 else made

    def vjp(self, d_outputs, counted):
        without_gradient = dataclasses.replace(
            self,
            leaves=(None,) * len(self.leaves),
            hidden=None,
            is_present=None,
            is_unsound=None,
            made=None,
        )
        if self.made is None:
            return without_gradient
        logits, pull = self.made
        d_logits = zero_unless(counted[..., None], d_outputs)
        d_logits = pad_to_width(d_logits, logits.shape[-1]).astype(logits.dtype)
        ((d_leaves, d_hidden),) = pull(d_logits)
        d_leaves = jax.tree.map(_in_32_bits, d_leaves)
        return dataclasses.replace(without_gradient, leaves=d_leaves, hidden=d_hidden)

    def pulls_back_at_once(self, asked):
        """Whether `vjp` of many tokens keeps nothing as large as their logits."""

        def kept(tokens):
            def f(leaves, hidden):
                hidden = zeros(hidden, (tokens, hidden.shape[-1]))
                flags = jnp.zeros_like(hidden[:, :1], bool)
                x = dataclasses.replace(
                    self,
                    leaves=leaves,
                    hidden=hidden,
                    is_present=flags,
                    is_unsound=flags,
                )
                return jax.tree.leaves(x.linearized(asked).made)

            logits, *arrays = abstract_eval(f, self.leaves, self.hidden)
            return logits.shape[-1], [x.size for x in arrays]

        (width, of_one), (_, of_two) = kept(1), kept(2)
        of_a_token = (two - one for one, two in zip(of_one, of_two, strict=True))
        return max(of_a_token, default=0) < width


def _in_32_bits(x: jax.Array) -> jax.Array:
    """In float32 if it is floating-point with fewer bits."""
    is_float = jnp.issubdtype(x.dtype, jnp.floating)
    return x.astype(jnp.float32) if is_float and x.dtype.itemsize < 4 else x
