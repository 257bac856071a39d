"""Evaluate a finished run, or generate text with it.

python eval.py report out/handbook                                  the tables: screen, report.md, results.json
python eval.py compare out/handbook out/seed1                       one table of several runs
python eval.py lape out/handbook                                    are neurons of one language those that are closed?
python eval.py probes out/handbook                                  how far the backbone's hidden states moved
python eval.py bench out/smollm2-12 mmlu --rows DIR                 benchmarks: the unpruned model, backbone, modules
python eval.py plot out/handbook                                    pictures of what train.py, report and lape saved
python eval.py generate out/handbook "Der Kernel" --module german   one module by name; without --module: routed
python eval.py chat out/handbook                                    a conversation; /domain changes the module
python eval.py export out/handbook hf                               for transformers; peft: one adapter for each module
python eval.py modules out/handbook                                 what it holds; rename and remove change it

`python train.py --dry-run` prints what `dry_run` here finds out about a run before it begins.
"""

import argparse
import contextlib
import hashlib
import json
import math
import re
import subprocess
import sys
import time
import weakref
from codecs import getincrementaldecoder
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry
from tqdm import tqdm

import koff
from data import BadInput, atomic, benchmarks, checkpoint, run_script
from data.chat import ChatTemplate
from data.checkpoint import load, load_gates, load_module, read_config
from data.corpus import domain_name, find_domains, load_text, read_documents, read_text, windows
from data.download import located
from data.pictures import plot, spread
from data.recipes import HERE, Settings
from data.router import Router
from data.tokenizer import Tokenizer
from model import BlockMemory, Cache, Model
from train import Trainer, fitting, pick_device, pick_dtype, reading

# Before a run: what it will need -------------------------------------------------------------------------------------


