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
import math
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

import koff
from data import BadInput, benchmarks, run_script
from data.analyses import lape_report, probes
from data.corpus import read_documents, windows
from data.export import export
from data.generate import chat, continue_text
from data.modules import change_module, list_modules
from data.pictures import plot
from data.run import opened
from data.scoring import bench
from data.settings import HERE
from data.tables import ledger, ratios, save, saved_results, side_by_side, table, together

# After it ------------------------------------------------------------------------------------------------------------


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
    return total, layers, ledger(gates.total, round(total["physical"] * gates.total), run.modules)


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


def compare(args):
    """One row per finished run; seeds of one run get a mean."""
    rows = {str(folder): together([folder]) for folder in args.runs}
    settings = [{**saved_results(folder)["settings"], "seed": None} for folder in args.runs]
    if len(rows) > 1 and settings.count(settings[0]) == len(settings):
        rows["mean +/- std"] = together(args.runs)
    print(side_by_side(rows))


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
    option = command("lape", "which neurons the mask closed: those of few languages, or those of all?", lape_report)
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
