"""Ask a model the prompts of a benchmark: log-likelihoods and text, with shared prefixes, restartable."""

import hashlib
import json
import math
import re
import subprocess
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import BadInput, atomic, benchmarks
from data.checkpoint import load, read_config
from data.hub import model_folder
from data.run import Run, pick_device, pick_dtype
from data.settings import HERE
from data.tables import save, spread, table
from data.tokenizer import Tokenizer
from model import Cache, Memory, generate

ROOM = 2048  # tokens in a batch, at most

STOP = ("\nQ:", "\nQuestion:")  # a model that goes on with the next question has answered


def remember(model, ids, memory=None):
    """The memory {block: Memory} with which text goes on after `ids`: computed once, shared by a batch."""
    if not ids:
        return memory
    cache, tokens, own = Cache(0), torch.tensor([ids], device=model.head.device), memory or {}
    model.hidden(tokens, module=memory, cache=cache)
    return {i: Memory(own[i].lora if i in own else {}, k[0], v[0]) for i, (k, v) in cache.layers.items()}


def after(model, rows, read, memory):
    """rows: lists of ids -> one [read[r], V] each: log p of what may follow each of the last read[r] of them.

    Padding on the right is harmless: nothing that is read can see it.
    """
    tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    x = model.hidden(tokens.to(model.head.device), module=memory)
    x = torch.cat([h[len(ids) - n : len(ids)] for h, ids, n in zip(x, rows, read, strict=True)])
    return model.logits(x).log_softmax(-1).split(read)


def batches(prompts, shared):
    """Cut prompts, whose first `shared` ids are known, into batches by length. Those of several rows are one by one."""
    out = []
    for p in sorted(prompts, key=lambda p: len(p.ids)):
        full = not out or (len(out[-1]) + 1) * (len(p.ids) - shared) > ROOM
        if full or len(stems(p)) > 1 or (not p.options and len(p.ids) != len(out[-1][0].ids)):
            out.append([])
        out[-1].append(p)
    return out


def stems(p):
    """The rows that options need, less the context: each option without its last token, often one for all of them."""
    return list(dict.fromkeys(option[:-1] for option in p.options))


def scores(model, part, shared, memory):
    """[[log-likelihood of each option] of each prompt]; `memory` holds the first `shared` ids of all prompts."""
    if len(stems(part[0])) > 1:  # the only one: its rows share all of the context but the last token
        memory, shared = remember(model, part[0].ids[shared:-1], memory), len(part[0].ids) - 1
    keys = [(p.item.id, stem) for p in part for stem in stems(p)]
    rows = [p.ids[shared:] + list(stem) for p in part for stem in stems(p)]
    log_p = dict(zip(keys, after(model, rows, [1 + len(stem) for _, stem in keys], memory), strict=True))

    def score(p, option):
        return log_p[p.item.id, option[:-1]][range(len(option)), option].double().sum().item()

    return [[score(p, option) for option in p.options] for p in part]


def texts(model, part, shared, memory, tokenizer):
    """What the model writes greedily after each prompt, up to the next question; prompts of equal length."""
    eos, ids, going = model.config.eos_token_ids, [[] for _ in part], set(range(len(part)))
    tokens = torch.tensor([p.ids[shared:] for p in part], device=model.head.device)
    for new in generate(model, tokens, part[0].item.steps, tokenizer.vocab_size, eos=eos, module=memory):
        for b, token in enumerate(new.tolist()):
            if b in going and token not in eos:
                ids[b].append(token)
            if token in eos or any(s in tokenizer.decode(ids[b]) for s in STOP):
                going.discard(b)
        if not going:
            break
    return [re.split("|".join(STOP), tokenizer.decode(row))[0].strip() for row in ids]


@torch.inference_mode()
def answers(model, tokenizer, prompts, memory=None, finished=()):
    """Yield [(prompt, what its line of the sample file says)] batch by batch, less what is `finished`: {(subject, id)}.

    What the ids of a subject's prompts begin with in common is computed once. Batches do not depend on what is
    finished, so that the numbers are the same, bit for bit, whether or not a run was stopped between.
    """
    groups = {}
    for p in prompts:
        groups.setdefault((p.item.subject, p.shots, min(2, len(stems(p)))), []).append(p)
    for group in groups.values():
        columns = enumerate(zip(*(p.ids[:-1] for p in group), strict=False))
        shared = next((t for t, column in columns if len(set(column)) > 1), min(len(p.ids) for p in group) - 1)
        prefix = None
        for part in batches(group, shared):
            if all(p.key in finished for p in part):
                continue
            prefix = prefix or remember(model, group[0].ids[:shared], memory)
            how = (model, part, shared, prefix)
            given = scores(*how) if part[0].options else texts(*how, tokenizer)
            pairs = zip(part, given, strict=True)
            yield [(p, p.item.judged(x)) for p, x in pairs if p.key not in finished]


def finished_samples(path, header, fresh):
    """{(subject, id): sample} of a file that a stopped run left, ready for more; BadInput if its settings differ."""
    header, lines, changed = json.loads(json.dumps(header)), {}, []
    if path.exists() and not fresh:
        whole = path.read_bytes().rpartition(b"\n")[0]  # a crash may have cut the last line
        try:
            old, *rows = [json.loads(line) for line in whole.splitlines()]
            lines = {(row["subject"], row["id"]): row for row in rows}
            changed = [name for name in header if old.get(name) != header[name]]
        except (ValueError, LookupError, TypeError, AttributeError):
            raise BadInput(f"{path} is damaged; say --fresh to begin it again.") from None
    if changed:
        raise BadInput(f"{path} holds samples that differ in {changed[0]}; say --fresh to begin it again.")
    with atomic(path) as partial:
        partial.write_text("".join(json.dumps(x) + "\n" for x in (header, *lines.values())), encoding="utf-8")
    return lines


