"""What every script needs to meet the outside world: one exception for bad input, one safe way to write a file."""

import contextlib
import os
from pathlib import Path


class BadInput(Exception):
    """The user's input cannot be used. The message is one sentence: what, where, what to do. Scripts exit with 2."""


@contextlib.contextmanager
def atomic(path):
    """Yield a temporary path beside `path`; rename it to `path` on success, remove it on any failure."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.part")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
