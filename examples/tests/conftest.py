"""Lets the tests import the examples, and compiles each program once."""

import os
import sys
import tempfile
from pathlib import Path


# An example compiles the same step to train and to look at its memory.
os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp()
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
sys.path.insert(0, str(Path(__file__).parent.parent))
