"""Kullback-Leibler and other divergences for JAX: PyTorch parity and distillation."""

from importlib.metadata import version as _version

from ._kl_div import kl_div as kl_div, KLDivLoss as KLDivLoss


__version__ = _version("jaxkl")
