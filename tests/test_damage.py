"""Damaged files of every kind: each loads correctly, or is refused in one sentence.

    python -m pytest tests/test_damage.py              some of each file
    python -m pytest tests/test_damage.py -m slow      3,000 cases

A case is a file of a finished or a stopped run, one damage drawn for it with a seed, and a command that reads it. The
command ends with 0, or with 2 and one sentence, within two seconds and a gigabyte.
"""

import contextlib
import io
import json
import os
import pickle
import random
import resource
import shutil
import struct
import zipfile
from functools import cache

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import train
from test_kill import MAIN, forks
from test_train import ctrl_c_in_step_5, flags, make_world

# Damages: (bytes, rng) -> bytes --------------------------------------------------------------------------------------

A_FOLDER = object()


def a_folder(data, rng):
    return A_FOLDER


def nothing(data, rng):
    return None


def truncated(data, rng):
    return data[: rng.randrange(len(data))]


def empty(data, rng):
    return b""


def bits_flipped(data, rng):
    data = bytearray(data)
    for _ in range(rng.choice([1, 8, 64])):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def first_bits_flipped(data, rng):
    """Where headers are."""
    return bits_flipped(data[:64], rng) + data[64:]


def zeros(data, rng):
    """A hole, as a crash leaves it in a file system."""
    start = rng.randrange(len(data))
    end = min(len(data), start + 4096)
    return data[:start] + bytes(end - start) + data[end:]


def twice(data, rng):
    return data + data


def mark(data, rng):
    return b"\xef\xbb\xbf" + data


def other_line_ends(data, rng):
    return b"".join(line + rng.choice([b"\n", b"\r\n", b"\r"]) for line in data.split(b"\n"))


def not_utf8(data, rng):
    at = rng.randrange(len(data))
    return data[:at] + b"\xff\xfe\x80" + data[at:]


BYTES = [truncated, empty, bits_flipped, first_bits_flipped, zeros, twice, mark, not_utf8]

# Of JSON: one value of the tree becomes another.
ODD = [
    None, True, -1, 0, 1, 2**31, 2**63, 2**70, 10**400, 0.5, -0.0, 1e-320, 1e308, float("nan"), float("inf"), "", "x",
    "../../x", "/x", "a/b", "\0", "\ud800", "x" * 10**6, [], {}, [[]], [None], {"": None}, ["x"] * 1000,
]  # fmt: skip


def places(tree, found=None):
    """(container, key) of every value in a JSON tree."""
    found = [] if found is None else found
    keys = tree.keys() if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    for key in list(keys)[:50]:
        found.append((tree, key))
        places(tree[key], found)
    return found


def one_value(tree, rng):
    container, key = rng.choice(places(tree))
    container[key] = rng.choice(ODD)


def one_missing(tree, rng):
    container, key = rng.choice(places(tree))
    del container[key]


def one_more(tree, rng):
    dicts = [c for c in [tree, *(c[k] for c, k in places(tree))] if isinstance(c, dict)]
    rng.choice(dicts)[rng.choice(["x", "", "_", "__class__"])] = rng.choice(ODD)


def in_json(change):
    def damage(data, rng):
        tree = json.loads(data)
        change(tree, rng)
        return json.dumps(tree).encode("utf-8", "surrogatepass")

    damage.__name__ = change.__name__
    return damage


def nested(data, rng):
    return rng.choice([b"[", b'{"a":']) * 100_000


def duplicate_key(data, rng):
    key = rng.choice(list(json.loads(data)))
    return b"{" + json.dumps(key).encode() + b": " + rng.choice([b"1", b"null", b'"x"']) + b"," + data.lstrip()[1:]


def other_kind(data, rng):
    return rng.choice([b"[]", b"{}", b"null", b"1", b'"x"', b"NaN", b"[{}]"])


JSON = [*BYTES, *[in_json(change) for change in (one_value, one_value, one_value, one_missing, one_more)], nested,
        duplicate_key, other_kind]  # fmt: skip


