"""The forks of README.md and data/FORKS.md: their own lines, on a copy of the repository, and nothing else breaks there."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
SHORT = (
    "--preset quick --steps 12 --gate-share 0.5 --domains 2 --batch 2 --seq-len 64 --fisher-sequences 4 "
    "--solve-tokens 1024 --eval-windows 1 --eval-len 64 --save-every 100 --out out/fork"
)


def section_of(title):
    """The text of a section of the two documents."""
    text = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "data/FORKS.md"))
    return re.split(r"\n##+ ", re.split(rf"\n##+ {title}\n", text)[1])[0]


def blocks_of(title, language):
    """The code blocks of a section."""
    return re.findall(rf"```{language}\n(.*?)```", section_of(title), re.DOTALL)


def flags_of(title):
    """The flags of the command that a section names."""
    return re.search(r"`python train.py ([^`]*)`", section_of(title))[1].split()


@pytest.fixture
def copy(tmp_path):
    """The repository, without what a run does not need."""
    skip = shutil.ignore_patterns(".git", "out", "results", "__pycache__", ".*_cache", ".venv")
    shutil.copytree(ROOT, tmp_path / "fork", ignore=skip)
    return tmp_path / "fork"


def run(copy, *command, status=0):
    done = subprocess.run([sys.executable, *command], cwd=copy, capture_output=True, text=True)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def apply(copy, title):
    """Apply a section's diffs, whose places are found by their text, and append its Python to koff.py; returns the
    number of added lines."""
    added = 0
    for diff in blocks_of(title, "diff"):
        for hunk in diff.split("--- ")[1:]:
            name, *lines = hunk.rstrip("\n").split("\n")
            before = "".join(line[1:] + "\n" for line in lines if line[0] in " -")
            after = "".join(line[1:] + "\n" for line in lines if line[0] in " +")
            text = (copy / name).read_text(encoding="utf-8")
            assert text.count(before) == 1, f"{name} has not one place for {before!r}"
            (copy / name).write_text(text.replace(before, after), encoding="utf-8")
            added += sum(line[0] == "+" for line in lines)
    (code,) = blocks_of(title, "python")
    with open(copy / "koff.py", "a", encoding="utf-8") as file:
        file.write("\n\n" + code)
    return added + len(code.splitlines())


def train(copy, title, *more):
    return run(copy, "train.py", *SHORT.split(), *flags_of(title), *more)


def test_a_loss_of_your_own(copy):
    title = "A loss of your own"
    assert apply(copy, title) <= 25
    assert "KOFF, matching module" in train(copy, title)


def test_gates_of_another_kind_reach_the_target_and_are_0_or_1(copy):
    title = "Gates of another kind"
    assert apply(copy, title) <= 25
    assert re.search(r"Sparsity: 0\.250\d physical", train(copy, title))
    assert "unpruned" in run(copy, "eval.py", "report", "out/fork")  # the gates of a saved run are of its family
    expected = run(copy, "-c", BERNOULLI)
    assert expected == "[0.0, 1.0] True\n"


BERNOULLI = """
import torch, koff
from model import Config
from data.families import read_config
gates = koff.Gates(read_config("data/base"), 0, family="straight-through", start=0.0)
z = gates.sample(torch.float32)[0]["k"]
z.sum().backward()
print(sorted(set(z.tolist())), bool((gates.log_alpha["k"].grad[0] > 0).all()))
"""


def test_a_score_of_your_own_decides_what_closes_and_is_matched_by_name(copy):
    title = "A score of your own for the gates' start"
    assert apply(copy, title) <= 25
    train(copy, title)
    gates = load_file(copy / "out/fork/gates.safetensors")
    closed = gates["mask.neuron"] == 0
    run(copy, "train.py", *SHORT.split(), "--out", "out/other")
    assert not closed.equal(load_file(copy / "out/other/gates.safetensors")["mask.neuron"] == 0)
    assert "invalid choice: 'magnitud'" in run(copy, "train.py", "--gate-init", "magnitud", status=2)


def test_a_memory_with_one_more_tensor_is_trained_saved_and_loaded_and_no_export_leaves_it_out(copy):
    title = "A memory with one more tensor"
    assert apply(copy, title) <= 30
    train(copy, title)
    module = load_file(copy / "out/fork/modules/french.safetensors")
    scales = [tensor for name, tensor in module.items() if name.endswith(".scale")]
    assert len(scales) == 6 and all((scale != 1).any() for scale in scales)  # it has learnt
    assert run(copy, "-c", LOADED.format(field="scale")) == "True True\n"
    refused = run(copy, "eval.py", "export", "out/fork", "hf", "--module", "french", status=2)
    assert "the memories have a tensor 'scale'" in refused
    refused = run(copy, "eval.py", "export", "out/fork", "peft", "--module", "french", status=2)
    assert "peft has no place for it" in refused
    assert not (copy / "out/fork/export").exists() or not any((copy / "out/fork/export").iterdir())
    refused = run(copy, "train.py", *SHORT.split(), "--memory-kind", "scaled", "--out", "out/solved", status=2)
    assert "say --solve-tokens 0" in refused and not (copy / "out/solved").exists()


def test_ia3_is_trained_saved_cut_and_loaded(copy):
    title = "A memory of another kind: IA3"
    assert apply(copy, title) <= 40
    assert "one module has" in train(copy, title)
    module = load_file(copy / "out/fork/modules/french.safetensors")
    assert {name.split(".")[-1] for name in module} == {"k_scale", "v_scale", "neuron_scale"}
    assert all((scale != 0).any() for scale in module.values())
    assert run(copy, "-c", LOADED.format(field="neuron_scale")) == "True True\n"
    run(copy, "-m", "pytest", "-q", "tests/test_koff.py", "-k", "compact or learns_the_same or whole_block")


LOADED = """
import torch
from dataclasses import replace
from data.run import Run
run = Run("out/fork", dtype=torch.float32)
memories = run.memories("french")
without = {{i: replace(memory, {field}=None) for i, memory in memories.items()}}
tokens = torch.arange(20)[None]
logits = run.backbone(tokens, memories=memories)
has = all(memory.{field} is not None for memory in memories.values())
print(has, bool((run.backbone(tokens, memories=without) != logits).any()))
"""
