"""Every script's contact with the outside world.

One exception for bad input, safe ways to write a file and to read it again, one process at a time in a run folder, and
one way to end a script.
"""

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
    """Exit with status 2 and one sentence if Python is older than 3.10 or torch older than 2.6."""
    major, minor = torch.split(".")[:2]
    if tuple(python[:2]) < (3, 10):
        wrong = f"Python {python[0]}.{python[1]} is too old; install Python 3.10 or newer."
    elif (int(major), int(minor)) < (2, 6):
        wrong = f"torch {torch} is too old; install torch 2.6 or newer."
    else:
        return
    print(wrong, file=sys.stderr)
    sys.exit(2)


# This runs on import: everything below may need features that an old version lacks.
check_versions()


class BadInput(Exception):
    """The user's input is unusable. The message is one sentence: fault, place, remedy. Scripts exit with 2."""


# What using data from a foreign or damaged file can raise.
MALFORMED = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


def discard(path):
    """Remove a file, a folder or a link, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def discard_all(folder, patterns):
    """Remove everything in a folder that matches any of the patterns."""
    for pattern in patterns:
        for path in folder.glob(pattern):
            discard(path)


# If the disk is full, torch.save raises a RuntimeError with one of these, early or late in the file.
TORCH_CANNOT_WRITE = ("inline_container", "iostream error")


@contextlib.contextmanager
def atomic(path):
    """Yield a temporary path for a file or a folder. On success it is renamed to `path`, otherwise removed.

    A reader of `path` therefore never finds a half-written file, even if the process is killed or the power fails. Each
    process has its own temporary path. If several write `path`, the last one wins, whole.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A folder of its own: safetensors writes a temporary file beside its target, and a killed process leaves it there.
    workplace = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        workplace.mkdir()
        yield (partial := workplace / path.name)
        readers = workplace.stat().st_mode & 0o666  # from the umask; safetensors would let only the owner read
        for written in (partial, *partial.rglob("*")):
            if written.is_file():
                if written.stat().st_mode & 0o666 != readers:
                    with contextlib.suppress(PermissionError):  # some file systems have no such rights
                        written.chmod(readers)
                with open(written, "rb+") as file:
                    os.fsync(file.fileno())  # otherwise a disk may store the new name before the bytes
        os.replace(partial, path)
    except (SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(part in str(error) for part in TORCH_CANNOT_WRITE):
            raise
        raise OSError(f"{path} cannot be written ({error}); is the disk full?") from None
    finally:
        discard(workplace)


@contextlib.contextmanager
def only_process(folder):
    """Lock a run folder. BadInput if another process has locked it. The lock ends with the process, however it ends."""
    try:
        import fcntl
    except ImportError:  # Windows: no lock
        yield
        return
    with open(folder / ".lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            process = file.read() or "which has just begun"
            raise BadInput(f"{folder} is in use by another process ({process}); wait until it has ended.") from None
        except OSError as error:  # some network file systems and containers
            print(f"{folder} cannot be locked ({error.strerror}): run one command at a time on it.", file=sys.stderr)
        file.truncate(0)
        print(f"number {os.getpid()}", end="", file=file, flush=True)
        yield


def checksum(tensors, about):
    """CRC-32, as text, of tensors {name: tensor} and of the metadata `about` them."""
    kinds = {name: [str(tensor.dtype), *tensor.shape] for name, tensor in tensors.items()}
    crc = zlib.crc32(json.dumps([kinds, about], sort_keys=True).encode())
    for name in sorted(tensors):
        crc = zlib.crc32(tensors[name].cpu().reshape(-1).view(torch.uint8).numpy(), crc)
    return f"{crc:08x}"


def write_tensors(path, tensors, **about):
    """Save a part of a run, tensors {name: tensor} and metadata `about` them, as safetensors with our own checksum."""
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    # One metadata entry: safetensors would write several in a different order each time.
    note = json.dumps({"about": about, "checksum": checksum(tensors, about)})
    with atomic(path) as partial:
        save_file(tensors, partial, {"koff": note})


def read_tensors(path, device="cpu"):
    """({name: tensor}, metadata) of a file that `write_tensors` wrote. BadInput if it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
            metadata = file.metadata() or {}
        if "koff" not in metadata:
            raise ValueError("this version has not written it")
        note = json.loads(metadata["koff"])
        about = note["about"]
        if checksum(tensors, about) != note["checksum"]:
            raise ValueError("it has another checksum")
    except (OSError, SafetensorError, *MALFORMED) as error:
        raise BadInput(f"{path} cannot be read ({error}); name a run that train.py has finished.") from None
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise BadInput(f"{path}: {name} has numbers that are NaN or infinite; train again with lower rates.")
    return {name: tensor.to(device) for name, tensor in tensors.items()}, about


class Output:
    """Standard output or error. If its reader goes away (`| head`, a closed terminal), the work goes on without output.

    Any other error, such as a full disk, is raised.
    """

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
            with open(os.devnull, "w") as nowhere:  # Python's buffer goes there, too
                os.dup2(nowhere.fileno(), self.stream.fileno())
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise


def run_script(name, work, stopped):
    """Exit status of the script `name`, whose work is work(). `stopped` tells the user how to go on after a signal.

    Expected errors end with 2 and one sentence: bad input, an unreadable file, a full disk, no memory. Signals end with
    130 (Ctrl-C), 143 (SIGTERM: Slurm, docker stop) or 129 (SIGHUP: a closed terminal). Any other error is a bug of ours
    and ends with 1 and a traceback to report.
    """
    for stream, mode in ("stdin", "r"), ("stdout", "w"), ("stderr", "w"):
        if getattr(sys, stream) is None:  # somebody closed it
            setattr(sys, stream, open(os.devnull, mode))  # noqa: SIM115
        with contextlib.suppress(AttributeError):  # tests have other streams
            getattr(sys, stream).reconfigure(errors="replace")  # "?" for a character that it cannot show or read
    came = []  # signals

    def stop(number, frame):  # the work tidies up, as after Ctrl-C
        came.append(number)
        raise KeyboardInterrupt(number)

    with contextlib.redirect_stdout(Output(sys.stdout)), contextlib.redirect_stderr(Output(sys.stderr)):
        try:
            with on_signals(stop):
                work()
                sys.stdout.flush()  # a full disk must show here, where errors are handled
                return 0
        except (Exception, KeyboardInterrupt) as error:
            # A library in the middle of a callback may have turned the KeyboardInterrupt into another error.
            if came or isinstance(error, KeyboardInterrupt):
                print(f"\n{name}: stopped; {stopped}", file=sys.stderr)
                return 128 + (came or error.args or [signal.SIGINT])[0]
            return status_of(name, error)


@contextlib.contextmanager
def on_signals(handler):
    """A context in which Ctrl-C, SIGTERM and SIGHUP call the handler."""
    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, usual in before.items():
            signal.signal(number, usual)


def status_of(name, error):
    """Print an error of the script `name`, and return its exit status."""
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
    """Whether the error means that memory has run out, on a GPU or on the CPU."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)
