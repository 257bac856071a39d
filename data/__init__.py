"""What every script needs to meet the outside world: one exception for bad input, one safe way to write a file."""

import contextlib
import os
import shutil
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open


def check_versions(python=sys.version_info, torch=torch.__version__):
    """Python 3.10 and torch 2.6 are needed: else exit with 2 and one sentence."""
    old = [f"Python {python[0]}.{python[1]} is too old; install Python 3.10"] if tuple(python[:2]) < (3, 10) else []
    if tuple(int(x) for x in torch.split(".")[:2]) < (2, 6):
        old += [f"torch {torch} is too old; install torch 2.6"]
    if old:
        print(f"{old[0]} or newer.", file=sys.stderr)
        sys.exit(2)


check_versions()  # on import, because everything after this may need what an old version lacks


class BadInput(Exception):
    """The user's input cannot be used. The message is one sentence: what, where, what to do. Scripts exit with 2."""


def discard(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic(path):
    """Yield a temporary path beside `path`, of a file or a folder; rename it to `path` on success, else remove it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.part")
    discard(partial)  # of a process that was killed
    try:
        yield partial
        os.replace(partial, path)
    finally:
        discard(partial)


def read_tensors(path, framework="pt", device="cpu"):
    """({name: tensor}, metadata) of a safetensors file that a run saved; BadInput if it cannot be read."""
    try:
        with safe_open(path, framework, device=str(device)) as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise BadInput(f"{path} cannot be read ({error}); name a run that train.py has finished.") from None


def run_script(name, work, stopped):
    """Exit status of work(): bad input, an unreadable file, a full disk or Ctrl-C end in one sentence, no traceback."""
    try:
        return work()
    except (BadInput, OSError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{name}: stopped; {stopped}", file=sys.stderr)
        return 130
