"""A source whose logits are made, a tile at a time, from hidden states and a head."""

import dataclasses
import math
from collections.abc import Callable
from typing import ClassVar, TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from .._math.numerics import loss_dtype, weigh, zero_unless
from .._util import checks as check
from .base import Kind, pad_to_width, Source


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LinearHead(Source):
    r"""A language model's head, in place of its logits: they are never all in memory.

    $$ \mathrm{logits} = c \tanh(x / c), \qquad
       x = \mathrm{scale} \cdot (\mathrm{hidden} \cdot \mathrm{kernel})
           + \mathrm{bias}, $$

    or $x$ itself if `softcap` $c$ is None. It is a pytree, whose three arrays get
    gradients.

    A loss of two heads and its gradients cost four matrix products: the logits of each,
    `d hidden` and `d kernel`. Only with `reduction="none"`, and in float16, are logits
    made twice. An array that is not differentiated (under `jax.lax.stop_gradient`, or
    no argument of `jax.grad`) costs nothing.

    Products take bfloat16 operands as they are and accumulate in float32. `d kernel`
    and `d bias` are summed over a device's tokens in float32 and rounded once to their
    array's dtype, in which JAX sums them over devices that split the tokens. `d hidden`
    is summed in float32 over devices that split the vocabulary, and then rounded.

    Args:
      hidden: Input of the head, `[..., hidden]`.
      kernel: Matrix of the head, `[hidden, vocab]`, as Flax has it. Pass `embedding.T`
        if it is tied to the embedding.
      bias: `[vocab]`, or None.
      softcap: Bound $c$ of the logits, as in Gemma 2. A Python number > 0, or None.
      scale: Factor of the product. A Python number.

    Example:
      >>> import jax.numpy as jnp
      >>> head = jaxkl.LinearHead(jnp.ones((1, 2)), jnp.array([[0.0, 0.0], [0.0, 1.0]]))
      >>> print(f"{jaxkl.distillation_loss(jnp.zeros((1, 2)), head):.4f}")
      0.1109
    """

    hidden: jax.Array
    kernel: jax.Array
    bias: jax.Array | None = None
    softcap: float | None = dataclasses.field(
        default=None, kw_only=True, metadata={"static": True}
    )
    scale: float = dataclasses.field(
        default=1.0, kw_only=True, metadata={"static": True}
    )

    kind: ClassVar[Kind] = "head"
    shared: ClassVar[frozenset[str]] = frozenset({"kernel", "bias"})
    by_column: ClassVar[frozenset[str]] = frozenset({"kernel", "bias"})

    if TYPE_CHECKING:

        def __init__(
            self,
            hidden: ArrayLike,
            kernel: ArrayLike,
            bias: ArrayLike | None = None,
            *,
            softcap: float | None = None,
            scale: float = 1.0,
        ) -> None: ...

    def __post_init__(self):
        for name, number in (("softcap", self.softcap), ("scale", self.scale)):
            if number is not None and not check.is_number(number):
                raise TypeError(f"`{name}` must be a Python number, got {number!r}.")
        if self.softcap is not None:
            check.in_range("softcap", self.softcap, 0, positive=True)
        check.in_range("scale", self.scale, -math.inf)

    def checked(self, name):
        hidden = check.float_array(f"{name}.hidden", self.hidden)
        kernel = check.float_array(f"{name}.kernel", self.kernel)
        if hidden.ndim == 0 or kernel.ndim != 2 or kernel.shape[0] != hidden.shape[-1]:
            raise ValueError(
                f"`{name}.hidden` must be [..., hidden] and `{name}.kernel` [hidden, "
                f"vocab], got {hidden.shape} and {kernel.shape}."
            )
        bias = self.bias
        if bias is not None:
            bias = check.float_array(f"{name}.bias", bias)
            check.of_shape(f"{name}.bias", bias, kernel.shape[1:], "the shape [vocab]")
        return dataclasses.replace(self, hidden=hidden, kernel=kernel, bias=bias)

    @property
    def batch_shape(self):
        return self.hidden.shape[:-1]

    @property
    def vocab_array(self):
        return self.kernel

    def pad_columns(self, width):
        return self._map_shared(lambda x: pad_to_width(x, width))

    def ready(self, dtype, vocab):
        del dtype
        return self._map_shared(vocab.mask)

    def _map_shared(self, f: Callable[[jax.Array], jax.Array]) -> "LinearHead":
        return self.map_fields(lambda name, x: f(x) if name in self.shared else x)

    def partition_specs(self, token_axes, vocab_axis):
        specs = {
            "hidden": P(token_axes or None, None),
            "kernel": P(None, vocab_axis),
            "bias": P(vocab_axis),
        }
        return self.map_fields(lambda name, _: specs[name])

    def logits(self, dtype, vocab):
        # Padding columns may hold NaN, of which a later derivative of a product makes a
        # sum over columns: they are cut off before it.
        kernel = self.kernel[:, : vocab.width]
        x = _dot(self.hidden, kernel, ((-1,), (0,)), dtype) * self.scale
        if self.bias is not None:
            x += self.bias.astype(dtype)[None, : vocab.width]
        if self.softcap is not None:
            x = self.softcap * jnp.tanh(x / self.softcap)
        return vocab.fit(x)

    def d_outputs(self, logits, d_logits):
        """The gradient of `x`."""
        if self.softcap is not None:
            # d/dx c·tanh(x/c) = 1 - tanh²(x/c), and tanh(x/c) = logits/c.
            tanh = logits / self.softcap
            d_logits = weigh(d_logits, 1 - tanh * tanh)
        return d_logits

    def output_dtype(self, dtype):
        """That of an operand of the products: bfloat16 if the others are, for speed.

        It is never float16, in which the gradient of a mean would underflow.
        """
        common = _common_dtype(self.hidden, self.kernel)
        return dtype if common == jnp.float16 else common

    def vjp(self, d_outputs, counted):
        arrays = [x for x in (self.hidden, self.kernel, self.bias) if x is not None]
        dtype = loss_dtype(d_outputs, *arrays)
        width = self.kernel.shape[-1]
        operand = d_outputs.astype(self.output_dtype(dtype))
        # Padding columns of the kernel may hold NaN: leave them out of the product.
        kernel = self.kernel[:, : d_outputs.shape[-1]]
        d_hidden = self.scale * _dot(operand, kernel, ((-1,), (-1,)), dtype)
        # A token that is not counted may hold NaN, and 0 · NaN is NaN in a product.
        hidden = zero_unless(counted[..., None], self.hidden)
        tokens = tuple(range(counted.ndim))
        d_kernel = self.scale * _dot(hidden, operand, (tokens, tokens), dtype)
        d_bias = None
        if self.bias is not None:
            d_x = zero_unless(counted[..., None], d_outputs)
            d_bias = pad_to_width(jnp.sum(d_x, axis=tokens, dtype=dtype), width)
        return dataclasses.replace(
            self, hidden=d_hidden, kernel=pad_to_width(d_kernel, width), bias=d_bias
        )


Axes = tuple[int, ...]


def _dot(
    x: jax.Array, y: jax.Array, axes: tuple[Axes, Axes], dtype: jnp.dtype
) -> jax.Array:
    """The product over these axes of each, accumulated and returned in `dtype`."""
    common = _common_dtype(x, y)
    return jnp.tensordot(
        x.astype(common), y.astype(common), axes, preferred_element_type=dtype
    )


def _common_dtype(x: jax.Array, y: jax.Array) -> jnp.dtype:
    """The narrowest dtype that holds both."""
    if x.dtype == y.dtype:
        return x.dtype
    double = jnp.float64 in (x.dtype, y.dtype)
    return jnp.dtype(jnp.float64 if double else jnp.float32)
