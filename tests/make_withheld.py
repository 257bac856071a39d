"""A module is withheld. Can a stranger who has some text of its domain make a replacement?

    python tests/make_withheld.py out/handbook --out out/withheld [--steps 5,60] [--domains german,spanish]

A stranger who also has the pretrained model can solve and train a module as the run itself did. A stranger who has only
the backbone and some text trains on next tokens. For comparison, the same is done on the unpruned model, which knows the
domain, and on a random model of the backbone's size, which knows nothing. The text is 1, 10 or 100% of the domain's
training text. A module is trained for each number of steps in --steps, and the best one counts.

The script prints a Markdown table of held-out perplexity. Knowledge that the backbone brings back and the random model
does not must have stayed in the backbone. Results are kept in the folder of --out, and the same command goes on from
there.
"""

import argparse
import contextlib
import json
import shutil
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))

import eval as evaluation
import train
from data import atomic, command
from data.hub import model_folder
from data.run import Run, paths_of
from data.tables import saved_results, table

SHARES = (0.01, 0.1, 1.0)


train_run = partial(command.train, Trainer=train.Trainer, loop=train.loop, evaluate=train.evaluate)


def random_copy(model, folder):
    """The pretrained model as it might have been before training: random matrices of the same standard deviation."""
    with atomic(folder) as partial:
        shutil.copytree(model, partial)
        generator = torch.Generator().manual_seed(0)
        for path in partial.glob("*.safetensors"):
            tensors = load_file(path)
            for name, tensor in tensors.items():
                if tensor.ndim == 2:
                    noise = torch.randn(tensor.shape, generator=generator)
                    tensors[name] = (noise * tensor.float().std()).to(tensor.dtype)
                else:  # norms start at 1, biases at 0
                    tensors[name] = torch.full_like(tensor, 0.0 if name.endswith("bias") else 1.0)
            save_file(tensors, path, {"format": "pt"})


def runs_to_add_to(run, out):
    """{"who, on which model": (a finished run, the ways to make a module for it)}."""
    known = out / "pretrained-model-at-hand"
    alone = out / "text-alone"
    for folder in (known, alone):
        if not folder.exists():
            with atomic(folder) as partial:
                shutil.copytree(run.folder, partial)
    # A later module learns by its run's settings.
    by_text = {"objective": "next-token", "solve_tokens": 0}
    settings = {**asdict(run.settings), **by_text}
    (alone / "settings.json").write_text(json.dumps(settings))
    untrained = replace(run.settings, **by_text, steps=0, retention="")
    train_run(replace(untrained, sparsity=0.0), out / "unpruned")
    model = out / "random-model"
    if not model.exists():
        random_copy(model_folder(run.settings.model), model)
    train_run(replace(untrained, model=str(model.resolve())), out / "random")
    return {
        "pretrained model at hand, on the backbone": (known, ("solved", "trained")),
        "text alone, on the backbone": (alone, ("trained",)),
        "text alone, on the unpruned model": (out / "unpruned", ("trained",)),
        "text alone, on a random model": (out / "random", ("trained",)),
    }


def call(main, *argv):
    """Run one command of train.py or eval.py, and exit if it fails."""
    status = main([str(x) for x in argv])
    if status:
        sys.exit(status)


def stranger(folder, path, domain, share, steps):
    """The held-out perplexity of `domain` with a module that a stranger makes from a share of its text."""
    name = f"{domain}-{steps}-{share}"
    answers = folder.parent / f"{folder.name}.json"
    known = json.loads(answers.read_text()) if answers.exists() else {}
    if name in known:
        return known[name]
    text = folder.parent / "text" / f"{name}{path.suffix}"
    text.parent.mkdir(exist_ok=True)
    shutil.copy(path, text)
    call(train.main, "--add", text, "--out", folder, "--text-share", share, "--steps", steps)
    perplexity = saved_results(folder)["perplexity"]["koff"][name]
    with atomic(answers) as partial:
        partial.write_text(json.dumps({**known, name: perplexity}))
    call(evaluation.main, "remove", folder, name)
    return perplexity


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a finished run")
    parser.add_argument("--out", type=Path, default=Path("out/withheld"), help="working folder [out/withheld]")
    parser.add_argument("--steps", default="5,60", help="numbers of training steps to try, with commas [5,60]")
    parser.add_argument("--domains", default="", help="some of the run's domains, with commas; empty: all")
    args = parser.parse_args()
    run = Run(args.run)
    paths = paths_of(run)
    domains = args.domains.split(",") if args.domains else list(paths)
    before = saved_results(args.run)
    unpruned = before["perplexity"]["unpruned"]
    found = {
        "unpruned": unpruned,
        "the module itself": before["perplexity"]["koff"],
        "none: the backbone alone": before["perplexity"]["backbone"],
        "the best of the others": {d: min(p for m, p in before["swap"][d].items() if m != d) for d in domains},
    }
    with contextlib.redirect_stdout(sys.stderr):  # the tables of each run would hide the result
        for who, (folder, ways) in runs_to_add_to(run, args.out).items():
            for way in ways:
                lengths = [int(n) for n in args.steps.split(",")] if way == "trained" else [0]
                for share in SHARES:
                    label = f"{who}, {way} on {share:.0%}"
                    found[label] = {d: min(stranger(folder, paths[d], d, share, n) for n in lengths) for d in domains}
                    print(f"{label}: {json.dumps(found[label])}")
    rows = {}
    for label, perplexity in found.items():
        mean = np.mean([perplexity[d] / unpruned[d] for d in domains])
        rows[label] = [*(f"{perplexity[d]:.2f}" for d in domains), f"{mean:.3f}"]
    print(table("module", [*domains, "/ unpruned"], rows))


if __name__ == "__main__":
    main()
