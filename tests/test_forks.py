"""The three forks of the README: its own lines, on a copy of the repository, and nothing else breaks there."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
SHORT = [
    "--preset",
    "quick",
    "--steps",
    "12",
    "--fisher-sequences",
    "6",
    "--eval-windows",
    "1",
    "--save-every",
    "100",
    "--out",
    "out/fork",
]


def blocks_of(title, language):
    """The code blocks of a README section."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme.split(f"### {title}\n")[1].split("\n## ")[0].split("\n### ")[0]
    return re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)


@pytest.fixture
def copy(tmp_path):
    """The repository, less what a run does not need."""
    skip = shutil.ignore_patterns(".git", "out", "results", "__pycache__", ".*_cache", ".venv")
    shutil.copytree(ROOT, tmp_path / "fork", ignore=skip)
    return tmp_path / "fork"


def run(copy, *command):
    done = subprocess.run([sys.executable, *command], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def append(copy, title):
    """Put a section's only block of Python at the end of koff.py; returns how many lines it has."""
    (code,) = blocks_of(title, "python")
    with open(copy / "koff.py", "a", encoding="utf-8") as file:
        file.write("\n\n" + code)
    return len(code.splitlines())


def apply(copy, title):
    """Apply a section's diff, whose places are found by their text; returns (files, added lines)."""
    (diff,) = blocks_of(title, "diff")
    files, added = set(), 0
    for hunk in diff.split("--- ")[1:]:
        name, *lines = hunk.rstrip("\n").split("\n")
        before = "".join(line[1:] + "\n" for line in lines if line[0] in " -")
        after = "".join(line[1:] + "\n" for line in lines if line[0] in " +")
        text = (copy / name).read_text(encoding="utf-8")
        assert text.count(before) == 1, f"{name} has not one place for {before!r}"
        (copy / name).write_text(text.replace(before, after), encoding="utf-8")
        files.add(name)
        added += sum(line[0] == "+" for line in lines)
    return files, added


def test_a_loss_of_your_own(copy):
    assert append(copy, "A loss of your own") <= 25
    report = run(copy, "train.py", *SHORT, "--objective", "reverse-kl")
    assert "KOFF, matching module" in report


def test_a_score_of_your_own_decides_what_closes_and_is_matched_by_name(copy):
    assert append(copy, "A score of your own for the gates' start") <= 25
    run(copy, "train.py", *SHORT, "--gate-init", "magnitude")
    ours = load_file(copy / "out/fork/gates.safetensors")
    run(copy, "train.py", *SHORT, "--fresh")
    fisher = load_file(copy / "out/fork/gates.safetensors")
    assert ours.keys() == fisher.keys() and any((ours[name] != fisher[name]).any() for name in ours)
    assert run(copy, "-c", MATCHED) == "True\n"


MATCHED = """
import torch, koff
from data.checkpoint import load
model = load("data/base")
gates = koff.Gates(model.config, 2)
scores = koff.SCORES["magnitude"](model, gates, [])
shuffled = {name: scores[name] for name in sorted(scores, reverse=True)}
found = []
for some in (scores, shuffled):
    gates.start_from(some)
    found.append({name: a.detach().clone() for name, a in gates.log_alpha.items()})
print(all(torch.equal(found[0][name], found[1][name]) for name in scores))
"""


def test_a_memory_of_another_kind_is_trained_saved_and_loaded(copy):
    files, added = apply(copy, "A memory of another kind")
    assert len(files) <= 3 and added <= 25
    run(copy, "train.py", *SHORT)
    module = load_file(copy / "out/fork/modules/german.safetensors")
    scales = [tensor for name, tensor in module.items() if name.endswith(".scale")]
    assert len(scales) == 6 and all((scale != 1).any() for scale in scales)  # it has learnt
    assert run(copy, "-c", LOADED) == "True True\n"
    run(copy, "-m", "pytest", "-q", "tests/test_koff.py")


LOADED = """
import torch
from dataclasses import replace
from data.run import Run
run = Run("out/fork", dtype=torch.float32)
module = run.memories("german")
without = {i: replace(memory, scale=None) for i, memory in module.items()}
tokens = torch.arange(20)[None]
logits = run.backbone(tokens, memories=module)
print(all(memory.scale is not None for memory in module.values()), bool((run.backbone(tokens, memories=without) != logits).any()))
"""
