"""Killed at random moments, and started again: the end is that of an undisturbed run, bit for bit.

    python -m pytest tests/test_kill.py              a tiny model, some forty signals
    python -m pytest tests/test_kill.py -m slow      the shipped model in the quick preset, 200 kills

A life is a row of commands: a training, one more module, two exports, a report. Each is stopped after a part of the
time that it takes, drawn anew, and started again until it ends by itself. After every stop all files are whole.
"""

import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import time
import zlib
from functools import cache
from multiprocessing import forkserver

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import eval as evaluation
import train
from data import read_tensors
from test_train import ROOT, flags, world  # noqa: F401 (a fixture)

MAIN = {"train.py": train.main, "eval.py": evaluation.main}


@cache
def forks():
    """A server that has imported what the tests need: every command is a fork of it, so that a start takes no time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_train", "torch._dynamo"])  # torch imports the latter for an `nn.Embedding`
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TQDM_DISABLE", "1")
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))  # it looks there only
        forkserver.ensure_running()
    first = context.Process(target=int)
    first.start()
    first.join()  # now it has imported everything
    return context


def terminated(number, frame):
    raise KeyboardInterrupt(number)


def child(script, argv, said, begun):
    """What the process of a command does; what it says goes into a file."""
    try:
        for number in (signal.SIGTERM, signal.SIGHUP):  # as the script itself does a little later
            signal.signal(number, terminated)
        begun.touch()
        with open(said, "w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            status = MAIN[script](argv)
        os._exit(status)
    except KeyboardInterrupt as error:  # before the script had begun, or when it had ended
        os._exit(128 + (error.args[0] if error.args else signal.SIGINT))


def start(script, argv, folder, number=signal.SIGKILL, after=None):
    """Run one command; `after` so many seconds it gets a signal. (its exit status, the seconds it took, what it said);
    the status is None where the signal came before anything had begun."""
    said, begun = folder / "said.txt", folder / "begun"
    begun.unlink(missing_ok=True)
    process = forks().Process(target=child, args=(script, [str(x) for x in argv], said, begun))
    since = time.perf_counter()
    process.start()
    process.join(after)
    if process.is_alive():
        os.kill(process.pid, number)
    process.join()
    status = process.exitcode if begun.exists() else None
    return status, time.perf_counter() - since, said.read_text() if said.exists() else ""


def check_whole(folder):
    """Every file that has its final name can be read to its end."""
    for path in folder.rglob("*"):
        if path.is_dir() or path.name.startswith(".") or ".part" in str(path):
            continue  # what a folder of `atomic` holds has no final name
        if path.suffix == ".safetensors":
            assert load_file(path)
            if path.parent.name == "modules" or path.stem in ("gates", "router"):
                read_tensors(path)  # with their checksum
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".pt":
            torch.load(path, weights_only=True)
        elif path.suffix == ".npy":
            saved = np.load(path)
            assert zlib.crc32(saved[1:]) == saved[:1].view(np.uint32)[0]
        elif path.suffix == ".md":
            assert path.read_text().endswith("|\n")


def ends(folder):
    """{file: its bytes} of all that a life leaves, but for the seconds that it took."""
    found = {}
    for path in folder.rglob("*"):
        if path.name == ".lock" or ".part" in str(path):
            continue  # the number of a process; and what a killed export, or a killed cache of tokens, leaves
        if path.is_file():
            found[str(path.relative_to(folder))] = path.read_bytes()
    for name in found:
        if name.endswith("results.json"):
            found[name] = {**json.loads(found[name]), "seconds": 0}
    return found


def live(commands, folder, rng=None, times=None, signals=()):
    """Run the commands one after the other in an empty folder `life`, each until it ends by itself.

    rng, times, signals: stop each start after a part of the seconds that the command takes undisturbed. Returns (the
    seconds of each command, how often one was stopped).
    """
    life = folder / "life"
    shutil.rmtree(life, ignore_errors=True)
    life.mkdir()
    seconds, stops = [], 0
    for number, (script, argv) in enumerate(commands):
        while True:
            after = rng.uniform(0, 1.1 * times[number]) if rng else None
            sent = rng.choice(signals) if rng else None
            status, took, said = start(script, argv, folder, sent, after)
            assert "Traceback" not in said, said
            if status in (0, 2):
                break
            assert status in (None, -signal.SIGKILL if sent == signal.SIGKILL else 128 + sent), said
            stops += status is not None
            check_whole(life)
        # 2: it was stopped between its last file and its end, so that all is there already
        assert status == 0 or (stops and "already" in said), f"{script} {argv}: {said}"
        seconds.append(took)
    return seconds, stops


def stopped_often(commands, folder, signals, least):
    """Lives of the same commands, until they were stopped so many times; each ends as the undisturbed one."""
    times, _ = live(commands, folder)
    expected = ends(folder / "life")
    rng, stops = random.Random(0), 0
    while stops < least:
        _, more = live(commands, folder, rng, times, signals)
        stops += more
        found = ends(folder / "life")
        assert found.keys() == expected.keys()
        assert not [name for name in expected if found[name] != expected[name]]
    print(f"{stops} stops")


# The lives -----------------------------------------------------------------------------------------------------------


def after_training(run, text):
    """What one does with a finished run."""
    return [
        ("train.py", ["--add", text, "--out", run]),
        ("eval.py", ["export", run, "hf"]),
        ("eval.py", ["export", run, "peft"]),
        ("eval.py", ["report", run]),
    ]


def some_text(folder):
    """A text that no run begins with."""
    path = folder / "castilian.txt"
    lines = (ROOT / "data/handbook/spanish.txt").read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join(lines[:150]) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def tiny_life(world):  # noqa: F811
    """The commands of a life with a tiny random model."""
    run = world / "life/runs/one"
    return [("train.py", flags(world, out=run, sparsity=0.03)), *after_training(run, some_text(world))]


def test_the_same_life_again_leaves_the_same_bytes(tiny_life, tmp_path):
    live(tiny_life, tmp_path)
    expected = ends(tmp_path / "life")
    live(tiny_life, tmp_path)
    assert ends(tmp_path / "life") == expected


@pytest.mark.parametrize("signals", [[signal.SIGKILL], [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]])
def test_a_tiny_run_survives(tiny_life, tmp_path, signals):
    stopped_often(tiny_life, tmp_path, signals, least=12 * len(signals))


@pytest.mark.slow
def test_the_quick_run_survives_200_kills(tmp_path):
    run = tmp_path / "life/runs/quick"
    training = ["--preset", "quick", "--save-every", "5", "--out", run]
    commands = [("train.py", training), *after_training(run, some_text(tmp_path))]
    stopped_often(commands, tmp_path, [signal.SIGKILL], least=200)
