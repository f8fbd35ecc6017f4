"""A source whose logits are any function of hidden states and parameters.

`jax.vjp` of the function gives all gradients together, so that none is made for a token
that is not counted, and the function runs once for the logits and for them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from .._math.numerics import zero_unless
from .._util.compat import abstract_eval, zeros
from .._util.trees import combine, select
from .base import Kind, pad_to_width, Source


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
