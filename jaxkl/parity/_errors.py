"""What the user must mend. The command line prints it without a traceback."""

import warnings
from types import ModuleType


class ParityError(Exception):
    """The comparison cannot be made, for a reason that its user can mend."""


def must(condition: bool, message: str) -> None:
    """Raises a `ParityError` with this message unless the condition holds."""
    if not condition:
        raise ParityError(message)


def require_torch() -> ModuleType:
    """Imports PyTorch; without it, the `ParityError` says how to install it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch uses what others deprecate
            import torch
    except ImportError as error:
        raise ParityError(
            "PyTorch, which it compares with, is not installed. Install it "
            'with\n  pip install "torch==2.13.0"'
        ) from error
    return torch