class Peak(TorchDispatchMode):
    """Counts the bytes of all tensors that are made under it, those alive `now` and the most that ever were, and the
    floating-point operations, two for each multiply-add of a matrix product."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.alive, self.operations = 0, 0, set(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if formula := flop_registry.get(function._overloadpacket):
            self.operations += formula(*args, **(kwargs or {}), out_val=out)
        for storage in (x.untyped_storage() for x in tree_iter(out) if isinstance(x, torch.Tensor)):
            if (key := storage._cdata) not in self.alive:  # neither a view nor written in place
                self.alive.add(key)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.gone, key, storage.nbytes())
        return out

    def gone(self, key, size):
        self.alive.discard(key)
        self.now -= size


def dry_run(s):
    """Print the sizes and the memory of the run `s`, from config.json alone: its steps run on tensors without numbers.

    Returns the exit status, 0.
    """
    config, gates = fitting(s)
    domains = len(find_domains(s.data, s.domains)) if Path(s.data).is_dir() else 2
    torch.manual_seed(s.seed)
    gates.spread({name: torch.rand(a.shape) for name, a in gates.log_alpha.items()})  # chance decides what closes
    mask = gates.final_mask(s.sparsity, s.count, s.budget, s.multiple)
    physical, paper = (gates.sparsity(mask, count).item() for count in ("physical", "paper"))
    kept = koff.kept_channels(mask, config, gates.first, "cpu")
    with torch.device("meta"):
        model = Model(config).to(pick_dtype(s.dtype, torch.device("cuda")))
    shapes = {name: (p.shape, p.dtype) for name, p in model.state_dict().items()}
    with FakeTensorMode(allow_non_fake_inputs=True), Peak() as size:
        model.load_state_dict({n: torch.empty(shape, dtype=d) for n, (shape, d) in shapes.items()}, assign=True)
        weights = size.now
        trainer = Trainer(model.requires_grad_(False), replace(s, budget="global", compile=False), ["one"])
        tokens = torch.zeros(s.batch, s.seq_len, dtype=torch.int64)

        def step():
            size.peak, size.operations, before = size.now, 0, size.now
            trainer.step(tokens, "one", 0)
            return size.peak - before, size.operations

        step()  # the first one makes AdamW's state
        (sampled, operations), before = step(), size.now
        trainer.mask, trainer.kept, trainer.student = mask, kept, koff.compact(model, kept)  # as `close` does
        small = size.now - before
        fixed, fewer = step()
        fixed += small
    gate, module = (sum(p.numel() for p in part.parameters()) for part in (trainer.gates, trainer.memories))
    gated = gates.removed({name: torch.zeros(a.shape) for name, a in gates.log_alpha.items()}, "physical")
    trained = gate + domains * module
    there = gate + (1 if s.offload else domains) * module
    where = f"in {s.blocks} of {config.num_hidden_layers} blocks"
    print(f"{gates.total:,} parameters, {int(gated):,} of them gated, {where}")
    print(f"{module:,} parameters a module, {domains} modules and {gate:,} gates: {trained:,} to train")
    print(f"at the target (closed at random): sparsity {physical:.4f} physical, {paper:.4f} by the paper's count")
    every = s.steps * ((1 - s.fix_mask) * operations + s.fix_mask * (fewer if s.memory else 0))
    what = f"{s.steps:,} steps of {operations / 1e12:.3g} and, once the mask is fixed, {fewer / 1e12:.3g} TFLOP"
    print(f"{every / 1e15:,.3g} PFLOP to train: {s.steps * s.batch * s.seq_len:,} tokens in {what}")
    parts = {f"weights, {model.head.dtype}": weights, "memories and gates, float32": 4 * there}
    parts |= {"their AdamW state": 8 * there, f"one step of {s.batch} x {s.seq_len} tokens, gates sampled": sampled}
    parts["or, once the mask is fixed, the compact student and its step"] = fixed
    parts["peak memory"] = weights + 12 * there + max(sampled, fixed)
    for name, b in parts.items():
        print(f"{b / 1e9:9.3f} GB  {name}")
    return 0


# After it ------------------------------------------------------------------------------------------------------------


class Run:
    """A saved run, as its folder has it: settings, compact backbone, modules, router. Needs no base checkpoint."""

    def __init__(self, folder, device="auto", dtype=None):
        self.folder = Path(folder)
        self.settings = Settings.from_file(self.folder / "settings.json")
        if not (self.folder / "router.safetensors").exists():  # the last part that train.py saves
            raise BadInput(f"{self.folder} is not finished; continue it with the train.py command that began it.")
        self.device = pick_device(device)
        self.dtype = dtype or pick_dtype(self.settings.dtype, self.device)
        self.tokenizer = Tokenizer.from_folder(self.folder / "backbone")
        self.router = Router.load(self.folder / "router.safetensors")
        self.names = [name for name in self.router.domains if self.module_path(name).exists()]
        self.loaded = {}

    @cached_property
    def backbone(self):
        return load(self.folder / "backbone", self.dtype, self.device)

    def module_path(self, name):
        return self.folder / "modules" / f"{name}.safetensors"

    def module(self, name):
        if name not in self.names:
            raise BadInput(f"{self.folder} has no module {name!r}; it has {', '.join(self.names) or 'none'}.")
        if name not in self.loaded:
            config = read_config(self.folder / "backbone")
            self.loaded[name] = load_module(self.module_path(name), config, self.dtype, self.device)
        return self.loaded[name]

    @property
    def modules(self):
        """{domain: {block: BlockMemory}}, all of them."""
        return {name: self.module(name) for name in self.names}

    def gates(self, base):
        """The learnt gates, and the final mask {name: bool [N, channels]}."""
        s = self.settings
        gates = koff.Gates(base.config, s.first(len(base.layers))[0], s.granularity, s.beta_end or s.beta, s.gated)
        return gates, load_gates(self.folder / "gates.safetensors", gates)


def opened(folder, device="auto"):
    """What an evaluation looks at: the run, its unpruned model, its text {domain: Split}."""
    run = Run(folder, device)
    s, base = run.settings, load(run.settings.model, run.dtype, run.device)
    how = reading(run.folder, run.tokenizer, base.config, run.folder / "backbone")
    how["need"] = (0, max(s.eval_len, Router.WINDOW))
    return run, base, {name: load_text(path, **how) for name, path in texts_of(run).items()}


def texts_of(run):
    """{domain: path of its text}: in the folder that the run was trained on, or where a later domain was found."""
    there, names = find_domains(run.settings.data) | run.router.paths, run.names or run.router.domains
    if missing := [name for name in names if name not in there]:
        raise BadInput(f"{run.settings.data} has no {missing[0]}, on which {run.folder} was trained.")
    return {name: Path(there[name]) for name in names}


@torch.no_grad()
def losses(variants, tokens, first, size=8):
    """{name: (model, memory)}, tokens [n, T] -> {name: [n]}: summed next-token loss of each window, float64, in nats.

    Blocks below `first` are the same in all variants and run once.
    """
    out = {name: [] for name in variants}
    for part in tokens.split(size):
        some = next(iter(variants.values()))[0]
        shared = some.run(some.embed_tokens(part), 0, first)
        for name, (model, memory) in variants.items():
            hidden = model.run(shared, first, len(model.layers), memory=memory)
            hidden, targets = hidden.narrow(1, 0, part.shape[1] - 1), part.narrow(1, 1, part.shape[1] - 1)
            for h, y in zip(hidden, targets, strict=True):  # one row's logits at a time
                out[name].append(koff.next_token(model.logits(h), y)[0].double())
    return {name: torch.stack(column) for name, column in out.items()}


def perplexities(run, base, domains):
    """Two tables, {variant: {domain: perplexity}} and {domain: {module: perplexity}}."""
    s = run.settings
    _, _, first = s.first(len(base.layers))
    variants = {"": (base, None), None: (run.backbone, None)}  # the unpruned model; no module; and each domain's own
    variants |= {name: (run.backbone, module) for name, module in run.modules.items()}
    table, swap = {name: {} for name in ("unpruned", "backbone", "koff", "routed")}, {}
    for domain, split in domains.items():
        x = windows(split.heldout, s.eval_len, s.eval_windows)
        nll = losses(variants, torch.from_numpy(x).to(run.device), first)
        nll = {name: values.cpu().numpy() for name, values in nll.items()}
        chosen = [name if name in run.names else None for name in run.router.route(x)]

        def ppl(values, x=x):
            return math.exp(float(np.sum(values)) / (x.shape[0] * (x.shape[1] - 1)))

        table["unpruned"][domain], table["backbone"][domain] = ppl(nll[""]), ppl(nll[None])
        if run.names:
            table["koff"][domain] = ppl(nll[domain])
            table["routed"][domain] = ppl([nll[name][i] for i, name in enumerate(chosen)])
            swap[domain] = {name: ppl(nll[name]) for name in run.names}
    return table, swap


def router_quality(run, domains):
    """Accuracy on held-out windows of 50 tokens, share of them called unsure, and that of other languages' text."""
    right, unsure = [], []
    for domain, split in domains.items():
        x = windows(split.heldout, run.router.WINDOW)
        right += [run.router.domains[best] == domain for best in run.router.scores(x).argmax(1)]
        unsure += [name is None for name in run.router.route(x)]
    quality = {"accuracy": float(np.mean(right)), "unsure": float(np.mean(unsure)), "windows": len(right)}
    if Path(run.settings.data).resolve() == HERE / "data/handbook":
        texts, _ = read_documents(HERE / "data/other_languages.jsonl")
        x = np.concatenate([windows(np.array(run.tokenizer.encode(text)), run.router.WINDOW) for text in texts])
        unsure = [name is None for name in run.router.route(x)]
        quality |= {"unsure_other_languages": float(np.mean(unsure)), "other_windows": len(x)}
    return quality


