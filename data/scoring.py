"""Put the questions of a benchmark to a model: `eval.py bench RUN TASK --rows FOLDER`.

The model answers with the option that it finds most likely. Every answer is a line of TASK-VARIANT.jsonl as soon as it
is there, and the same command goes on from them; TASK-VARIANT.json holds what lm-evaluation-harness would write.
"""

import contextlib
import hashlib
import json
import math
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from data import BadInput, atomic
from data.benchmarks import encode, load_items
from data.checkpoint import digest, read_config
from data.hub import model_folder
from data.run import Run, pick_device, pick_dtype, unpruned_model
from data.settings import ROOT, Settings
from data.tables import save, spread, table
from data.tokenizer import Tokenizer
from model import Cache, Memory

# How likely is a text? -----------------------------------------------------------------------------------------------


@torch.inference_mode()
def remember(model, ids, module=None):
    """The module {block: Memory} with which text goes on after `ids`: what they leave in the cache is a KV memory.

    So whatever many texts begin with is read once. The cache begins with the keys and values of `module`.
    """
    if not ids:
        return module
    cache = Cache(0)
    model.hidden(torch.tensor([ids], device=model.head.device), module=module, cache=cache)
    after = {}
    for i, (keys, values) in cache.layers.items():  # each [1, G, M + T, hd]
        memory = (module or {}).get(i) or Memory()
        after[i] = replace(memory, keys=keys[0], values=values[0])
    return after


@torch.inference_mode()
def log_likelihoods(model, context, continuations, module=None):
    """Two lists, with one entry for each of the continuations (ids) behind the context (ids):
    log p, and whether greedy decoding would write it.
    """
    # The context is read once. Each continuation is a row behind it: the last token of the context, which predicts the
    # first of the continuation, and so on. Nothing sees the padding on the right.
    memory = remember(model, context[:-1], module)
    rows = [torch.tensor([context[-1], *ids[:-1]]) for ids in continuations]
    rows = pad_sequence(rows, batch_first=True).to(model.head.device)  # [N, longest]
    scores = []
    greedy = []
    for ids, hidden in zip(continuations, model.hidden(rows, module=memory), strict=True):
        log_p = model.logits(hidden[: len(ids)]).log_softmax(-1)  # [len(ids), V]
        targets = torch.tensor(ids, device=log_p.device)
        scores.append(log_p.gather(1, targets[:, None]).double().sum().item())
        greedy.append(torch.equal(log_p.argmax(-1), targets))
    return scores, greedy


# What is measured ----------------------------------------------------------------------------------------------------


class Pretrained:
    """A pretrained model, seen as a `Run` that has neither backbone nor modules. Its folder is out/pretrained/NAME."""

    def __init__(self, name, folder, device):
        self.folder = Path("out/pretrained", Path(name).resolve().name)
        self.settings = Settings(model=str(folder), kv_tokens=0)
        self.device = pick_device(device)
        self.dtype = pick_dtype("auto", self.device)
        self.tokenizer = Tokenizer.from_folder(folder)
        self.config = replace(read_config(folder), raw={"koff_model": digest(folder)})  # as a run's backbone has it
        self.names = []


def open_variants(name, device, wanted=None):
    """(run, variants of it that are to be measured). `name`: of a run's folder, or of a pretrained model.

    A variant is unpruned, backbone (no module), routed (the router picks one for each question) or a module's name (it
    reads every question). Without `wanted` it is the first three. BadInput for one that is not there.
    """
    folder = model_folder(name)
    variants = ["unpruned"]
    if (folder / "config.json").exists():
        run = Pretrained(name, folder, device)
    else:
        run = Run(folder, device)
        variants.append("backbone")
    if run.names:
        variants += ["routed", *run.names]
    for variant in wanted or ():
        if variant not in variants:
            raise BadInput(f"--on cannot be {variant!r}; {name} has {', '.join(variants)}.")
    return run, wanted or variants[:3]


def model_of(run, variant):
    """The `Model` of a variant; what its module adds comes from `module_for`."""
    return unpruned_model(run) if variant == "unpruned" else run.backbone


def module_for(run, variant, ids):
    """(name, module) with which a variant reads the text `ids`; (None, None): without."""
    name = variant
    if variant == "routed":
        name = run.router.route(np.array([ids]))[0]
    return (name, run.module(name)) if name in run.names else (None, None)


# Samples: one for each question --------------------------------------------------------------------------------------


def saved_samples(path, config, items, fresh):
    """The samples that a stopped command left, of the first of the items. The file is then ready for more of them.

    Its first line is the `config` of the command. BadInput where that differs, or where a sample is of another item.
    """
    samples = []
    if path.exists() and not fresh:
        whole = path.read_bytes().rpartition(b"\n")[0]  # a crash may have cut the last line
        try:
            before, *samples = map(json.loads, whole.split(b"\n"))
            for item, found in zip(items[: len(samples)], samples, strict=True):
                expected = sample_of(item, found["module"], found["loglikelihoods"])
                if found != {**expected, "where": found["where"]}:  # the rows may have moved
                    before = "damaged"
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            before = "damaged"
        if before != config:
            raise BadInput(f"{path} holds other settings, questions or weights; say --fresh to begin it again.")
    with atomic(path) as partial, open(partial, "w", encoding="utf-8") as file:
        for line in (config, *samples):
            file.write(json.dumps(line) + "\n")
    return samples


