"""What goes wrong around a run: text and model that changed, other processes, torn files, odd terminals and numbers.

python -m pytest tests/test_trouble.py              four processes that tokenise one text twenty times
python -m pytest tests/test_trouble.py -m slow      a long text, twice; and more readers that go away
"""

import contextlib
import errno
import fcntl
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import eval as evaluation
import koff
import train
from data import BadInput, atomic, command, discard, only_process, run_script, write_tensors
from data.checkpoint import digest
from data.corpus import load_text
from data.hub import model_folder
from data.later import settings_to_add
from data.run import Run
from data.settings import ROOT
from data.tokenizer import Tokenizer
from test_kill import forks
from test_modules import add, files, run  # noqa: F401 (a fixture)
from test_train import ctrl_c_in_step_5, flags, outputs, world  # noqa: F401 (a fixture)

# Another text, another model -----------------------------------------------------------------------------------------


def other_text(world):  # noqa: F811
    path = world / "data/french.txt"
    path.write_text(path.read_text(encoding="utf-8")[:-400], encoding="utf-8")


def other_name(world):  # noqa: F811
    (world / "data/french.txt").rename(world / "data/zulu.txt")  # german, the second, would go on from french's memory


def other_model(world):  # noqa: F811
    path = world / "base/model.safetensors"
    save_file({name: tensor * 1.01 for name, tensor in load_file(path).items()}, path)


def other_config(world):  # noqa: F811
    config = json.loads((world / "base/config.json").read_text())
    (world / "base/config.json").write_text(json.dumps({**config, "rope_theta": 500.0}))


def other_spaces(world):  # noqa: F811
    """Files are hashed as they are: who would say which change of a config means nothing?"""
    config = json.loads((world / "base/config.json").read_text())
    (world / "base/config.json").write_text(json.dumps(config, indent=1))


CHANGES = {
    "text": (other_text, "text of french"),
    "name": (other_name, "text of french"),
    "model": (other_model, "model"),
    "config": (other_config, "model"),
    "the config's spaces": (other_spaces, "model"),
}


def test_the_digest_of_a_model_is_that_of_its_files(world):  # noqa: F811
    base = world / "base"
    first = digest(base)
    assert first == digest(base)
    found = {first}
    for change in other_spaces, other_config, other_model:
        change(world)
        found.add(digest(base))
    (base / "generation_config.json").write_text("{}")
    found.add(digest(base))
    assert len(found) == 5
    (base / "README.md").write_text("nothing of the model")
    assert digest(base) in found


@pytest.mark.parametrize("change", CHANGES)
def test_a_stopped_run_goes_on_only_with_what_it_began_with(world, monkeypatch, capsys, change):  # noqa: F811
    damage, name = CHANGES[change]
    assert train.main(flags(world, out=world / "runs/whole")) == 0
    shutil.copytree(world / "data", world / "copy/data")
    shutil.copytree(world / "base", world / "copy/base")
    with ctrl_c_in_step_5(monkeypatch):
        assert train.main(flags(world)) == 130
    damage(world)
    before = files(world / "runs/one")
    capsys.readouterr()
    assert train.main(flags(world)) == 2
    assert f"runs/one began with another {name};" in capsys.readouterr().err
    assert files(world / "runs/one") == before
    for part in ("data", "base"):  # back again, and nothing is lost
        shutil.rmtree(world / part)
        shutil.copytree(world / "copy" / part, world / part)
    assert train.main(flags(world)) == 0
    assert outputs(world / "runs/one") == outputs(world / "runs/whole")


@pytest.mark.parametrize("change", CHANGES)
def test_a_report_and_a_later_module_refuse_what_changed(run, capsys, change):  # noqa: F811
    damage, name = CHANGES[change]
    damage(run.parent.parent)
    before = files(run)
    for work in (lambda: evaluation.main(["report", str(run)]), lambda: add(run)):
        capsys.readouterr()
        assert work() == 2
        err = capsys.readouterr().err
        assert f"began with another {name};" in err or (change == "name" and "has no french" in err)
    assert files(run) == before


