"""What goes wrong outside jaxkl. The command line prints it without a traceback."""


class ParityError(Exception):
    """The comparison cannot be made, for a reason that its user can mend."""


def require_torch():
    """PyTorch, or a `ParityError` with the command that installs it."""
    import warnings

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it uses what others deprecate
            import torch
    except ImportError as error:
        raise ParityError(
            "PyTorch, which it compares with, is not installed. Install it "
            'with\n  pip install "torch==2.13.0"'
        ) from error
    return torch


def has_optax() -> bool:
    try:
        import optax  # noqa: F401
    except ImportError:
        return False
    return True
