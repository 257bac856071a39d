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
    major, minor = torch.split(".")[:2]
    if tuple(python[:2]) < (3, 10):
        wrong = f"Python {python[0]}.{python[1]} is too old; install Python 3.10 or newer."
    elif (int(major), int(minor)) < (2, 6):
        wrong = f"torch {torch} is too old; install torch 2.6 or newer."
    else:
        return
    print(wrong, file=sys.stderr)
    sys.exit(2)


# On import, because everything after this line may need what an old version lacks.
check_versions()


class BadInput(Exception):
    """The user's input cannot be used. The message is one sentence: what, where, what to do. Scripts exit with 2."""


def discard(path):
    """Remove a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic(path):
    """Yield a temporary path beside `path`, for a file or a folder; rename it to `path` on success, else remove it.

    A reader of `path` therefore never finds something half-written, whenever the process is killed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.part")
    discard(partial)  # left by a process that was killed
    try:
        yield partial
        os.replace(partial, path)
    finally:
        discard(partial)


def read_tensors(path, framework="pt", device="cpu"):
    """({name: tensor}, metadata) of a safetensors file that a run saved; BadInput if it cannot be read.

    framework: "pt" for tensors of torch, "np" for arrays of numpy.
    """
    try:
        with safe_open(path, framework, device=str(device)) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
            return tensors, file.metadata() or {}
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