def sparsity(run, base):
    """Both counts, exact, and the expected one that training aimed at; the closed share per block and projection."""
    s, (gates, mask) = run.settings, run.gates(base)
    total = {count: gates.sparsity(mask, count).item() for count in ("physical", "paper")}
    total["expected"] = gates.sparsity(count=s.count).item()
    closed = {n: (1 - mask[n].double().mean(1)).tolist() for n in gates.log_alpha}
    layers = {gates.first + i: {n: row[i] for n, row in closed.items()} for i in range(s.blocks)}
    return total, layers, koff.ledger(gates.total, round(total["physical"] * gates.total), run.modules)


def table(corner, columns, rows):
    """A Markdown table that also reads well on a screen; rows {label: [text]}."""
    lines = [[corner, *columns], *([label, *row] for label, row in rows.items())]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines = [[f"{t:>{w}}" if i else f"{t:<{w}}" for i, (t, w) in enumerate(zip(x, widths, strict=True))] for x in lines]
    rule = "|" + "-" * (widths[0] + 2) + "".join("|" + "-" * (w + 1) + ":" for w in widths[1:]) + "|"
    head, *body = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([head, rule, *body])


def ratios(results):
    """{variant: [perplexity / that of the unpruned model, one per domain]} of the results of a run."""
    p = results["perplexity"]
    return {v: [x / p["unpruned"][d] for d, x in row.items()] for v, row in p.items() if row}


def report(results):
    """results.json as text."""
    p, swap, label = results["perplexity"], results["swap"], {"backbone": "backbone alone"}
    label |= {"koff": "KOFF, matching module", "routed": "KOFF, routed module", "pruned": "pruning only, its own run"}
    rows = {}
    for v, ratio in ratios(results).items():
        end = [f"{np.mean(ratio):.3f} x", f"{max(ratio):.3f} x"]
        rows[label.get(v, v)] = [f"{x:.2f}" for x in p[v].values()] + end
    text = ["## Held-out perplexity", table("", [*p["unpruned"], "mean ratio", "worst"], rows)]
    if swap:
        rows = {}
        for d, row in swap.items():
            best = min(row, key=row.get)
            rows[d] = [f"{x:.2f}{'*' if m == best else ' '}" for m, x in row.items()]
        text += ["## Swap matrix: text of the row, module of the column, * the best", table("", list(row), rows)]
    if len(swap) > 1:
        held = {"unpruned": p["unpruned"], "own module": p["koff"], "no module": p["backbone"]}
        others = {d: [x for m, x in row.items() if m != d] for d, row in swap.items()}
        held |= {f"others, {n}": {d: f(x) for d, x in others.items()} for n, f in (("mean", np.mean), ("worst", max))}
        held |= {"pruning only": p["pruned"]} if "pruned" in p else {}
        rows = {d: [f"{column[d]:.2f}" for column in held.values()] for d in swap}
        text += ["## What a module holds: perplexity with it, with none, with another's", table("", list(held), rows)]
    r, led, s = results["router"], results["ledger"], results["sparsity"]
    if "wrong_route_cost" in r:
        text += [f"The wrong module costs a factor of {r['wrong_route_cost']:.3f} on average."]
    line = f"Router: accuracy {r['accuracy']:.4f} on {r['windows']} held-out windows of 50 tokens"
    line += f", {r['unsure']:.1%} of them called unsure"
    if "unsure_other_languages" in r:
        line += f"; unsure on {r['unsure_other_languages']:.1%} of {r['other_windows']} windows in other languages"
    text += ["## Router and ledger", line + "."]
    line = f"Sparsity: {s['physical']:.4f} physical (parameters gone / all), "
    text += [line + f"{s['paper']:.4f} by the paper's count (closed channels x fan-in / all)."]
    size = {name: f"{led[name]:,} ({led[f'{name}_bytes']:,} bytes" for name in ("removed", "one_module", "all_modules")}
    line = f"Of {led['total']:,} parameters {size['removed']}) were removed; one module has {size['one_module']}, "
    text += [line + f"{led['one_module_share']:.0%} of what was removed); all modules {size['all_modules']})."]
    gated = list(next(iter(results["layers"].values())))
    rows = {f"block {i}": [f"{x:.1%}" for x in row.values()] for i, row in results["layers"].items()}
    text += ["## Closed channels per block and projection", table("", gated, rows)]
    return "\n\n".join(text) + "\n"