# Of safetensors: the header says something else, or numbers are none.
def of_header(change):
    def damage(data, rng):
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        change(header, rng)
        text = json.dumps(header).encode("utf-8", "surrogatepass")
        return struct.pack("<Q", len(text)) + text + data[8 + length :]

    damage.__name__ = change.__name__
    return damage


def tensors_in(header):
    return [name for name in header if name != "__metadata__"]


def other_dtype(header, rng):
    header[rng.choice(tensors_in(header))]["dtype"] = rng.choice(["F64", "F16", "I8", "U8", "BOOL", "F8_E4M3", "X", ""])


def other_shape(header, rng):
    one = header[rng.choice(tensors_in(header))]
    one["shape"] = rng.choice([[], [0], [1], [-1], [2**62, 4], one["shape"][::-1], [*one["shape"], 1], [10**12]])


def other_offsets(header, rng):
    one, two = rng.choice(tensors_in(header)), rng.choice(tensors_in(header))
    header[one]["data_offsets"] = rng.choice([header[two]["data_offsets"], [0, 2**62], [5, 1], [-1, 4], []])


def other_name(header, rng):
    name = rng.choice(tensors_in(header))
    other = rng.choice(["x", "", "../x", name + "x", "layers.0", "layers.999.keys", "layers.-1.keys"])
    header[other] = header.pop(name)


def other_metadata(header, rng):
    said = ["", "{", "[]", "{}", '{"about": 1, "checksum": "x"}', '{"about": {"domains": [1]}}', "[" * 10**5]
    header["__metadata__"] = rng.choice([{}, {"x": "../.."}, *({"koff": one} for one in said)])


def absurd_length(data, rng):
    return struct.pack("<Q", rng.choice([0, 1, 2**20, 2**40, 2**63, 2**64 - 1])) + data[8:]


def no_numbers(data, rng):
    """Infinite and NaN in every dtype that has them."""
    (length,) = struct.unpack("<Q", data[:8])
    start = 8 + length
    at = start + (rng.randrange(max(1, len(data) - start)) & ~7)
    return data[:at] + rng.choice([b"\xff", b"\x7f"]) * min(8, len(data) - at) + data[at + 8 :]


HEADERS = (one_missing, other_dtype, other_shape, other_offsets, other_name, other_metadata)
TENSORS = [*BYTES, *[of_header(change) for change in HEADERS], absurd_length, no_numbers]


# Of the checkpoint, a pickle in a zip file.
def other_state(data, rng):
    """A part of the state that is missing, or something else."""
    state = torch.load(io.BytesIO(data), weights_only=True)
    container, key = rng.choice([place for place in places(state) if isinstance(place[0], dict)])
    if rng.random() < 0.5:
        del container[key]
    else:
        container[key] = rng.choice([None, -1, 10**9, "x", {}, [], torch.ones(2), torch.tensor(float("nan"))])
    written = io.BytesIO()
    torch.save(state, written)
    return written.getvalue()


# Commands ------------------------------------------------------------------------------------------------------------


