"""What a program cannot prevent: full disks, folders that nobody may write, odd surroundings, too little memory.

python -m pytest tests/test_bad_luck.py            a disk that is full at eight moments; two commands in odd surroundings
python -m pytest tests/test_bad_luck.py -m slow    at sixty; every command; a hundred domains; large texts
"""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time

import pytest
import torch

import eval as evaluation
import train
from data import command
from test_kill import MAIN, after_training, check_whole, ends, some_text, start
from test_train import ROOT, flags, make_world, world  # noqa: F401 (a fixture)

# Disks ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path):
    """(an empty file system of its own, what gives it other options: its size, "ro")."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(options):
        return subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", place], capture_output=True).returncode

    if os.name != "posix" or mount("size=100m"):
        pytest.skip("mounting a tmpfs is not permitted here")
    yield place, lambda options: mount(f"remount,{options}")
    subprocess.run(["umount", "--lazy", place], check=True)  # a file of it may still be mapped


def fill(world, disk, moments):  # noqa: F811
    """A run on a disk that is full at so many moments of it, from its first file to its last."""
    place, remount = disk
    out = place / "runs/one"
    argv = flags(world, out=out)
    assert start("train.py", argv, world)[0] == 0
    expected = ends(place)
    pages = shutil.disk_usage(place).used // 4096
    for moment in range(moments):
        shutil.rmtree(place / "runs")
        remount(f"size={4 * (1 + moment * pages // moments)}k")
        status, _, said = start("train.py", argv, world)
        assert status == 2 and ("No space left" in said or "disk full" in said), said
        assert said.splitlines()[-1].startswith("train.py: ") and "Traceback" not in said, said
        check_whole(place)
        remount("size=100m")
        assert start("train.py", argv, world)[0] == 0
        found = ends(place)
        assert not [name for name in expected | found if found.get(name) != expected.get(name)]


def test_a_full_disk_is_named_and_loses_nothing(world, disk):  # noqa: F811
    fill(world, disk, 8)


@pytest.mark.slow
def test_a_disk_that_is_full_at_sixty_moments(world, disk):  # noqa: F811
    fill(world, disk, 60)


def test_a_disk_that_cannot_be_written(world, disk, capsys):  # noqa: F811
    place, remount = disk
    out = place / "runs/one"
    assert train.main(flags(world, out=out)) == 0
    remount("ro")
    before = ends(place)
    generate = ["generate", str(out), "Der Kernel", "--tokens", "2"]
    assert evaluation.main(generate) == 0  # it writes nothing
    text = some_text(world)
    for script, argv in (
        ("train.py", flags(world, out=place / "runs/two")),
        ("train.py", [*flags(world, out=out), "--fresh"]),
        *after_training(out, text),
        ("eval.py", ["remove", out, "french"]),
    ):
        capsys.readouterr()
        assert MAIN[script]([str(x) for x in argv]) == 2, argv
        assert "Read-only file system" in capsys.readouterr().err
    remount("rw")
    assert ends(place) == before


def test_model_and_text_can_be_where_nobody_writes(tmp_path, disk):
    place, remount = disk
    make_world(place)
    text = some_text(place)
    remount("ro")
    assert train.main(flags(place, out=tmp_path / "runs/one")) == 0
    assert train.main(["--add", str(text), "--out", str(tmp_path / "runs/one")]) == 0


# Surroundings --------------------------------------------------------------------------------------------------------


def real(commands, cwd, **environment):
    """Yield (exit status, what it said) of commands, each in an interpreter of its own, with this environment only."""
    for script, argv in commands:
        argv = [sys.executable, ROOT / script, *argv]
        both = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        done = subprocess.run(argv, env={"PATH": os.environ["PATH"], **environment}, cwd=cwd, **both)
        yield done.returncode, done.stdout.decode(errors="replace")


@pytest.fixture
def odd_life(tmp_path):
    """(a folder of an odd name, the commands of a life in it)."""
    place = tmp_path / "-a b\nFüße 数据 $(x) 'y' \"z\" %s {0} [1]*"
    place.mkdir()
    make_world(place)
    out = place / "runs/one"
    return place, [("train.py", flags(place, out=out)), *after_training(out, some_text(place))]


def check_surroundings(place, commands):
    for status, said in real(commands, place, LC_ALL="C", OMP_NUM_THREADS="1"):  # and no HOME
        assert status == 0, said
    check_whole(place)


def test_a_place_of_any_name(odd_life):
    place, commands = odd_life
    for script, argv in commands:
        assert MAIN[script]([str(x) for x in argv]) == 0
    check_whole(place)


def test_there_a_bare_environment_and_one_core(odd_life):
    place, (training, *_, report) = odd_life
    check_surroundings(place, [training, report])


@pytest.mark.slow
def test_there_a_bare_environment_and_one_core_for_every_command(odd_life):
    check_surroundings(*odd_life)


def test_a_clock_that_goes_back(world, monkeypatch):  # noqa: F811
    now = time.time()
    turned = iter(range(10**9))
    monkeypatch.setattr(time, "time", lambda: now - 3600 * next(turned))
    assert train.main(flags(world)) == 0
    assert 0 < json.loads((world / "runs/one/results.json").read_text())["seconds"] < 3600


def test_text_that_changes_while_a_run_is_at_work(world, monkeypatch, capsys):  # noqa: F811
    saving, path = command.save_run, world / "data/french.txt"
    text = path.read_text(encoding="utf-8")

    def meanwhile(*what):
        saving(*what)
        path.write_text(text + "et encore\n", encoding="utf-8")

    monkeypatch.setattr(command, "save_run", meanwhile)
    assert train.main(flags(world)) == 2
    assert "began with another text of french; bring that back" in capsys.readouterr().err
    monkeypatch.setattr(command, "save_run", saving)
    assert train.main(flags(world)) == 2  # still
    path.write_text(text, encoding="utf-8")
    assert train.main(flags(world)) == 0


# Memory --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_too_little_memory_names_what_would_need_less(world, monkeypatch, capsys, error):  # noqa: F811
    def too_large(*_):
        raise error

    monkeypatch.setattr(train, "batch", too_large)  # in the first step
    assert train.main(flags(world, batch=4, seq_len=64, solve_tokens=256)) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    less = "and less with --batch 2, --seq-len 32, --checkpointing."
    assert re.search(rf"there is not enough memory: this takes about [\d.]+ GB, {less}", said), said


# Load ----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_hundred_domains(world):  # noqa: F811
    for number in range(100):
        shutil.copy(world / f"data/{('german', 'french')[number % 2]}.txt", world / f"data/d{number:02}.txt")
    for name in ("german", "french"):
        (world / f"data/{name}.txt").unlink()
    commands = [("train.py", flags(world, steps=100)), ("eval.py", ["report", world / "runs/one"])]
    assert [status for status, _ in real(commands, world)] == [0, 0]
    assert len(json.loads((world / "runs/one/results.json").read_text())["swap"]) == 100


@pytest.mark.slow
def test_large_texts(world):  # noqa: F811
    """In one domain a stream, with a line of ten megabytes that has no blank; in the other 200,000 documents."""
    book = (ROOT / "data/handbook/german.txt").read_text(encoding="utf-8")
    with open(world / "data/german.txt", "w", encoding="utf-8") as file:
        for _ in range(100_000_000 // len(book.encode())):
            file.write(book)
        file.write("x" * 10**7 + "\n" + book)
    lines = [json.dumps({"text": line}) for line in book.splitlines()]
    with open(world / "data/french.jsonl", "w") as file:
        for number in range(200_000):
            file.write(lines[number % len(lines)] + "\n")
    (world / "data/french.txt").unlink()
    for turn in ("first", "again"):
        argv = flags(world, out=world / "runs" / turn)
        before = time.perf_counter()
        (status, said), *_ = real([("train.py", argv)], world)
        assert status == 0, said
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
        size = sum(path.stat().st_size for path in (world / "data").iterdir()) / 1e6
        print(f"{turn}: {size:,.0f} MB of text, {time.perf_counter() - before:.0f} s, at most {peak:.1f} GB")


# Secrets -------------------------------------------------------------------------------------------------------------


def test_no_token_is_written_or_said(world):  # noqa: F811
    """The Hub's token, from the environment or its file, is nowhere in what a life writes or says."""
    secret = "hf_aSecretThatNobodyMayRead"
    home = world / "home"
    (home / "hub").mkdir(parents=True)
    (home / "token").write_text(secret)
    nobody = "http://127.0.0.1:9"  # answers there
    out = world / "life/runs/one"
    commands = [
        ("train.py", flags(world, out=out)),
        ("eval.py", ["export", out, "hf"]),
        ("train.py", flags(world, model="somebody/a-model", out=world / "life/runs/two")),
    ]
    environment = dict(HF_TOKEN=secret, HF_HOME=str(home), HF_ENDPOINT=nobody, OMP_NUM_THREADS="1")
    found = list(real(commands, world, **environment))
    assert [status for status, _ in found] == [0, 0, 2]
    assert not any(secret in said for _, said in found)
    for path in (world / "life").rglob("*"):
        assert path.is_dir() or secret.encode() not in path.read_bytes(), path