def bench_results(task, lines, total, config):
    """What lm-evaluation-harness would write, of samples `lines`; total {subject: questions there are}."""
    parts, results = total if len(total) > 1 else (), {}
    groups = {task: lines} | {f"{task}_{s}": [line for line in lines if line["subject"] == s] for s in parts}
    there = {task: sum(total.values())} | {f"{task}_{s}": total[s] for s in parts}
    for name, part in groups.items():
        results[name] = {"alias": name}
        for metric, key in ("acc", "correct"), ("acc_norm", "correct_norm"):
            if key in part[0]:
                mean, deviation = spread([x[key] for x in part])
                error = deviation / math.sqrt(len(part)) if len(part) > 1 else None  # of one question: unknown
                results[name] |= {f"{metric},none": mean, f"{metric}_stderr,none": error}
    if len(groups) > 1:
        accuracies = [r["acc,none"] for name, r in results.items() if name != task]
        results[task]["acc_subjects,none"] = float(np.mean(accuracies))
    try:
        git = subprocess.run(["git", "describe", "--always"], cwd=HERE, capture_output=True, text=True).stdout.strip()
    except OSError:  # there is no git
        git = ""
    return {
        "results": results, "n-shot": dict.fromkeys(groups, config["shots"]),
        "n-samples": {name: {"original": there[name], "effective": len(part)} for name, part in groups.items()},
        "config": config, "git_hash": git or None, "date": time.time(),
    }  # fmt: skip


def measure(run, model, tokenizer, variant, prompts, path, lines):
    """Ask what is not in `lines` {(subject, id): sample}; each sample joins them and the file at once."""
    by_module = {}
    for p in prompts:
        module = run.router.route(np.array([p.own]))[0] if variant == "routed" else variant
        by_module.setdefault(module if run and module in run.names else None, []).append(p)
    bar = tqdm(total=len(prompts), initial=len(lines), desc=path.stem, leave=False, disable=None)
    with open(path, "a", encoding="utf-8") as file, bar:
        for module, some in by_module.items():
            for part in answers(model, tokenizer, some, run.module(module) if module else None, lines):
                for p, found in part:
                    about = dict(subject=p.item.subject, id=p.item.id, shots=p.shots, prompt_tokens=len(p.ids))
                    lines[p.key] = about | dict(module=module) | found
                    file.write(json.dumps(lines[p.key]) + "\n")
                    file.flush()
                    bar.update()


def bench(args):
    """Measure a run or a Hugging Face folder on a task: a table on the screen, results and samples in files."""
    if (args.limit is not None and args.limit < 1) or (args.shots or 0) < 0:
        raise BadInput("give a --limit of at least 1 and --shots of at least 0.")
    folder, run = model_folder(args.run), None
    if (folder / "settings.json").exists() or not (folder / "config.json").exists():
        run = Run(folder, args.device)
    device, tokenizer = pick_device(args.device), run.tokenizer if run else Tokenizer.from_folder(folder)
    dtype = run.dtype if run else pick_dtype("auto", device)
    possible = ["unpruned"] + (["backbone"] if run else []) + (["routed", *run.names] if run and run.names else [])
    if unknown := [name for name in args.on or () if name not in possible]:
        raise BadInput(f"--on cannot be {unknown[0]!r}; {folder} has {', '.join(possible)}.")
    items = benchmarks.load_items(args.task, args.rows, args.subjects, args.shots)
    subjects = benchmarks.by_subject(items)
    total = {subject: len(some) for subject, some in subjects.items()}
    taken = run.settings.kv_tokens if run and run.names else 0  # the same prompts for every variant
    room = read_config(folder / "backbone" if run else folder).max_position_embeddings - taken
    kept = [item for some in subjects.values() for item in some[: args.limit]]
    prompts = [benchmarks.encode(item, tokenizer, room) for item in kept]
    asked = [(p.item.subject, p.item.id, p.ids, p.options, p.item.right) for p in prompts]
    out = args.out or (folder / "bench" if run else Path("out/bench", args.run.resolve().name))
    rows = {}
    for variant in args.on or possible[:3]:
        model = load(run.settings.model if run else folder, dtype, device) if variant == "unpruned" else run.backbone
        attached = run.names if run and variant == "routed" else [variant] if run and variant in run.names else []
        config = dict(
            modules={name: hashlib.sha256(run.module_path(name).read_bytes()).hexdigest()[:16] for name in attached},
            task=args.task, variant=variant, model=str(folder.resolve()),
            backbone=model.config.raw.get("koff_fingerprint"), dtype=str(dtype).removeprefix("torch."),
            limit=args.limit, subjects=args.subjects, shots=len(items[0].shots),
            questions=hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16],
        )  # fmt: skip
        path = out / f"{args.task}-{variant}.jsonl"
        lines = finished_samples(path, config, args.fresh)
        measure(run, model, tokenizer, variant, prompts, path, lines)
        results = bench_results(args.task, [lines[p.key] for p in prompts], total, config)
        save(out, {f"{path.stem}.json": results})
        found, rows[variant] = results["results"][args.task], {}
        for name in ("acc", "acc_norm", "acc_subjects"):
            if (x := found.get(f"{name},none")) is not None:
                error = found.get(f"{name}_stderr,none")
                rows[variant][name] = f"{x:.4f}" + ("" if error is None else f" +/- {error:.4f}")
    columns = [{"acc_subjects": "mean of the subjects' acc"}.get(name, name) for name in rows[variant]]
    text = table("", columns, {name: list(row.values()) for name, row in rows.items()})
    print(f"\n{args.task}, {len(prompts)} questions, {config['shots']} shots\n\n{text}\n\nsaved in {out}")
