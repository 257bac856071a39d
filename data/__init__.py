"""What every script needs to meet the outside world: one exception for bad input, one safe way to write a file, one
process at a time in a run folder, one way to end."""

import contextlib
import os
import secrets
import shutil
import signal
import sys
import traceback
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
    """Remove a file, a folder or a link, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def discard_all(folder, patterns):
    """Remove what a folder has under any of the patterns."""
    for pattern in patterns:
        for path in folder.glob(pattern):
            discard(path)


@contextlib.contextmanager
def atomic(path):
    """Yield a temporary path beside `path`, for a file or a folder; rename it to `path` on success, else remove it.

    A reader of `path` therefore never finds something half-written, whenever the process is killed. No other process
    has the same temporary path: where several write `path`, the last one's is there in the end, and whole.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        yield partial
        os.replace(partial, path)
    except (SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):
            raise
        # A full disk, as safetensors and as torch.save tell it.
        raise OSError(f"{path} cannot be written ({error}); is the disk full?") from None
    finally:
        discard(partial)


@contextlib.contextmanager
def only_process(folder):
    """Hold a run folder. BadInput if another process holds it. However a process ends, it lets go."""
    try:
        import fcntl
    except ImportError:  # Windows, where nothing is held
        yield
        return
    with open(folder / ".lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            process = file.read() or "which has just begun"
            raise BadInput(f"{folder} is in use by another process ({process}); wait until it has ended.") from None
        file.truncate(0)
        print(f"number {os.getpid()}", end="", file=file, flush=True)
        yield


def read_tensors(path, framework="pt", device="cpu"):
    """({name: tensor}, metadata) of a safetensors file that a run saved; BadInput if it cannot be read.

    framework: "pt" for tensors of torch, "np" for arrays of numpy.
    """
    try:
        with safe_open(path, framework, device=str(device)) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise BadInput(f"{path} cannot be read ({error}); name a run that train.py has finished.") from None
    for name, tensor in tensors.items():
        if framework == "pt" and not tensor.isfinite().all():
            raise BadInput(f"{path}: {name} has numbers that are NaN or infinite; train again with lower rates.")
    return tensors, metadata


def run_script(name, work, stopped):
    """Exit status of work().

    2 and one sentence for what can be foreseen: bad input, an unreadable file, a full disk, no memory. 130 after
    Ctrl-C, 143 after SIGTERM (Slurm, docker stop). Anything else is a fault of ours: 1, and a traceback to report.
    """
    for stream, mode in ("stdin", "r"), ("stdout", "w"), ("stderr", "w"):
        if getattr(sys, stream) is None:  # somebody closed it
            setattr(sys, stream, open(os.devnull, mode))  # noqa: SIM115
        with contextlib.suppress(AttributeError):  # a stream of a test
            getattr(sys, stream).reconfigure(errors="replace")  # what cannot be shown, or read, becomes a "?"
    before = signal.signal(signal.SIGTERM, stop)
    try:
        return work()
    except (BadInput, OSError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print(f"\n{name}: stopped; {stopped}", file=sys.stderr)
        return 128 + (error.args[0] if error.args else signal.SIGINT)
    except Exception as error:
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error):
            less = "a smaller --batch or --seq-len, or --checkpointing; --dry-run says what a training needs"
            print(f"{name}: there is not enough memory; try {less}.", file=sys.stderr)
            return 2
        traceback.print_exc()
        print(f"{name}: this is a fault of the program; please report the lines above to its authors.", file=sys.stderr)
        return 1
    finally:
        signal.signal(signal.SIGTERM, before)


def stop(number, frame):
    """Handler of a signal that ends a process: what is at work tidies up, as after Ctrl-C."""
    raise KeyboardInterrupt(number)