def measure(run, model, variant, items, path, samples):
    """Answer the items that have no sample yet. Each answer joins the samples, and the file, at once.

    Every question is answered by itself, behind what its subject shares, so that the numbers are the same, bit for bit,
    whether or not the command was stopped between two of them.
    """
    shared = None
    remembered = {}  # {name of a module: the module once it has read what is shared}
    with open(path, "a", encoding="utf-8") as file:
        for item in tqdm(items[len(samples) :], path.stem, leave=False, disable=None):
            if item.shared != shared:  # another subject: what is remembered of the last one can go
                shared = item.shared
                remembered = {}
            name, module = module_for(run, variant, run.tokenizer.encode(item.question))
            if name not in remembered:
                remembered[name] = remember(model, shared, module)
            scores, _ = log_likelihoods(model, item.context, item.continuations, remembered[name])
            samples.append(sample_of(item, name, scores))
            file.write(json.dumps(samples[-1]) + "\n")
            file.flush()  # now a crash cannot take it back


def sample_of(item, module, scores):
    """The sample of a question, given the log-likelihoods of its options with a module.

    acc: is the best option right? acc_norm: is the best per character right, which is fair to long options?
    """
    normed = [score / len(option.strip()) for score, option in zip(scores, item.options, strict=True)]
    choice = scores.index(max(scores))
    return {
        "module": module,
        "loglikelihoods": scores,
        "where": item.where,
        "subject": item.subject,
        "shots": len(item.shots),
        "choice": choice,
        "answer": item.right,
        "acc": choice in item.right,
        "acc_norm": normed.index(max(normed)) in item.right,
    }


def summary(samples):
    """{metric: its mean or the standard error of that}, by the names of lm-evaluation-harness."""
    out = {}
    for metric in ("acc", "acc_norm"):
        values = [sample[metric] for sample in samples]
        mean, deviation = spread(values)
        out[f"{metric},none"] = mean
        if len(values) > 1:  # of a single question it is unknown
            out[f"{metric}_stderr,none"] = deviation / math.sqrt(len(values))
    return out


# The command ---------------------------------------------------------------------------------------------------------


def bench(args):
    """Measure a run, or a pretrained model, on a task: a table on the screen, samples and results in files."""
    if (args.limit is not None and args.limit < 1) or not 0 <= (args.shots or 0) <= 100:
        raise BadInput("give a --limit of at least 1 and --shots of 0 to 100.")
    run, variants = open_variants(args.run, args.device, args.on)
    items = load_items(args.task, args.rows, args.subjects, args.shots, args.limit)
    commit = None
    with contextlib.suppress(OSError):  # a machine need not have git
        git = subprocess.run(["git", "describe", "--always"], cwd=ROOT, capture_output=True, text=True)
        commit = git.stdout.strip() or None
    out = args.out or run.folder / "bench"
    rows = {}
    for variant in variants:
        model = model_of(run, variant)
        # Every variant gets the same prompts, those that fit beside a module's keys and values.
        room = model.config.max_position_embeddings - run.settings.kv_tokens
        prompts = [encode(item, run.tokenizer, room) for item in items]
        config = {
            "task": args.task,
            "variant": variant,
            "model": run.settings.model,
            "dtype": str(run.dtype),
            "limit": args.limit,
            "fingerprint": fingerprint(run, model, variant, prompts),
        }
        path = out / f"{args.task}-{variant}.jsonl"
        samples = saved_samples(path, config, prompts, args.fresh)
        measure(run, model, variant, prompts, path, samples)

        # The samples of the task, and those of each subject.
        groups = {args.task: samples}
        for sample in samples:
            groups.setdefault(f"{args.task}_{sample['subject']}", []).append(sample)
        results = {name: summary(group) for name, group in groups.items()}
        total = results[args.task]
        accuracies = [result["acc,none"] for result in results.values()]
        total["acc_subjects,none"] = sum(accuracies[1:]) / len(accuracies[1:])  # the mean over subjects, not questions
        rows[variant] = [f"{value:.4f}" for value in total.values()]
        content = {
            "results": results,
            "n-shot": dict.fromkeys(groups, len(items[0].shots)),
            "n-samples": {name: {"effective": len(group)} for name, group in groups.items()},
            "config": config,
            "git_hash": commit,
            "date": time.time(),
        }
        save(out, {f"{path.stem}.json": content})
    print(f"\n{args.task}, {len(items)} questions\n\n{table('', list(total), rows)}\n\nsaved in {out}")


def fingerprint(run, model, variant, prompts):
    """Changes with the questions, the model (each config has a hash of the weights) and the modules at work."""
    asked = [(item.shared, item.context, item.continuations, item.right) for item in prompts]
    found = hashlib.sha256(repr((asked, model.config.raw, run.config.raw.get("koff_model"))).encode())
    for name in run.names:
        if variant in ("routed", name):
            found.update(run.module_path(name).read_bytes())
    return found.hexdigest()
