"""How the stubs of TensorFlow Serving are imported without importing TensorFlow.

The generated `*_pb2` modules lie inside the `tensorflow` package, whose `__init__` takes seconds and half a
gigabyte. A bare package module in its place lets them import in a tenth of a second; it is taken away again at once, so
that a later `import tensorflow` gets the real thing, which then shares the message classes already loaded.
"""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

PACKAGE = "tensorflow"


@contextmanager
def without_tensorflow() -> Iterator[None]:
    """Import stubs inside this context: TensorFlow itself stays out, unless the process has already imported it."""
    spec = None if PACKAGE in sys.modules else importlib.util.find_spec(PACKAGE)
    if spec is None:  # already imported, or not installed: the imports then work, or fail, in their usual way
        yield
        return
    bare = ModuleType(PACKAGE)
    bare.__path__ = list(spec.submodule_search_locations or [])
    sys.modules[PACKAGE] = bare
    try:
        yield
    finally:
        del sys.modules[PACKAGE]
