"""Compares jaxkl with the installed PyTorch: the library under `jaxkl parity`."""

from ._cases import battery as battery, Case as Case
from ._compare import compare as compare, Comparison as Comparison
from ._errors import ParityError as ParityError
from ._files import read as read, Recording as Recording
from ._run import Report as Report, Result as Result, run as run
