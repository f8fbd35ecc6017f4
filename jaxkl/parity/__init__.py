"""Compares jaxkl with the installed PyTorch."""

from ._cases import battery as battery, Case as Case
from ._errors import ParityError as ParityError
from ._run import Report as Report, Result as Result, run as run