def child(script, argv, folder):
    torch.set_num_threads(1)
    before = resource.getrusage(resource.RUSAGE_SELF)
    with (
        open(folder / "out", "w") as out,
        open(folder / "err", "w") as err,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        status = MAIN[script]([str(x) for x in argv])
    after = resource.getrusage(resource.RUSAGE_SELF)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime  # of its own: others wait for no core
    megabytes = (after.ru_maxrss - before.ru_maxrss) / 1000
    (folder / "used").write_text(json.dumps([seconds, megabytes]))
    os._exit(status)


def outcome(script, argv, folder):
    """(exit status, seconds, MB, what it said, what stderr got) of a command in a process of its own."""
    process = forks().Process(target=child, args=(script, argv, folder))
    process.start()
    process.join(60)
    process.kill()  # it hangs, if it is still there
    process.join()
    seconds, size = json.loads((folder / "used").read_text()) if process.exitcode in (0, 1, 2) else (60, 0)
    return process.exitcode, seconds, size, (folder / "out").read_text(), (folder / "err").read_text()


# {file: (its damages, the commands that read it)}
TEXT = [*BYTES, other_line_ends, nested, other_kind]
NEW = ("train.py", "new")  # a training from the beginning
ON = ("train.py", "stopped")  # one that goes on
REPORT, GENERATE = ("eval.py", "report"), ("eval.py", "generate")
FILES = {
    "base/config.json": (JSON, [NEW]),
    "base/generation_config.json": (JSON, [NEW]),
    "base/tokenizer.json": (JSON, [NEW]),
    "base/tokenizer_config.json": (JSON, [NEW]),
    "base/model.safetensors": (TENSORS, [NEW]),
    "sharded/model.safetensors.index.json": (JSON, [("train.py", "sharded")]),
    "data/french.txt": (TEXT, [NEW]),
    "data/german.jsonl": (TEXT, [NEW]),
    "runs/.tokens/*french*.npy": (BYTES, [REPORT]),
    "runs/one/settings.json": (JSON, [REPORT, GENERATE]),
    "runs/one/results.json": (JSON, [("eval.py", "compare"), REPORT]),
    "runs/one/router.safetensors": (TENSORS, [GENERATE, REPORT]),
    "runs/one/gates.safetensors": (TENSORS, [REPORT, ("eval.py", "export")]),
    "runs/one/modules/french.safetensors": (TENSORS, [REPORT, GENERATE]),
    "runs/one/backbone/config.json": (JSON, [GENERATE]),
    "runs/one/backbone/model.safetensors": (TENSORS, [GENERATE]),
    "runs/stopped/settings.json": (JSON, [ON]),
    "runs/stopped/log.jsonl": (TEXT, [ON]),
    "runs/stopped/checkpoint.pt": ([*BYTES, other_state], [ON]),
}
# These carry a checksum: what loads is what was saved, and the command says what it says of the whole file.
CHECKED = (
    "runs/.tokens/*french*.npy", "runs/one/router.safetensors", "runs/one/gates.safetensors",
    "runs/one/modules/french.safetensors", "runs/one/backbone/model.safetensors", "runs/stopped/checkpoint.pt",
)  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A model, the same in shards, two texts, a finished run, a stopped one; and a copy of it all."""
    folder = tmp_path_factory.mktemp("damage") / "world"
    folder.mkdir()
    make_world(folder)
    lines = (folder / "data/german.txt").read_text(encoding="utf-8").splitlines()
    (folder / "data/german.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    (folder / "data/german.txt").unlink()
    (folder / "base/generation_config.json").write_text(json.dumps({"eos_token_id": [0, 1], "do_sample": True}))
    in_shards(folder / "base", folder / "sharded")
    assert train.main(flags(folder)) == 0
    with pytest.MonkeyPatch.context() as patch, ctrl_c_in_step_5(patch):
        assert train.main(flags(folder, out=folder / "runs/stopped")) == 130
    shutil.copytree(folder, folder.parent / "copy")
    return folder


def restore(folder):
    """The world as it was before a case."""
    shutil.rmtree(folder)
    shutil.copytree(folder.parent / "copy", folder)


def in_shards(base, folder):
    folder.mkdir()
    tensors = load_file(base / "model.safetensors")
    names = list(tensors)
    index = {}
    for number, part in enumerate((names[:5], names[5:])):
        save_file({name: tensors[name] for name in part}, folder / f"model-{number}.safetensors")
        index |= {name: f"model-{number}.safetensors" for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    for path in base.glob("*.json"):
        shutil.copy(path, folder)


def commands_on(folder):
    """{what a case names: the command line}."""
    one = folder / "runs/one"
    return {
        "new": flags(folder, out=folder / "runs/new", steps=2),
        "sharded": flags(folder, model=folder / "sharded", out=folder / "runs/new", steps=2),
        "stopped": flags(folder, out=folder / "runs/stopped"),
        "report": ["report", one],
        "generate": ["generate", one, "Der Kernel", "--tokens", "2"],
        "compare": ["compare", one],
        "export": ["export", one, "peft"],
    }


def draw(rng):
    """A case: (file, damage, script, command)."""
    name = rng.choice(list(FILES))
    damages, commands = FILES[name]
    return name, rng.choice([*damages, a_folder, nothing]), *rng.choice(commands)


def check(folder, number):
    """One case, by its number; what is wrong about it, or None."""
    rng = random.Random(number)
    name, damage, script, command = draw(rng)
    data = damage(next(folder.glob(name)).read_bytes(), rng)
    for _ in range(3):  # where others are at work, too, a second is longer: the best of three counts
        path = next(folder.glob(name))
        path.unlink()
        if data is A_FOLDER:
            path.mkdir()
        elif data is not None:
            path.write_bytes(data)
        status, seconds, size, out, err = outcome(script, commands_on(folder)[command], folder)
        restore(folder)
        if seconds < 2:
            break
    said = [line for line in err.splitlines() if not line.startswith("[module: ")]  # which `generate` says first
    one_sentence = len(said) == 1 and said[0].startswith(f"{script}: ")
    good = status == 0 or (status == 2 and one_sentence and seconds < 2)
    if good and status == 0 and name in CHECKED and damage in BYTES:
        good = out == undamaged(folder, script, command)
    if good and size < 1000:
        return None
    return f"case {number}, {damage.__name__} {name}, {command}: {status}, {seconds:.1f} s, {size:.0f} MB\n{err}"


@cache
def undamaged(folder, script, command):
    """What a command says on the whole world."""
    *_, out, _ = outcome(script, commands_on(folder)[command], folder)
    restore(folder)
    return out


def count(folder, numbers):
    wrong = [case for number in numbers if (case := check(folder, number))]
    assert not wrong, "\n".join([f"{len(wrong)} of {len(numbers)}", *wrong])


def test_some_damaged_files(whole):
    count(whole, range(60))


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 3000, 500))
def test_3000_damaged_files(whole, first):
    count(whole, range(first, first + 500))


@pytest.mark.parametrize("name", CHECKED)
def test_one_flipped_bit_in_the_middle_is_noticed(whole, name):
    path = next(whole.glob(name))
    before = path.read_bytes()
    middle = len(before) * 3 // 4
    if path.suffix == ".pt":  # an archive, which has gaps between its parts
        with zipfile.ZipFile(path) as file:
            largest = max(file.infolist(), key=lambda part: part.file_size)
            middle = before.index(file.read(largest)) + largest.file_size // 2
    path.write_bytes(before[:middle] + bytes([before[middle] ^ 1]) + before[middle + 1 :])
    script, command = FILES[name][1][0]
    status, *_, err = outcome(script, commands_on(whole)[command], whole)
    if path.suffix == ".npy":
        assert status == 0 and not path.exists()  # a report reads the text itself; a training makes the cache anew
    else:
        assert status == 2 and str(path) in err
    restore(whole)


# Programs in the place of data ---------------------------------------------------------------------------------------


class Hostile:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def as_pickle(hostile):
    return pickle.dumps(hostile)


def as_checkpoint(hostile):
    written = io.BytesIO()
    torch.save({"parts": {"gates": hostile}, "step": 0, "solved": [], "seconds": 0.0, "inputs": {}}, written)
    return written.getvalue()


def as_array(hostile):
    written = io.BytesIO()
    np.save(written, np.array([hostile]), allow_pickle=True)
    return written.getvalue()


@pytest.mark.parametrize("name", ["runs/stopped/checkpoint.pt", "runs/.tokens/*french*.npy", "base/model.safetensors"])
@pytest.mark.parametrize("written", [as_pickle, as_checkpoint, as_array])
def test_nothing_is_run_that_stands_in_a_file(whole, name, written):
    made = whole / "made"
    path = next(whole.glob(name))
    path.write_bytes(written(Hostile(made)))
    pickle.loads(as_pickle(Hostile(made)))
    assert made.exists()  # that is what it would do
    made.unlink()
    status, *_, err = outcome("train.py", commands_on(whole)["stopped"], whole)
    assert not made.exists()
    assert "Traceback" not in err and status == (0 if name.endswith(".npy") else 2)  # a cache is made anew
    restore(whole)