def test_a_later_module_gets_its_steps_from_the_first_domains_alone(run):  # noqa: F811

    def steps():
        return settings_to_add(Run(run), {}).steps

    assert steps() == 8 // 2
    assert add(run) == 0 and steps() == 8 // 2
    assert evaluation.main(["remove", str(run), "french"]) == 0 and steps() == 8 // 2


def test_a_later_module_of_an_older_backbone_does_not_go_on(run, monkeypatch, capsys):  # noqa: F811
    with ctrl_c_in_step_5(monkeypatch):
        assert add(run, "--steps", "12") == 130
    stopped = shutil.copytree(run / "later", run.parent / "kept")
    assert train.main([*flags(run.parent.parent, seed=1), "--fresh"]) == 0
    assert not list((run / "later").rglob("*.*"))
    shutil.copytree(stopped, run / "later", dirs_exist_ok=True)
    settings = json.loads((run / "later/italian/settings.json").read_text())
    (run / "later/italian/settings.json").write_text(json.dumps({**settings, "seed": 1}))
    capsys.readouterr()
    assert add(run, "--steps", "12") == 2 and "italian began with another backbone" in capsys.readouterr().err


# Other processes -----------------------------------------------------------------------------------------------------


def tokenise(folder, barrier, rounds, failures):
    """What each of several processes does: all read and write the same cache at the same time, `rounds` times."""
    tokenizer = Tokenizer.from_folder(ROOT / "data/base")
    expected = None
    for number in range(rounds):
        barrier.wait()
        try:
            split = load_text(folder / "text.txt", tokenizer, folder / f"cache{number}")
            split.store()
            again = load_text(folder / "text.txt", tokenizer, folder / f"cache{number}")
            expected = split.train if expected is None else expected
            if not np.array_equal(again.train, expected) or not np.array_equal(again.heldout, split.heldout):
                failures.put("other ids")
        except BaseException as error:
            failures.put(repr(error))
            raise


