"""What every script needs to meet the outside world: one exception for bad input, one safe way to write a file and to
read it again, one process at a time in a run folder, one way to end."""

import contextlib
import errno
import json
import os
import secrets
import shutil
import signal
import sys
import traceback
import zlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


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


# What is in torch.save's RuntimeError where a disk is full: early or late in the file.
TORCH_CANNOT_WRITE = ("inline_container", "iostream error")


@contextlib.contextmanager
def atomic(path):
    """Yield a temporary path near `path`, for a file or a folder; rename it to `path` on success, else remove it.

    A reader of `path` therefore never finds something half-written, whenever the process is killed or the power fails.
    No other process has the same temporary path: where several write `path`, the last one's is there in the end, whole.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A folder, because safetensors writes under a name of its own first, which is left there if the process is killed.
    workplace = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        workplace.mkdir()
        yield (partial := workplace / path.name)
        readers = workplace.stat().st_mode & 0o666  # what the umask says, though safetensors lets only the owner read
        for written in (partial, *partial.rglob("*")):
            if written.is_file():
                if written.stat().st_mode & 0o666 != readers:
                    written.chmod(readers)
                with open(written, "rb+") as file:
                    os.fsync(file.fileno())  # else a disk may have the new name before it has the bytes
        os.replace(partial, path)
    except (SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(part in str(error) for part in TORCH_CANNOT_WRITE):
            raise
        # A full disk, as safetensors and as torch.save tell it.
        raise OSError(f"{path} cannot be written ({error}); is the disk full?") from None
    finally:
        discard(workplace)


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


def checksum(tensors, about):
    """CRC-32, as text, of tensors {name: tensor} and of what is said about them."""
    kinds = {name: [str(tensor.dtype), *tensor.shape] for name, tensor in tensors.items()}
    found = zlib.crc32(json.dumps([kinds, about], sort_keys=True).encode())
    for name in sorted(tensors):
        found = zlib.crc32(tensors[name].cpu().reshape(-1).view(torch.uint8).numpy(), found)
    return f"{found:08x}"


def write_tensors(path, tensors, **about):
    """Save a part of a run, {name: tensor} and what is said about it, as safetensors, with a checksum of our own."""
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    # In one piece: safetensors would write several in another order each time.
    note = json.dumps({"about": about, "checksum": checksum(tensors, about)})
    with atomic(path) as partial:
        save_file(tensors, partial, {"koff": note})


def read_tensors(path, device="cpu", ours=True):
    """({name: tensor}, what is said about them) of a file of `write_tensors`; BadInput if it is damaged.

    Not `ours`: any safetensors file, about which nothing is said.
    """
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
            metadata = file.metadata() or {}
        about = {}
        if ours:
            if "koff" not in metadata:
                raise ValueError("this version has not written it")
            note = json.loads(metadata["koff"])
            about = note["about"]
            if checksum(tensors, about) != note["checksum"]:
                raise ValueError("it has another checksum")
    except (OSError, SafetensorError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise BadInput(f"{path} cannot be read ({error}); name a run that train.py has finished.") from None
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise BadInput(f"{path}: {name} has numbers that are NaN or infinite; train again with lower rates.")
    return {name: tensor.to(device) for name, tensor in tensors.items()}, about


class Output:
    """Standard output or error, whose reader may go away (`| head`, or a terminal that is closed): what is written then
    goes nowhere, and the work goes on. Any other error, a full disk say, is one."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        with self.without_reader():
            return self.stream.write(text)

    def flush(self):
        with self.without_reader():
            self.stream.flush()

    @contextlib.contextmanager
    def without_reader(self):
        try:
            yield
        except OSError as error:
            with open(os.devnull, "w") as nowhere:  # what Python has in its buffer goes there, too
                os.dup2(nowhere.fileno(), self.stream.fileno())
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise


def run_script(name, work, stopped):
    """Exit status of work().

    2 and one sentence for what can be foreseen: bad input, an unreadable file, a full disk, no memory. 130 after
    Ctrl-C, 143 after SIGTERM (Slurm, docker stop), 129 after SIGHUP (a terminal that is closed). Anything else is a
    fault of ours: 1, and a traceback to report.
    """
    for stream, mode in ("stdin", "r"), ("stdout", "w"), ("stderr", "w"):
        if getattr(sys, stream) is None:  # somebody closed it
            setattr(sys, stream, open(os.devnull, mode))  # noqa: SIM115
        with contextlib.suppress(AttributeError):  # a stream of a test
            getattr(sys, stream).reconfigure(errors="replace")  # what cannot be shown, or read, becomes a "?"
    with contextlib.redirect_stdout(Output(sys.stdout)), contextlib.redirect_stderr(Output(sys.stderr)):
        return watched(name, work, stopped)


def watched(name, work, stopped):
    """Exit status of work(), see `run_script`, with what is said about its end."""
    came = []  # signals

    def stop(number, frame):
        """What is at work tidies up, as after Ctrl-C."""
        came.append(number)
        raise KeyboardInterrupt(number)

    try:
        with on_signals(stop):
            status = work()
            sys.stdout.flush()  # a full disk is an error while somebody looks
            return status
    except (Exception, KeyboardInterrupt) as error:
        # A library that was just calling Python may have made some other error of a signal.
        if came or isinstance(error, KeyboardInterrupt):
            print(f"\n{name}: stopped; {stopped}", file=sys.stderr)
            return 128 + (came or error.args or [signal.SIGINT])[0]
        return status_of(name, error)


@contextlib.contextmanager
def on_signals(handler):
    """Under it, Ctrl-C, SIGTERM and SIGHUP call the handler."""
    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # ignored: nohup
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, usual in before.items():
            signal.signal(number, usual)


def status_of(name, error):
    """The exit status of the script `name` for an error, which it prints."""
    if isinstance(error, BadInput | OSError):
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    if out_of_memory(error):
        less = "a smaller --batch or --seq-len, or --checkpointing; --dry-run says what a training needs"
        print(f"{name}: there is not enough memory; try {less}.", file=sys.stderr)
        return 2
    traceback.print_exception(error)
    print(f"{name}: this is a fault of the program; please report the lines above to its authors.", file=sys.stderr)
    return 1


def out_of_memory(error):
    """Is this what Python or torch say where memory runs out, on a GPU or on the CPU?"""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)