def save(folder, files, show=True):
    """Write {name: text, or what becomes JSON} into the folder, and show the texts."""
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content, indent=1) + "\n"
        with atomic(Path(folder, name)) as partial:
            partial.write_text(text, encoding="utf-8")
        if show and text is content:
            print("\n" + text)


def saved_results(folder):
    """results.json of a finished run."""
    path = Path(folder, "results.json")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not {"perplexity", "swap", "sparsity", "settings"} <= found.keys():
            raise ValueError("it is of another version")
        return found
    except (OSError, ValueError, AttributeError) as error:
        raise BadInput(f"{path} cannot be read ({error}); name runs that train.py has finished.") from None


def evaluate(folder, begun=None, device="auto"):
    """All tables of the run: screen, report.md, results.json. `begun`: when it began; None: long ago."""
    run, base, domains = opened(folder, device)
    before = saved_results(folder) if not begun and Path(folder, "results.json").exists() else {}
    perplexity, swap = perplexities(run, base, domains)
    if (beside := before.get("perplexity", {}).get("pruned", {})).keys() == domains.keys():
        perplexity["pruned"] = {d: beside[d] for d in domains}
    total, layers, led = sparsity(run, base)
    size = getattr(torch, run.backbone.config.raw["dtype"]).itemsize
    led |= {f"{name}_bytes": led[name] * size for name in ("removed", "one_module", "all_modules")}
    router = router_quality(run, domains)
    if len(swap) > 1:
        wrong = [x / row[d] for d, row in swap.items() for m, x in row.items() if m != d]
        router["wrong_route_cost"] = math.exp(np.mean(np.log(wrong)))
    results = {
        "perplexity": perplexity, "swap": swap, "sparsity": total, "router": router, "ledger": led,
        "layers": layers, "settings": asdict(run.settings),
        "seconds": round(time.time() - begun, 1) if begun else before.get("seconds", 0.0),
    }  # fmt: skip
    save(run.folder, {"report.md": report(results), "results.json": results})


def report_again(args):
    """All tables again; --beside: those that were saved, and the perplexity of a pruning-only run in them."""
    if args.beside is None:
        return evaluate(args.run, device=args.device)
    results, other = saved_results(args.run), saved_results(args.beside)["perplexity"]
    own, its = results["perplexity"]["unpruned"], other["unpruned"]
    if other["koff"] or own.keys() != its.keys() or any(abs(its[d] / x - 1) > 1e-3 for d, x in own.items()):
        raise BadInput(f"{args.beside} is no pruning-only run of {args.run}'s model and text; train it: --no-memory.")
    results["perplexity"]["pruned"] = {d: other["backbone"][d] for d in own}
    save(args.run, {"report.md": report(results), "results.json": results})


def summary(folder):
    """The figures of a finished run that tables of several runs show: {column: number, None where it has none}.

    backbone, KOFF and routed are means over domains of perplexity / unpruned; settled is the step at which the gates
    had closed, in expectation, 95% of what is closed in the end, if they did before the mask was fixed.
    """
    r, log = saved_results(folder), Path(folder, "log.jsonl")
    ratio, swap = ratios(r), r["swap"]
    mean = {v: float(np.mean(x)) for v, x in ratio.items()}
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    count, learnt = r["settings"]["count"], r["settings"]["steps"] * (1 - r["settings"]["fix_mask"])
    lines = [line for line in lines if line["step"] < learnt]  # then the mask was fixed
    settled = [line["step"] for line in lines if line[count] >= 0.95 * r["sparsity"][count]]
    return {
        **r["sparsity"], "backbone": mean["backbone"], "koff": mean.get("koff"), "routed": mean.get("routed"),
        "worst": max(ratio["koff"]) if swap else None,
        "diagonal": float(np.mean([min(row, key=row.get) == d for d, row in swap.items()])) if swap else None,
        "router": r["router"]["accuracy"], "settled": settled[0] if settled else None, "minutes": r["seconds"] / 60,
    }  # fmt: skip


def together(folders):
    """The `summary` of several runs: {column: [one value per run], None where a run has none}."""
    every = [summary(folder) for folder in folders]
    return {key: None if any(one[key] is None for one in every) else [one[key] for one in every] for key in every[0]}


def side_by_side(rows):
    """{label: `together`} as a table; several runs of a row (seeds) as mean +/- sample deviation."""
    columns = list(dict.fromkeys(key for row in rows.values() for key, values in row.items() if values))

    def cell(values):
        if values is None:
            return "-"
        mean, deviation = spread(values)
        return f"{mean:.3f}" + (f" +/- {deviation:.3f}" if deviation >= 0.0005 else "")

    return table("", columns, {label: [cell(row.get(key)) for key in columns] for label, row in rows.items()})


def compare(args):
    """One row per finished run; seeds of one run get a mean."""
    rows = {str(folder): together([folder]) for folder in args.runs}
    settings = [{**saved_results(folder)["settings"], "seed": None} for folder in args.runs]
    if len(rows) > 1 and settings.count(settings[0]) == len(settings):
        rows["mean +/- std"] = together(args.runs)
    print(side_by_side(rows))