def share_a_cache(folder, text):
    (folder / "text.txt").write_text(text, encoding="utf-8")
    context = forks()
    barrier, failures = context.Barrier(4), context.Queue()
    workers = [context.Process(target=tokenise, args=(folder, barrier, 20, failures)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert failures.empty() and [worker.exitcode for worker in workers] == [0] * 4
    assert len(list(folder.glob("cache*/*"))) == 20 and not list(folder.rglob(".*"))


def test_four_processes_share_a_cache(tmp_path):
    share_a_cache(tmp_path, (ROOT / "data/handbook/german.txt").read_text(encoding="utf-8")[:30_000])


@pytest.mark.slow
@pytest.mark.parametrize("turn", [1, 2])
def test_four_processes_share_a_cache_of_a_long_text(tmp_path, turn):
    share_a_cache(tmp_path, (ROOT / "data/handbook/german.txt").read_text(encoding="utf-8"))


def test_a_damaged_cache_is_made_anew(tmp_path):
    shutil.copy(ROOT / "data/handbook/german.txt", tmp_path / "text.txt")
    tokenizer = Tokenizer.from_folder(ROOT / "data/base")
    split = load_text(tmp_path / "text.txt", tokenizer, tmp_path / "cache")
    split.store()
    whole = split.cached.read_bytes()
    for damaged in (b"", whole[:50], whole[: len(whole) // 2]):
        split.cached.write_bytes(damaged)
        again = load_text(tmp_path / "text.txt", tokenizer, tmp_path / "cache")
        assert np.array_equal(again.train, split.train)
        again.store()
        assert split.cached.read_bytes() == whole


def test_a_second_process_in_a_run_folder_is_refused_and_sigterm_saves(world, capsys):  # noqa: F811
    out = world / "runs/one"
    argv = flags(world, steps=100_000, out=out)
    first = subprocess.Popen([sys.executable, ROOT / "train.py", *argv], stderr=subprocess.PIPE, text=True)
    for _ in range(600):
        if (out / "checkpoint.pt").exists():
            break
        time.sleep(0.1)
    assert train.main(argv) == 2
    assert f"{out} is in use by another process (number {first.pid})" in capsys.readouterr().err
    first.send_signal(signal.SIGTERM)
    _, err = first.communicate(timeout=60)
    assert first.returncode == 143 and "stopped after step" in err and "Traceback" not in err
    step = torch.load(out / "checkpoint.pt", weights_only=True)["step"]
    assert f"stopped after step {step}\n" in err and not list(out.rglob("*.part"))


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_said_once_and_used(tmp_path, monkeypatch, capsys, number):
    def flock(file, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with only_process(tmp_path):
        (tmp_path / "work").write_text("done")
    assert capsys.readouterr().err.count(f"{tmp_path} cannot be locked ({os.strerror(number)})") == 1
    monkeypatch.setattr(Path, "chmod", lambda *_: (_ for _ in ()).throw(PermissionError(1, "no rights here")))
    write_tensors(tmp_path / "a.safetensors", {"x": torch.ones(2)})
    assert (tmp_path / "a.safetensors").exists()


def test_nothing_changes_a_run_that_another_process_holds(run, capsys):  # noqa: F811
    with only_process(run):
        before = files(run)
        commands = (
            lambda: add(run),
            lambda: evaluation.main(["report", str(run)]),
            lambda: evaluation.main(["remove", str(run), "french"]),
            lambda: train.main([*flags(run.parent.parent, seed=3), "--fresh"]),
        )
        for work in commands:
            capsys.readouterr()
            assert work() == 2
            assert f"{run} is in use by another process (number {os.getpid()})" in capsys.readouterr().err
        assert files(run) == before
    assert evaluation.main(["remove", str(run), "french"]) == 0


def test_what_another_process_did_meanwhile_is_seen(world, monkeypatch, capsys):  # noqa: F811
    """A second process that has checked everything, and was still loading the model when the first one had the lock."""
    opening = command.open_training

    def slowly(s, out):
        opened = opening(s, out)
        if s.lora_rate == 0.1:
            monkeypatch.setattr(command, "open_training", opening)
            assert train.main(flags(world)) == 0
        return opened

    monkeypatch.setattr(command, "open_training", slowly)
    assert train.main(flags(world, lora_rate=0.1)) == 2
    assert "holds another run (--lora-rate differs)" in capsys.readouterr().err


def test_a_signal_while_the_last_step_is_saved_is_heard(world, monkeypatch, capsys):  # noqa: F811
    saving = torch.save

    def interrupted(state, path):
        saving(state, path)
        if state["step"] == 8:
            monkeypatch.setattr(torch, "save", saving)
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(torch, "save", interrupted)
    assert train.main(flags(world)) == 143
    assert train.main(flags(world)) == 0 and "at step 8" in capsys.readouterr().out


@contextlib.contextmanager
def stopped_in_the_evaluation(monkeypatch):
    """Under it each training is stopped when it begins to evaluate."""

    def stopped(*args, **more):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate", stopped)
        yield


def test_a_later_module_that_was_stopped_in_the_evaluation_gets_its_tables(run, monkeypatch, capsys):  # noqa: F811
    with stopped_in_the_evaluation(monkeypatch):
        assert add(run) == 130
    before = (run / "modules/italian.safetensors").read_bytes()
    capsys.readouterr()
    for more, words in (
        (["--steps", "3"], "with other settings"),
        (["--fresh"], "has a domain italian already"),
        (["--sparsity", "0.9"], "--sparsity cannot differ"),
    ):
        assert add(run, *more) == 2 and words in capsys.readouterr().err
    assert add(run) == 0 and (run / "modules/italian.safetensors").read_bytes() == before
    assert list(json.loads((run / "results.json").read_text())["swap"]) == ["french", "german", "italian"]
    assert not (run / "later/italian").exists()
    assert add(run) == 2 and "has a domain italian already" in capsys.readouterr().err


def test_a_run_that_was_stopped_in_the_evaluation_is_only_evaluated(world, monkeypatch):  # noqa: F811
    out = world / "runs/one"
    shutil.copy(world / "data/german.txt", world / "italian.txt")
    with stopped_in_the_evaluation(monkeypatch):
        assert train.main(flags(world)) == 130
        assert add(out) == 130  # another one comes meanwhile
    before = files(out)
    assert evaluation.main(["report", str(out)]) == 0  # it does not know how long the training took,
    assert train.main(flags(world)) == 0  # the checkpoint does
    results = json.loads((out / "results.json").read_text())
    assert list(results["swap"]) == ["french", "german", "italian"] and results["seconds"] > 0
    assert not (out / "checkpoint.pt").exists()
    (out / "results.json").unlink()
    assert train.main(flags(world)) == 0
    assert list(json.loads((out / "results.json").read_text())["swap"]) == ["french", "german", "italian"]
    after = files(out)
    assert {name for name in before if before[name] != after.get(name)} <= {"checkpoint.pt", ".lock"}


@pytest.mark.parametrize("turn", range(4))
def test_wherever_fresh_is_killed_no_ruin_is_called_a_run(run, monkeypatch, turn):  # noqa: F811
    removed = []

    def killed(path):
        if len(removed) == turn:
            raise KeyboardInterrupt
        removed.append(path)
        discard(path)

    world = run.parent.parent  # noqa: F811
    monkeypatch.setattr("data.discard", killed)
    assert train.main([*flags(world, seed=1), "--fresh"]) == 130
    monkeypatch.setattr("data.discard", discard)
    seed = json.loads((run / "settings.json").read_text())["seed"]
    assert train.main(flags(world, seed=seed)) == 0 and evaluation.main(["report", str(run)]) == 0


def test_a_stopped_run_goes_on_where_model_and_text_have_moved(world, monkeypatch):  # noqa: F811
    assert train.main(flags(world, out=world / "runs/whole")) == 0
    with ctrl_c_in_step_5(monkeypatch):
        assert train.main(flags(world)) == 130
    for name in ("base", "data"):
        (world / name).rename(world / f"{name}-elsewhere")
    assert train.main(flags(world, model=world / "base-elsewhere", data=world / "data-elsewhere")) == 0
    same = {name for name in files(world / "runs/one") if name.endswith(".safetensors")}
    one, whole = files(world / "runs/one"), files(world / "runs/whole")
    assert len(same) == 5 and all(one[name] == whole[name] for name in same)


def test_a_run_that_lost_its_router_is_not_finished(run, capsys):  # noqa: F811
    (run / "router.safetensors").unlink()
    assert train.main(flags(run.parent.parent)) == 0 and (run / "router.safetensors").exists()
    results = json.loads((run / "results.json").read_text())
    assert results["seconds"] > 0
    for damaged, seconds in (
        ('{"torn', 0.0),
        (json.dumps({**results, "perplexity": []}), results["seconds"]),  # of the old file only the seconds count
        (json.dumps({**results, "swap": {"french": "x"}, "seconds": "12.5"}), 12.5),
        (json.dumps({**results, "seconds": "x"}), 0.0),
        (json.dumps({**results, "seconds": [5]}), 0.0),
    ):
        (run / "results.json").write_text(damaged)
        assert evaluation.main(["report", str(run)]) == 0
        assert json.loads((run / "results.json").read_text()) == {**results, "seconds": seconds}


def foreign(tensors):
    return {"x": torch.ones(2)}


def nan(tensors):
    return {name: tensor * float("nan") if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def half(tensors):
    return dict(list(tensors.items())[1:])  # without its first one


@pytest.mark.parametrize("damage", [foreign, nan, half])
@pytest.mark.parametrize("name", ["gates", "modules/french"])
def test_a_damaged_part_of_a_run_is_named(run, capsys, damage, name):  # noqa: F811
    path = run / f"{name}.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(damage(load_file(path)), path, metadata)
    assert evaluation.main(["report", str(run)]) == 2
    err = capsys.readouterr().err
    assert f"{name}.safetensors" in err and "Traceback" not in err


def test_a_text_of_every_name(world, capsys):  # noqa: F811
    shutil.copy(world / "data/french.txt", world / "data/retention.txt")
    argv = flags(world, retention=world / "data/german.txt", retention_every=1, gate_share=0.5)
    assert train.main(argv) == 0  # a domain may be called like a part of a run,
    for name in ("backbone", "x" * 151):  # but not like a variant of it
        shutil.copy(world / "data/french.txt", world / f"data/{name}.txt")
        assert train.main(flags(world, out=world / "runs/two")) == 2
        assert "a domain" in capsys.readouterr().err
        (world / f"data/{name}.txt").unlink()
    assert train.main(flags(world, out=world / "data/run")) == 2
    assert "lies within the text" in capsys.readouterr().err
    assert train.main(flags(world, domains="²", out=world / "runs/two")) == 2


def test_closed_streams_stop_no_training(world):  # noqa: F811
    argv = " ".join(flags(world, out=world / "runs/two"))
    done = subprocess.run(f"{sys.executable} {ROOT}/train.py {argv} 2>&- <&- >&-", shell=True)
    assert done.returncode == 0 and (world / "runs/two/report.md").exists()


MORE_PIPES = [pytest.param(pipe, marks=pytest.mark.slow) for pipe in ("2>&1 | head -c 30", "| true")]


@pytest.mark.parametrize("pipe", ["2>&1 | true", "2>&1 >/dev/null | head -c 30", *MORE_PIPES])
def test_nor_does_a_reader_that_goes_away(world, pipe):  # noqa: F811
    argv = " ".join(flags(world, out=world / "runs/two"))
    script = f"set -o pipefail; {sys.executable} {ROOT}/train.py {argv} {pipe}"
    done = subprocess.run(["bash", "-c", script], env={**os.environ, "TQDM_DISABLE": ""}, capture_output=True)
    assert done.returncode == 0 and (world / "runs/two/report.md").exists()


@pytest.mark.parametrize("to,status", [("> /dev/full", 2), ("| true", 0)])
@pytest.mark.parametrize("buffered", ["", "1"])
def test_a_full_disk_is_an_error_and_no_reader_is_none(run, to, status, buffered):  # noqa: F811
    script = f"set -o pipefail; {sys.executable} {ROOT}/eval.py compare {run} {to}"
    done = subprocess.run(["bash", "-c", script], env={**os.environ, "PYTHONUNBUFFERED": buffered}, capture_output=True)
    assert done.returncode == status and done.stderr.count(b"\n") == (status == 2), done.stderr


def test_no_two_writers_have_the_same_temporary_name(tmp_path):
    with atomic(tmp_path / "a") as one, atomic(tmp_path / "a") as two:
        one.write_text("one")
        two.write_text("two")
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and one != two


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_who_may_read_a_file_is_what_the_umask_says(tmp_path, mask):
    before = os.umask(mask)
    try:
        write_tensors(tmp_path / "module.safetensors", {"x": torch.ones(1)})  # safetensors: owner only
        with atomic(tmp_path / "folder") as folder:
            folder.mkdir()
            save_file({"x": torch.ones(1)}, folder / "model.safetensors")
            (folder / "copied.json").write_text("{}")
            (folder / "copied.json").chmod(0o444)  # as in a folder of models that belongs to somebody else
    finally:
        os.umask(before)
    assert {oct(p.stat().st_mode & 0o777) for p in tmp_path.rglob("*.*")} == {oct(0o666 & ~mask)}


def test_what_a_library_leaves_beside_its_file_goes_with_it(tmp_path):
    with atomic(tmp_path / "file") as partial:
        partial.with_name(".tmpAbCdEf").write_text("half")
        partial.write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# What a folder holds -------------------------------------------------------------------------------------------------


def test_fresh_removes_what_this_program_wrote_and_nothing_else(run, capsys):  # noqa: F811
    mine = [
        "README.md",
        ".song.part",
        "x/.film.part",
        "notes.json",
        "photos/beach.png",
        "modules/tool.py",
        "backbone/notes.txt",
        "bench/mine.jsonl",
        "export/.hf.01234567.part/config.json",  # another process may be writing it: an export does not hold its run
    ]
    for name in mine:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("mine")
    save_file({"x": torch.ones(1)}, run / "modules/adapter.safetensors")  # not a module of ours
    old = [
        "lape.json",
        "swap.png",
        ".checkpoint.pt.01234567.part/checkpoint.pt",
        "modules/.french.safetensors.89abcdef.part/.tmpAbCdEf",
        ".lape.json.01234567.part/lape.json",
        "backbone/chat_template.jinja",
        "later/dutch/checkpoint.pt",
    ]
    for name in old:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("of the run before")
    shutil.copy(run / "modules/french.safetensors", run / "modules/former.safetensors")
    assert train.main([*flags(run.parent.parent, seed=1), "--fresh"]) == 0
    assert all((run / name).read_text() == "mine" for name in mine)
    assert {path.stem for path in (run / "modules").glob("*.safetensors")} == {"adapter", "french", "german"}
    assert not any((run / name).exists() for name in old)


@pytest.mark.parametrize("text", ['{"editor.fontSize": 12}', "{}", "[]", "not JSON", '{"steps": "many"}'])
def test_a_folder_with_settings_of_something_else_is_left_alone(world, capsys, text):  # noqa: F811
    out = world / "runs/one"
    out.mkdir(parents=True)
    (out / "settings.json").write_text(text)
    (out / "results.json").write_text("mine")
    for more in ([], ["--fresh"]):
        assert train.main([*flags(world), *more]) == 2
        assert "settings.json cannot be used by this version (" in capsys.readouterr().err
    assert {path.name for path in out.iterdir()} == {"settings.json", "results.json"}


def test_a_torn_log_goes_on_and_a_torn_checkpoint_is_named(world, monkeypatch, capsys):  # noqa: F811
    argv = flags(world, steps=24)
    assert train.main(flags(world, steps=24, out=world / "runs/whole")) == 0
    with ctrl_c_in_step_5(monkeypatch):
        assert train.main(argv) == 130
    out = world / "runs/one"
    log = (out / "log.jsonl").read_bytes()
    checkpoint = (out / "checkpoint.pt").read_bytes()
    for torn in (b"", checkpoint[:100], checkpoint[: len(checkpoint) // 2], b"\0" * 1000, b"nonsense"):
        (out / "checkpoint.pt").write_bytes(torn)
        capsys.readouterr()
        assert train.main(argv) == 2
        err = capsys.readouterr().err
        assert f"{out}/checkpoint.pt is damaged" in err and "remove it" in err and err.count("\n") == 1
    (out / "checkpoint.pt").write_bytes(checkpoint)
    (out / "log.jsonl").write_bytes(log + b'\n\n\0\0\0\0\n[3]\n{"step": 3, "lo')
    assert train.main(argv) == 0
    assert outputs(out) == outputs(world / "runs/whole")
    assert (out / "log.jsonl").read_bytes() == (world / "runs/whole/log.jsonl").read_bytes()


def test_token_ids_go_into_the_run_folder_where_its_parent_cannot_be_written(world, monkeypatch):  # noqa: F811
    (world / "runs/one").mkdir(parents=True)
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != world / "runs" and allowed(path, mode))
    assert train.main(flags(world)) == 0
    assert not (world / "runs/.tokens").exists() and len(list((world / "runs/one/.tokens").iterdir())) == 2


def test_a_run_is_found_from_anywhere(world, monkeypatch, tmp_path):  # noqa: F811
    monkeypatch.chdir(world)
    assert train.main(flags(world, model="base", data="data", out="runs/one")) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    shutil.move(world / "runs/one", "moved")
    assert evaluation.main(["report", "moved"]) == 0


def test_a_relative_path_that_is_missing_is_never_asked_of_the_hub(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    assert str(model_folder("models/smollm2")) == "models/smollm2"
    with pytest.raises(BadInput, match="pip install huggingface_hub"):
        model_folder("owner/smollm2")


# Terminals and numbers -----------------------------------------------------------------------------------------------


def test_what_a_terminal_cannot_show_is_replaced(run):  # noqa: F811
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    argv = [sys.executable, ROOT / "eval.py", "generate", run, b"\xff caf\xc3\xa9", "--tokens", "3"]
    done = subprocess.run(argv, env=environment, capture_output=True)
    assert done.returncode == 0 and done.stdout.startswith(b"? caf") and b"Traceback" not in done.stderr


@pytest.mark.parametrize(
    "more,sentence",
    [
        (["--temperature", "nan"], "--temperature of at least 0"),
        (["--seed", str(2**70)], "--seed is 1180591620717411303424"),
        (["--seed", "-1"], "--seed is -1"),
    ],
)
def test_sampling_that_means_nothing_is_refused(run, capsys, more, sentence):  # noqa: F811
    assert evaluation.main(["generate", str(run), "Der", *more]) == 2
    assert sentence in capsys.readouterr().err


def test_what_would_be_ignored_is_refused(capsys):
    for more in (["--sweep", "choices"], ["--add", "dutch.txt"]):
        with pytest.raises(SystemExit):
            train.parse(["--dry-run", *more])
        assert "--dry-run is for a single run" in capsys.readouterr().err
    for more in (["--seeds", "3"], ["--seeds", "0", "--sweep", "choices"]):
        with pytest.raises(SystemExit):
            train.parse(more)
        assert "--seeds is for a --sweep" in capsys.readouterr().err
    for more, words in (
        (["--add", "dutch.txt", "--preset", "solved"], "without --preset"),
        (["--sweep", "text", "--text-share", "0.5"], "--text-share does nothing"),
    ):
        with pytest.raises(SystemExit):
            train.parse(more)
        assert words in capsys.readouterr().err


def test_a_tiny_temperature_is_greedy_and_a_date_is_a_seed(world, capsys):  # noqa: F811
    assert train.main(flags(world, seed=20251125120000)) == 0
    texts = []
    for temperature in ("0", "1e-40", "1e-320"):
        capsys.readouterr()
        argv = ["generate", str(world / "runs/one"), "Der", "--tokens", "8", "--temperature", temperature]
        assert evaluation.main([*argv, "--seed", "20251125120000"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] == texts[2]
    assert train.main(flags(world, seed=2**70, out=world / "runs/two")) == 2
    assert "--seed is 1180591620717411303424" in capsys.readouterr().err


def test_a_loss_above_709_nats_is_an_infinite_perplexity(run):  # noqa: F811
    assert evaluation.perplexity(np.array([[1e4, 10.0]])) == math.inf
    results = json.loads((run / "results.json").read_text())
    results["perplexity"]["backbone"]["german"] = math.inf
    assert "inf" in evaluation.report(results)


# How a script ends ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error,status,sentence",
    [
        (BadInput("x is wrong; mend it."), 2, "name: x is wrong; mend it.\n"),
        (OSError(28, "No space left on device"), 2, "No space left on device"),
        (MemoryError(), 2, "there is not enough memory; try a smaller --batch"),
        (torch.OutOfMemoryError("CUDA out of memory"), 2, "there is not enough memory; try a smaller --batch"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, "there is not enough memory"),
        (KeyboardInterrupt(), 130, "stopped; again"),
        (KeyboardInterrupt(signal.SIGTERM), 143, "stopped; again"),
        (OSError("x cannot be written; is the disk full?"), 2, "is the disk full?"),
        (ZeroDivisionError("division by zero"), 1, "please report the lines above"),
    ],
)
def test_every_end_has_its_status_and_one_sentence(capsys, error, status, sentence):
    def work():
        raise error

    assert run_script("name", work, "again") == status
    err = capsys.readouterr().err
    assert sentence in err and ("Traceback" in err) == (status == 1)


def test_sigterm_tidies_up(tmp_path, capsys):
    def work():
        with atomic(tmp_path / "file") as partial:
            partial.write_text("half")
            signal.raise_signal(signal.SIGTERM)

    assert run_script("name", work, "again") == 143
    assert not list(tmp_path.iterdir()) and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


# The penalty ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [200, 500, 2000])
@pytest.mark.parametrize(
    "kind,start,ramp", [("scaled", 20.0, 0.0), ("scaled", 60.0, 0.0), ("scaled", 20.0, 0.2), ("lagrangian", 20.0, 0.2)]
)
def test_the_sparsity_lands_on_its_target(kind, start, ramp, steps):
    """Gates as the default starts them, AdamW as a run has it, and a loss that wants to open them, here noise and all."""
    generator = torch.Generator().manual_seed(0)
    a = torch.linspace(1, 5, 400).requires_grad_()
    optimizer = torch.optim.AdamW([a], lr=0.05, betas=(0.9, 0.99), weight_decay=0.0)
    penalty = koff.PENALTIES[kind](start)
    for index in range(steps):
        closed = 1 - koff.probability_open(a, 2 / 3)
        target = 0.25 * min(1.0, (index + 1) / (ramp * steps)) if ramp else 0.25
        noise = 1 + torch.randn(400, generator=generator)
        loss = (noise * closed).sum() / 400  # what is closed costs something
        (loss + penalty(closed.mean(), target)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert 1 - koff.probability_open(a, 2 / 3).mean().item() == pytest.approx(0.25, abs=0.01)
    assert all(x < 400 for name, x in penalty.named_buffers() if name != "last")


@pytest.mark.parametrize("objective", koff.OBJECTIVES)
def test_no_gradient_is_nan_however_far_apart_the_two_are(objective):
    logits = torch.zeros(3, 50)
    logits[0, 0] = 300  # the student is sure: nothing is left for the rest
    logits[1, 40] = 300  # of what is outside the top
    logits.requires_grad_()
    index = torch.arange(10).expand(3, 10)
    log_p = torch.full((3, 10), -300.0)
    log_p[:, 1] = math.log(0.5)
    rest = torch.full((3, 1), math.log(0.5))
    loss = koff.OBJECTIVES[objective](logits, index, log_p, rest, torch.tensor([0, 1, 2]))
    loss.sum().backward()
    assert loss.isfinite().all() and logits.grad.isfinite().all()


# Names that other packages do not promise to keep ----------------------------------------------------------------------

PRIVATE = {
    "tiktoken._tiktoken": "from data.tokenizer import Tokenizer; print(Tokenizer.from_folder('data/base').encode('Der Kernel'))",
    "torch._subclasses.fake_tensor": "import train; print(train.main(['--dry-run']))",
    "torch.utils._python_dispatch": "import train; print(train.main(['--dry-run']))",
    "torch.utils._pytree": "import train; print(train.main(['--dry-run']))",
}  # fmt: skip


def test_no_other_private_name_is_imported():
    found = set()
    for path in [*ROOT.glob("*.py"), *(ROOT / "data").rglob("*.py")]:
        found |= set(re.findall(r"^ *(?:from|import) (\S*\b_[a-z]\S*)", path.read_text(encoding="utf-8"), re.M))
    assert found == set(PRIVATE)


@pytest.mark.parametrize("name", PRIVATE)
def test_a_private_name_may_go(name):
    """Where torch moves fake tensors there is no dry run; where tiktoken moves its BPE, the class of a public one does."""
    gone = f"""
import builtins
usual = builtins.__import__
def without(asked, places=None, *more, **named):
    if asked == {name!r} and (places or {{}}).get("__name__", "").startswith("data."):
        raise ImportError(asked)
    return usual(asked, places, *more, **named)
builtins.__import__ = without
"""
    usual, without = (
        subprocess.run([sys.executable, "-c", begin + PRIVATE[name]], cwd=ROOT, capture_output=True, text=True)
        for begin in ("", gone)
    )
    assert usual.returncode == without.returncode == 0, without.stderr
    if "torch" in name:
        assert without.stdout == "2\n" and "--dry-run needs fake tensors" in without.stderr
    else:
        assert without.stdout == usual.stdout.splitlines()[-1] + "\n" and len(usual.stdout) > 5
