"""What stands for the teacher where there is none: a source without logits."""

import dataclasses
from typing import ClassVar

import jax

from ._sources import Kind, Source


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NoTeacher(Source):
    """The terms of a loss are then those of the student alone."""

    kind: ClassVar[Kind] = "none"
    is_normalized: ClassVar[bool] = True  # it has no temperature

    def checked(self, name):
        del name
        return self

    @property
    def batch_shape(self):
        raise NotImplementedError("There are no tokens without a teacher.")

    @property
    def vocab_array(self):
        return None

    def pad_columns(self, width):
        del width
        return self

    def partition_specs(self, token_axes, vocab_axis):
        del token_axes, vocab_axis
        return self

    def logits(self, dtype, vocab):
        del dtype, vocab
        return None

    def vjp(self, d_outputs, counted):
        del d_outputs, counted
        return self