def save_sweep(out, name, runs):
    """Write the table of a sweep, {label: [folder, one per seed]}: sweep.md to read, sweep.json for the pictures."""
    rows = {label: together(folders) for label, folders in runs.items()}
    text = f"## Sweep {name}\n\n{side_by_side(rows)}\n"
    rows = {label: {"runs": [str(folder) for folder in runs[label]]} | row for label, row in rows.items()}
    save(out, {"sweep.md": text, "sweep.json": {"sweep": name, "rows": rows}}, show=False)


# Analyses ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def activations(model, tokens, name, size=8):
    """tokens [n, T] -> int64 [N, F]: at how many of them silu(gate) > 0, that is gate > 0, in block and neuron."""
    counts = torch.zeros(len(model.layers), model.config.intermediate_size, dtype=torch.int64, device=tokens.device)
    with contextlib.ExitStack() as hooks:
        for row, block in zip(counts, model.layers, strict=True):

            def count(module, inputs, gate, row=row):
                row += (gate > 0).sum((0, 1))

            hooks.enter_context(block.mlp.gate_proj.register_forward_hook(count))
        for part in tqdm(tokens.split(size), desc=name):
            model.hidden(part)
    return counts


def lape(args):
    """Does the mask close the neurons that few domains use? Counted on --tokens of each domain's training text."""
    run, base, domains = opened(args.run, args.device)
    length, (gates, mask) = run.settings.seq_len, run.gates(base)
    if args.tokens < length or len(domains) < 2 or not {"neuron", "gate"} & set(mask):
        raise BadInput(f"{args.run}: lape needs gates on the MLP, two domains and --tokens of at least {length}.")
    x = {d: windows(split.train, length, args.tokens // length) for d, split in domains.items()}
    counts = torch.stack([activations(base, torch.from_numpy(w).to(run.device), d).cpu() for d, w in x.items()])
    seen = torch.tensor([w.size for w in x.values()])
    with atomic(run.folder / "lape.safetensors") as partial:
        save_file({"counts": counts, "tokens": seen}, partial, {"domains": json.dumps(list(x))})
    entropy, specific = koff.lape(counts, seen)
    closed = koff.closed_by_entropy(entropy[gates.first :], mask)
    own = {d: {"tokens": w.size, "specific": int(of.sum())} for (d, w), of in zip(x.items(), specific, strict=True)}
    never, one = int((counts[:, gates.first :].sum(0) == 0).sum()), int(specific.any(0).sum())
    rows = {d: [f"{n:,}" for n in row.values()] for d, row in own.items()} | {"neurons, each once": ["", f"{one:,}"]}
    shares = {name: [f"{x:.1%}" for x in row.values()] for name, row in closed.items()}
    groups = ["15% most specific", "15% most general", "all: local sparsity"]
    text = ["## LAPE: language-specific neurons of the unpruned model", table("", ["tokens", "neurons"], rows)]
    text += [f"## P(closed) in blocks {gates.first} to {len(base.layers) - 1}", table("", groups, shares)]
    text += [f"{never:,} neurons there are never active, which counts as specific.\n"]
    found = {"domains": own, "specific": one, "never_active": never, "closed": closed}
    save(run.folder, {"lape.md": "\n\n".join(text), "lape.json": found})


@torch.no_grad()
def embeddings(model, ids, name, size=64):
    """ids [n, T] -> float32 [n, D]: mean over a text's tokens of the hidden states after the last norm."""
    states = (model.hidden(part) for part in tqdm(ids.split(size), desc=name))
    return torch.cat([model.norm(x).float().mean(1) for x in states]).cpu()


def probes(args, k=10):
    """Is the backbone without a module still the model that it was? At most --texts held-out windows of each domain."""
    run, base, domains = opened(args.run, args.device)
    x = {d: windows(split.heldout, Router.WINDOW, max(0, args.texts)) for d, split in domains.items()}
    if len(x) < 2 or min(map(len, x.values())) <= k:
        raise BadInput(f"{args.run}: probes needs two domains and over {k} texts of each; raise --texts or add text.")
    ids = torch.from_numpy(np.concatenate(list(x.values()))).to(run.device)
    label = torch.arange(len(x)).repeat_interleave(torch.tensor([len(w) for w in x.values()]))
    a, b = embeddings(base, ids, "unpruned"), embeddings(run.backbone, ids, "backbone")
    centroid, found = koff.centroid_cosine(a, b, label), {}
    parts = {d: label == i for i, d in enumerate(x)} | {"all texts": label >= 0}
    for (d, own), c in zip(parts.items(), [*centroid.tolist(), centroid.mean().item()], strict=True):
        u, v = a[own], b[own]
        found[d] = dict(texts=len(u), cka=koff.cka(u, v), knn=koff.knn_overlap(u, v, k), centroid=c)
    rows = {d: [str(f["texts"]), *(f"{f[m]:.4f}" for m in ("cka", "knn", "centroid"))] for d, f in found.items()}
    text = table("", ["texts", "linear CKA", f"{k}-NN overlap", "centroid cosine"], rows)
    text = f"## The backbone without a module against the unpruned model\n\n{text}\n"
    save(run.folder, {"probes.md": text, "probes.json": found})


# Benchmarks ----------------------------------------------------------------------------------------------------------

ROOM = 2048  # tokens in a batch, at most
STOP = ("\nQ:", "\nQuestion:")  # a model that goes on with the next question has answered


def remember(model, ids, memory=None):
    """The memory {block: BlockMemory} with which text goes on after `ids`: computed once, shared by a batch."""
    if not ids:
        return memory
    cache, tokens, own = Cache(0), torch.tensor([ids], device=model.head.device), memory or {}
    model.hidden(tokens, memory=memory, cache=cache)
    return {i: BlockMemory(own[i].lora if i in own else {}, k[0], v[0]) for i, (k, v) in cache.layers.items()}


def after(model, rows, read, memory):
    """rows: lists of ids -> one [read[r], V] each: log p of what may follow each of the last read[r] of them.

    Padding on the right is harmless: nothing that is read can see it.
    """
    tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    x = model.hidden(tokens.to(model.head.device), memory=memory)
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
    for new in generate(model, tokens, part[0].item.steps, tokenizer.vocab_size, eos=eos, memory=memory):
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
    folder, run = located(args.run), None
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


# Generation ----------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def generate(model, tokens, steps, vocab_size, eos=(), temperature=0.0, top_p=1.0, memory=None, generator=None):
    """Continue tokens [B, T] (rows of equal length); yield one [B] per step until every row has met an id of `eos`.

    temperature 0 is greedy; `top_p` keeps the smallest set of tokens with that probability. Rows of the vocabulary from
    `vocab_size` on are padding and never sampled. A finished row repeats its eos id.
    """
    (B, T), limit = tokens.shape, model.config.max_position_embeddings
    M = max((block.length for block in (memory or {}).values()), default=0)
    if M + T + steps > limit:
        have = f"{M} memory tokens, {T} of the prompt and {steps} new ones"
        raise BadInput(f"{have} exceed the model's context of {limit}; shorten the prompt or ask for less.")
    cache, stop = Cache(steps), torch.tensor(list(eos), dtype=tokens.dtype, device=tokens.device)
    done, last = torch.zeros(B, dtype=torch.bool, device=tokens.device), tokens[:, -1]
    x = tokens
    for _ in range(steps):
        x = model.hidden(x, memory=memory, cache=cache)
        logits = model.logits(x[:, -1])[:, :vocab_size]  # [B, V]
        if temperature == 0:
            new = logits.argmax(-1)
        else:
            p, order = (logits / temperature).softmax(-1).sort(dim=-1, descending=True)
            p[:, 1:] = p[:, 1:].masked_fill((p.cumsum(-1) - p)[:, 1:] >= top_p, 0)  # the first token always stays
            new = order.gather(1, torch.multinomial(p, 1, generator=generator))[:, 0]
        last = torch.where(done, last, new)
        done = done | torch.isin(last, stop)
        yield last
        if done.all():
            return
        x = last[:, None]


def picked(run, text, name=None):
    """(module, its name and why): the one of that name, or the router's choice for the text, None if unsure."""
    if name:
        return run.module(name), name
    if not run.names:
        return None, "none in this run"
    if not (ids := np.array(run.tokenizer.encode(text))).size:
        raise BadInput("the prompt is empty; give some text.")
    (sure,), (best, p) = run.router.route(ids[None]), run.router.best(ids)
    if sure not in run.names:
        return None, f"none, the router is unsure ({best} would be the first choice)"
    return run.module(sure), f"{sure}, the router's choice ({p:.1%})"


def check_sampling(args):
    if args.temperature < 0 or not 0 < args.top_p <= 1 or args.tokens < 1:
        raise BadInput("give a --temperature of at least 0, a --top-p above 0 and up to 1, and --tokens of at least 1.")


def stream(run, text, memory, args):
    """Yield what the model writes after `text`, whole characters as they come."""
    ids, eos = run.tokenizer.encode(text, bos=True), run.backbone.config.eos_token_ids
    if not ids:
        raise BadInput("the prompt is empty; give some text.")
    generator, tokens = torch.Generator(run.device).manual_seed(args.seed), torch.tensor([ids], device=run.device)
    how = dict(eos=eos, temperature=args.temperature, top_p=args.top_p, memory=memory, generator=generator)
    decoder = getincrementaldecoder("utf-8")("replace")
    for token in generate(run.backbone, tokens, args.tokens, run.tokenizer.vocab_size, **how):
        if token.item() not in eos:
            yield decoder.decode(run.tokenizer.decode_bytes([token.item()]))
    yield decoder.decode(b"", final=True)


def continue_text(args):
    """Continue a prompt on the screen, or every prompt of a file as a line of JSON."""
    check_sampling(args)
    run, file = Run(args.run, args.device), args.prompt.startswith("@")
    for prompt in read_prompts(Path(args.prompt[1:])) if file else [args.prompt]:
        memory, why = picked(run, prompt, args.module)
        pieces = stream(run, prompt, memory, args)
        if file:
            line = dict(prompt=prompt, module=why, text="".join(pieces))
            print(json.dumps(line, ensure_ascii=False), flush=True)
            continue
        print(f"[module: {why}]", file=sys.stderr)
        print(prompt, end="")
        for piece in pieces:
            print(piece, end="", flush=True)
        print()


def read_prompts(path):
    """The prompts of a file: its lines, or the "prompt" of each line of a .jsonl."""
    if path.suffix != ".jsonl":
        return [line for line in read_text(path).split("\n") if line.strip()]
    return [benchmarks.columns(row, where, prompt=str)[0] for where, row in benchmarks.rows_of(path)]


def chat(args):
    """A conversation. Each answer is made of all that was said, so that the module can change at any time."""
    check_sampling(args)
    run = Run(args.run, args.device)
    template, messages, name = ChatTemplate.from_folder(run.folder / "backbone"), [], args.module
    if name:
        run.module(name)
    print(f"/domain {'|'.join([*run.names, 'auto'])}, /reset, /quit", file=sys.stderr)
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return
        command, *rest = line.split() or [""]
        if command == "/quit":
            return
        if command == "/reset":
            messages = []
        elif command == "/domain" and rest in [["auto"], *([other] for other in run.names)]:
            name = None if rest == ["auto"] else rest[0]
            print(f"[{rest[0]}: the {len(messages)} messages so far will be encoded again under it]", file=sys.stderr)
        elif command.startswith("/"):
            print(f"[{line} is no command, or {run.folder} has no such module]", file=sys.stderr)
        elif line:
            messages.append({"role": "user", "content": line})
            said, answer = "\n".join(m["content"] for m in messages if m["role"] == "user"), ""
            # A base model has no template: it gets lines of text.
            text = template(messages, answer=True) if template else "".join(m["content"] + "\n" for m in messages)
            try:
                memory, why = picked(run, said, name)
                print(f"[module: {why}]", file=sys.stderr)
                for piece in stream(run, text, memory, args):
                    print(piece, end="", flush=True)
                    answer += piece
            except BadInput as error:  # longer than the context, or nothing that the vocabulary has
                print(f"[{error} /reset begins again.]", file=sys.stderr)
                messages.pop()
                continue
            print()
            messages.append({"role": "assistant", "content": answer})


# The modules of a run ------------------------------------------------------------------------------------------------


def list_modules(args):
    run = Run(args.run, "cpu")
    s, rows = run.settings, {}
    for name, blocks in run.modules.items():
        shape = [str(s.rank), str(s.kv_tokens), f"{min(blocks)} to {max(blocks)}", f"{koff.parameters_of(blocks):,}"]
        rows[name] = [*shape, str(run.router.paths.get(name, s.data))]
    print(table("", ["LoRA rank", "KV tokens", "blocks", "parameters", "text"], rows))


def change_module(args):
    """Remove a module, or give it another name.

    A module is one whose file and whose row of the router are there: wherever this is interrupted, it has one name.
    """
    run, old, new = Run(args.run, "cpu"), args.module, args.name if args.command == "rename" else None
    path, router = run.module_path(old), run.router
    run.module(old)
    if new is None:
        if len(run.names) == 1:
            raise BadInput(f"{old} is the only module of {run.folder}; delete the folder instead.")
        router.remove(old)
    else:
        renamed = run.module_path(new)
        if domain_name(renamed) != new or new in router.domains:
            raise BadInput(f"{run.folder} cannot have another module {new!r}; give a new name.")
        router.paths[new] = router.paths.pop(old, None) or str(texts_of(run)[old].resolve())
        router.domains[router.domains.index(old)] = new
        with atomic(renamed) as partial:
            partial.write_bytes(path.read_bytes())
    router.save(run.folder / "router.safetensors")
    path.unlink()
    print(f"{run.folder} holds {', '.join(router.domains)}; eval.py report {run.folder} makes its tables again.")


# Export --------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def export(args):
    """Write a run as other libraries read it, read it again, and compare it with the run before it gets its name."""
    run = Run(args.run, "cpu", torch.float32)
    small, kind = run.backbone, f"{args.form}-{args.module}" if args.module else args.form
    if (out := args.out or run.folder / "export" / kind).exists():
        raise BadInput(f"{out} is there already; remove it or name another --out.")
    kept = koff.kept_channels(run.gates(small)[1], small.config, run.settings.first(len(small.layers))[0], "cpu")
    write = export_dense if args.form == "hf" else export_adapters
    with atomic(out) as partial:
        write(partial, run, koff.expand(small, kept), kept, args.module)
    on = "" if args.form == "hf" else f"; for the model that eval.py export {run.folder} hf writes"
    print(f"{out}, read again and compared with the run{on}")


def export_dense(folder, run, dense, kept, module):
    """The `dense` model with zeros for the channels that are not `kept`; a `module`'s LoRA is merged."""
    lora = {i: BlockMemory(m.lora) for i, m in run.module(module).items()} if module else None
    if lora:
        koff.merge(dense, koff.expand_memory(lora, kept, dense.config))
    check("the dense model", run, lora, dense)
    dense = dense.to(getattr(torch, run.backbone.config.raw["dtype"]))
    checkpoint.save_backbone(folder, dense, run.folder / "backbone")
    again = load(folder, dense.head.dtype).state_dict()
    if any(not torch.equal(again[name], t) for name, t in dense.state_dict().items()):
        raise BadInput(f"{folder} was not written as it is; check the disk and try again.")
    if lora and run.settings.kv_tokens:
        print(f"{module}: a checkpoint has no place for its keys and values; what is merged is LoRA.")


def export_adapters(folder, run, dense, kept, module):
    """For each module, or one `module`, a folder of its LoRA and one of its keys and values if all blocks have them."""
    s, base, layers = run.settings, (run.folder / "export/hf").resolve(), len(dense.layers)
    for name in [module] if module else run.names:
        blocks, parts = run.module(name), {}
        if s.rank:
            parts[name] = checkpoint.save_lora, {i: BlockMemory(m.lora) for i, m in blocks.items()}
        if s.kv_tokens and len(blocks) == layers:
            kv = {i: BlockMemory({}, m.keys, m.values) for i, m in blocks.items()}
            parts[f"{name}-kv"] = checkpoint.save_cartridge, kv
        elif s.kv_tokens:
            there = f"{s.kv_tokens} keys and values in {len(blocks)} of {layers} blocks"
            print(f"{name}: peft attaches keys and values to all blocks or none; {there} stay here.")
        for part, (write, memory) in parts.items():
            write(folder / part, koff.expand_memory(memory, kept, dense.config), base)
            check(part, run, memory, dense, checkpoint.load_adapter(folder / part, memory))
    if not folder.exists():
        raise BadInput(f"{run.folder} has nothing that peft could attach; export hf is all that there is.")


def check(what, run, blocks, model, memory=None):
    """BadInput unless `model` with `memory` has the logits of the run with `blocks`, to 1e-4 in float32."""
    tokens = torch.randint(run.tokenizer.vocab_size, (2, 64), generator=torch.Generator().manual_seed(0))
    ours, theirs = run.backbone(tokens, memory=blocks), model(tokens, memory=memory)
    worst, size = (ours - theirs).abs().max().item(), ours.abs().max().item()
    if not worst <= 1e-4 * max(1.0, size):
        raise BadInput(f"{what} differs from the run by {worst:.2g} in a logit of {size:.2g}; it was not kept.")


# The command line ----------------------------------------------------------------------------------------------------


def parse(argv):
    """Command line -> its arguments; `work` among them is the function that does it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name, what, work, device=True, runs=None):
        one = commands.add_parser(name, help=what, description=what)
        one.set_defaults(work=work)
        one.add_argument("runs" if runs else "run", type=Path, nargs=runs)
        if device:
            one.add_argument("--device", default="auto", help="cpu or cuda; auto: cuda where there is one [auto]")
        return one.add_argument

    option = command("report", "evaluate a finished run again", report_again)
    option("--beside", type=Path, help="only add this pruning-only run to the saved tables")
    command("compare", "one table of several finished runs", compare, device=False, runs="+")
    option = command("lape", "which neurons the mask closed: those of few languages, or those of all?", lape)
    option("--tokens", type=int, default=100_000, help="of each domain's training text [100000]")
    option = command("probes", "hidden states of the backbone alone against those of the unpruned model", probes)
    option("--texts", type=int, default=5000, help="held-out windows of 50 tokens a domain [5000]")
    option = command("bench", "measure a run, or a pretrained model's folder, on a benchmark", bench)
    option("task", choices=benchmarks.TASKS)
    option("--rows", required=True, help="file or folder of rows in the Hub's columns (data/prepare.py)")
    option("--on", nargs="+", metavar="WHAT", help="unpruned, backbone, routed or names of modules [the first three]")
    option("--limit", type=int, help="questions of each subject [all]")
    option("--subjects", nargs="+", default=[], metavar="NAME", help="MMLU subjects, BBH or BBL tasks [all]")
    usual = ", ".join(f"{shots} for {task}" for task, (shots, *_) in benchmarks.TASKS.items())
    option("--shots", type=int, help=f"examples before a question [{usual}]")
    option("--fresh", action="store_true", help="begin again, whatever RUN/bench/*.jsonl holds")
    option("--out", type=Path, help="folder of the results [RUN/bench; out/bench/NAME for a model]")
    command("plot", "draw what a run or sweep has saved (needs matplotlib)", lambda a: plot(a.run), device=False)
    for name, what, work, tokens in (
        ("generate", "continue a prompt, or those of a file", continue_text, 64),
        ("chat", "a conversation, whose module can change in the middle", chat, 256),
    ):
        option = command(name, what, work)
        if name == "generate":
            option("prompt", help="text, or @FILE: each of its lines, or of a .jsonl each prompt, as JSON")
        option("--module", help="domain whose module is attached; without it the router picks")
        option("--tokens", type=int, default=tokens, help=f"how many to generate [{tokens}]")
        option("--temperature", type=float, default=0.0, help="0 is greedy [0]")
        option("--top-p", type=float, default=1.0, help="nucleus [1]")
        option("--seed", type=int, default=0)
    option = command("export", "write the run as transformers and peft read it", export, device=False)
    option("form", choices=("hf", "peft"), help="one dense checkpoint, or one adapter for each module on it")
    option("--module", help="hf: merge its LoRA; peft: only this one")
    option("--out", type=Path, help="folder to make [RUN/export/hf, hf-MODULE or peft]")
    command("modules", "list the modules of a run", list_modules, device=False)
    for name, what in ("rename", "give a module another name"), ("remove", "delete a module"):
        option = command(name, what, change_module, device=False)
        option("module")
        if name == "rename":
            option("name", help="its new name")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    stopped = f"the same command {'continues' if args.command == 'bench' else 'begins again'}"
    return run_script("eval.py", lambda: args.work(args), stopped) or 0


if __name__ == "__main__":
    sys.exit(main())
