"""Evaluate a finished run, or use it.

python eval.py report out/handbook                                  the tables: screen, report.md, results.json
python eval.py perplexity out/handbook news.txt                     any other text, with each module
python eval.py compare out/handbook out/seed1                       several runs in one table
python eval.py lape out/handbook                                    did the mask close language-specific neurons?
python eval.py probes out/handbook                                  how far the backbone's hidden states moved
python eval.py bench out/handbook koff_mmlu --rows DIR              benchmarks: unpruned model, backbone, modules
python eval.py plot out/handbook                                    pictures of the saved results
python eval.py generate out/handbook "Der Kernel" --module german   one module by name; without --module: routed
python eval.py chat out/handbook                                    a conversation; /domain changes the module
python eval.py export out/handbook hf                               for transformers; peft: one adapter per module
python eval.py export out/handbook gguf                             for llama.cpp: the pruned model, adapters
python eval.py remove out/handbook french                           deletes a module

This file measures a finished run: perplexities, the swap matrix, router, ledger, report. The other commands are in
`data/`; the imports say where.
"""

import argparse
import contextlib
import json
import math
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from data import BadInput, fast, run_script
from data.analyses import lape_report, probes
from data.chat import chat, continue_text
from data.corpus import lines_of, trained_on, windows
from data.export import export
from data.harness import bench
from data.later import remove
from data.objectives import token_losses
from data.pictures import plot
from data.run import Run, TextReader, check_complete, held, open_finished, unpruned_model
from data.settings import ROOT, Settings
from data.starts import starting_context
from data.tables import as_saved, ledger, ratios, save, saved_results, side_by_side, table, together

# Perplexity ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def losses_of(variants, x, split):
    """{variant: [n, T - 1]}: `token_losses` of every variant (model, memories) on windows x [n, T].

    The blocks below `split` are the same in all variants and run once.
    """
    parts = {name: [] for name in variants}
    unpruned, _ = variants["unpruned"]
    for tokens in torch.from_numpy(x).to(unpruned.head.device).split(8):  # eight windows at a time
        shared = unpruned.run(unpruned.embed_tokens(tokens), 0, split)
        for name, (model, memories) in variants.items():
            if memories:
                model, memories = fast.merged(model, memories)
            parts[name].append(token_losses(model, memories, shared, split, tokens))
    return {name: torch.cat(parts[name]).cpu().numpy() for name in variants}


def variants_of(run, base):
    """{variant: (model, memories)}: the unpruned model, the backbone alone, the backbone with each module."""
    variants = {"unpruned": (base, None), "backbone": (run.backbone, None)}
    for name, memories in run.modules.items():
        variants[f"module {name}"] = (run.backbone, memories)
    return variants


def perplexities(run, base, text):
    """Three tables: {variant: {domain: perplexity}}, the swap matrix {domain: {module: perplexity}}, and the controls
    {label: {domain: ratio of perplexities}}, see `controls`."""
    # All variants read the same windows: only the model differs.
    s = run.settings
    _, first_memory, first_different = s.first_blocks(len(base.layers))
    variants = variants_of(run, base)
    ppl = {"unpruned": {}, "backbone": {}, "koff": {}, "routed": {}}
    swap = {}
    ratios_of = {}
    for domain, split in text.items():
        x = windows(split.heldout, s.eval_len, s.eval_windows)
        if run.names and s.kv_tokens:
            variants["unpruned, text KV"] = (base, starting_context(base, split.train, s, first_memory))
        losses = losses_of(variants, x, first_different)
        ppl["unpruned"][domain] = perplexity(losses["unpruned"])
        ppl["backbone"][domain] = perplexity(losses["backbone"])
        if not run.names:  # a pruned model without modules
            continue
        swap[domain] = {name: perplexity(losses[f"module {name}"]) for name in run.names}
        ppl["koff"][domain] = swap[domain][domain]  # with its own module
        losses["own"] = losses[f"module {domain}"]
        losses["routed"] = routed(run, losses, x)
        ppl["routed"][domain] = perplexity(losses["routed"])
        losses["routed early"] = routed(run, losses, x[:, : run.router.WINDOW])
        for label, ratio in controls(losses, s.kv_tokens, run.router.WINDOW).items():
            ratios_of.setdefault(label, {})[domain] = ratio
    return ppl, swap, ratios_of


def routed(run, losses, x):
    """The losses [n, T - 1] of n windows, each with the module that the router picks from the tokens x [n, any], or of
    the backbone alone where the router is unsure. losses: those of every variant."""
    picked = []
    for i, name in enumerate(run.router.route(x)):
        variant = f"module {name}" if name in run.names else "backbone"
        picked.append(losses[variant][i])
    return np.stack(picked)


def controls(losses, M, W):
    """How much of a domain's result is due to context: {label: ratio of two perplexities on the same predictions}.

    A KV memory of M tokens of the domain's text is context that the unpruned model lacks. Two controls correct for it:
    the unpruned model gets the same context, or the first M predictions of each window are left out. In two more, the
    router sees only the first W tokens of a window ("routed early"), and these are not scored. losses {variant:
    [n, T - 1]}.
    """
    pairs = {}  # {label: (variant, the first prediction that counts)}
    if M:
        pairs[f"unpruned, with {M} tokens of text as KV memory"] = ("unpruned, text KV", 0)
        pairs[f"KOFF, without the first {M} predictions"] = ("own", M)
    pairs[f"KOFF, routed by the first {W} tokens, these not scored"] = ("routed early", W - 1)
    pairs["KOFF, own module, the same predictions"] = ("own", W - 1)
    ratios = {}
    for label, (variant, start) in pairs.items():
        scored = losses[variant][:, start:]
        if scored.size:  # otherwise the windows are too short
            ratios[label] = perplexity(scored) / perplexity(losses["unpruned"][:, start:])
    return ratios


def other_texts(args):
    """Print the perplexity of any texts: what do pruning and modules change on text from no domain?

    Nothing is held out: the windows are spread over the whole text. Their number is that of the report.
    """
    run = Run(args.run, args.device)
    s = run.settings
    reader = TextReader(run.folder / "backbone", run.config, run.folder)
    columns = []
    texts = []
    for path in args.texts:
        split = reader.read(path, 0, 0)
        x = windows(np.concatenate([split.train, split.heldout]), s.eval_len, s.eval_windows)
        if not len(x):
            raise BadInput(f"{path} is shorter than a window of {s.eval_len} tokens; give a longer text.")
        split.store()
        texts.append(x)
        columns += [path.stem, "ratio"]
    base = unpruned_model(run)
    _, _, first_different = s.first_blocks(len(base.layers))
    variants = variants_of(run, base)
    ppl = {}  # {variant: [perplexity, one per text]}
    for x in texts:
        losses = losses_of(variants, x, first_different)
        if run.names:
            losses["routed"] = routed(run, losses, x)
        for name in losses:
            ppl.setdefault(name, []).append(perplexity(losses[name]))
    rows = {}
    for name, values in ppl.items():
        ratio = np.divide(values, ppl["unpruned"])
        cells = []
        for value, share in zip(values, ratio, strict=True):
            cells += [f"{value:.2f}", f"{share:.3f} x"]
        rows[LABELS.get(name, name)] = [*cells, f"{ratio.mean():.3f} x"]
    print(table("", [*columns, "mean ratio"], rows))


def perplexity(losses):
    """exp of the mean of losses [n, T], in nats."""
    try:
        return math.exp(losses.mean())
    except OverflowError:  # above 709 nats
        return math.inf


# The rest of the report ----------------------------------------------------------------------------------------------


def router_quality(run, text):
    """Accuracy on held-out windows of 50 tokens, and the share of windows on which the router is unsure.

    The accuracy is the mean over domains: a long text counts no more than a short one.
    """
    router = run.router
    accuracies = {}
    unsure = []
    for domain, split in text.items():
        x = windows(split.heldout, router.WINDOW)
        right = [router.domains[best] == domain for best in router.scores(x).argmax(1)]
        accuracies[domain] = float(np.mean(right))
        unsure += [name is None for name in router.route(x)]
    mean = float(np.mean(list(accuracies.values())))
    quality = {"accuracy": mean, "accuracies": accuracies, "unsure": float(np.mean(unsure)), "windows": len(unsure)}
    # The default text comes with sixteen more translations, which belong to none of its domains.
    if Path(run.settings.data).resolve() == ROOT / "data/handbook":
        unsure = []
        for _, line in lines_of(ROOT / "data/other_languages.jsonl"):
            row = json.loads(line)
            if not router.knows(row["language"]):  # otherwise it became a domain later
                x = windows(np.array(run.tokenizer.encode(row["text"])), router.WINDOW)
                unsure += [name is None for name in router.route(x)]
        quality["unsure_other_languages"] = float(np.mean(unsure))
        quality["other_windows"] = len(unsure)
    return quality


def heldout_text(run, text):
    """{domain: [share of the text that is held out, windows that are scored, and those that were trained on]}."""
    found = {}
    for domain, split in text.items():
        x = windows(split.heldout, run.settings.eval_len, run.settings.eval_windows)
        share = len(split.heldout) / (len(split.heldout) + len(split.train))
        found[domain] = [share, len(x), int(trained_on(split.train, x).sum())]
    return found


def wrong_route_cost(swap):
    """The factor by which another domain's module raises a perplexity over the own module's, as a geometric mean."""
    factors = []
    for domain, row in swap.items():
        factors += [ppl / row[domain] for name, ppl in row.items() if name != domain]
    return math.exp(np.mean(np.log(factors)))


def sparsity(run, base):
    """({count: share removed}, {block: {projection: share closed}}, `ledger`) of a run.

    "physical" and "paper" are exact, under the final mask. "expected" is the sparsity that the gates had reached in
    expectation when they stopped learning.
    """
    gates, mask = run.gates(base)
    total = {
        "physical": gates.sparsity(mask, "physical").item(),
        "paper": gates.sparsity(mask, "paper").item(),
        "expected": gates.sparsity(count=run.settings.count).item(),
    }
    layers = {}
    for n in range(gates.blocks):
        closed = {name: 1 - is_open[n].double().mean().item() for name, is_open in mask.items()}
        layers[gates.first_block + n] = closed
    sizes = ledger(gates.total, round(total["physical"] * gates.total), run.modules)
    # Bytes on disk, in the dtype that the run was saved in.
    bytes_each = getattr(torch, run.backbone.config.raw["dtype"]).itemsize
    for name in ("removed", "one_module", "all_modules"):
        sizes[f"{name}_bytes"] = sizes[name] * bytes_each
    return total, layers, sizes


def evaluate(folder, begun=None, device="auto"):
    """Show and save all tables of a run: screen, report.md, results.json.

    begun: when the run began, by `time.perf_counter`. Without it, a new report keeps the saved duration.
    """
    run, base, text = open_finished(folder, device)
    check_complete(run)
    ppl, swap, ratios_of = perplexities(run, base, text)
    total, layers, sizes = sparsity(run, base)
    router = router_quality(run, text)
    if len(swap) > 1:
        router["wrong_route_cost"] = wrong_route_cost(swap)
    results = {
        "perplexity": ppl,
        "swap": swap,
        "controls": ratios_of,
        "heldout": heldout_text(run, text),
        "sparsity": total,
        "router": router,
        "ledger": sizes,
        "layers": layers,
        "settings": asdict(run.settings),
        "seconds": round(time.perf_counter() - begun, 1) if begun else saved_seconds(folder),
    }
    save(run.folder, {"report.md": report(results), "results.json": results})


def saved_seconds(folder):
    """The duration of a run by its saved results; 0 if they are missing or damaged."""
    with contextlib.suppress(BadInput), as_saved(folder):
        return float(saved_results(folder)["seconds"])
    return 0.0


# The report as text --------------------------------------------------------------------------------------------------

# Names in results.json -> names in the report.
LABELS = {
    "backbone": "backbone alone",
    "koff": "KOFF, matching module",
    "routed": "KOFF, routed module",
}


def report(results):
    """results.json as text (report.md)."""
    parts = ["## Held-out perplexity", perplexity_table(results)]
    parts += [heldout_line(results["heldout"])]
    swap = results["swap"]
    if swap:
        parts += ["## Swap matrix: text of the row, module of the column, * the best", swap_table(swap)]
    if len(swap) > 1:
        parts += ["## What a module is worth: perplexity with it, with none, with another's", value_table(results)]
        cost = results["router"]["wrong_route_cost"]
        parts += [f"The wrong module costs a factor of {cost:.3f} on average."]
    if results["controls"]:  # otherwise the windows are too short
        parts += ["## Controls: perplexity / unpruned, on the same predictions", controls_table(results)]
    parts += ["## Router and ledger", *router_and_ledger(results)]
    parts += ["## Closed channels per block and projection", layers_table(results["layers"])]
    return "\n\n".join(parts) + "\n"


def perplexity_table(results):
    rows = {}
    perplexity = results["perplexity"]
    for variant, ratio in ratios(results).items():
        cells = [f"{ppl:.2f}" for ppl in perplexity[variant].values()]
        cells.append(f"{np.mean(ratio):.3f} x")
        cells.append(f"{max(ratio):.3f} x")
        rows[LABELS.get(variant, variant)] = cells
    return table("", [*perplexity["unpruned"], "mean ratio", "worst"], rows)


def heldout_line(heldout):
    shares = [f"{name} {share:.1%} ({again} of {n})" for name, (share, n, again) in heldout.items()]
    said = "Held out (and how many of the scored windows also stand, for the most part, in the training text): "
    return said + ", ".join(shares) + "."


def swap_table(swap):
    rows = {}
    for domain, row in swap.items():
        best = min(row, key=row.get)
        rows[domain] = []
        for name, ppl in row.items():
            star = "*" if name == best else " "
            rows[domain].append(f"{ppl:.2f}{star}")
    return table("", list(row), rows)


def value_table(results):
    perplexity = results["perplexity"]
    columns = ["unpruned", "own module", "no module", "others, mean", "others, worst"]
    rows = {}
    for domain, row in results["swap"].items():
        others = [ppl for name, ppl in row.items() if name != domain]
        cells = [
            perplexity["unpruned"][domain],
            perplexity["koff"][domain],
            perplexity["backbone"][domain],
            np.mean(others),
            max(others),
        ]
        rows[domain] = [f"{cell:.2f}" for cell in cells]
    return table("", columns, rows)


def controls_table(results):
    rows = {}
    for label, ratio in results["controls"].items():
        values = list(ratio.values())
        rows[label] = [f"{value:.3f} x" for value in [*values, np.mean(values)]]
    return table("", [*results["swap"], "mean"], rows)


def router_and_ledger(results):
    """Sentences about the router, the sparsity and the sizes."""
    router = results["router"]
    each = ", ".join(f"{name} {accuracy:.3f}" for name, accuracy in router["accuracies"].items())
    line = f"Router: accuracy {router['accuracy']:.4f} on {router['windows']} held-out windows of 50 tokens"
    line += f", the mean over domains ({each})"
    line += f", {router['unsure']:.1%} of them called unsure"
    if "unsure_other_languages" in router:
        line += f"; unsure on {router['unsure_other_languages']:.1%} of {router['other_windows']} windows"
        line += " in other languages"
    removed = results["sparsity"]
    sparsity = f"Sparsity: {removed['physical']:.4f} physical (parameters removed / all), "
    sparsity += f"{removed['paper']:.4f} by the paper's count (closed channels x fan-in / all). "
    if Settings.from_saved(results["settings"]).gate_steps:
        sparsity += f"When the gates stopped learning they had reached {removed['expected']:.4f} in expectation "
        sparsity += f"({results['settings']['count']}); the final mask closes the rest by rank."
    else:
        sparsity += "No step trained the gates: their score decides."
    sizes = results["ledger"]
    shown = {}
    for name in ("removed", "one_module", "all_modules"):
        shown[name] = f"{sizes[name]:,} ({sizes[f'{name}_bytes']:,} bytes"
    share = f", {sizes['one_module_share']:.0%} of what was removed" if sizes["removed"] else ""
    ledger = f"Of {sizes['total']:,} parameters {shown['removed']}) were removed; "
    ledger += f"one module has {shown['one_module']}{share}); all modules {shown['all_modules']})."
    return [f"{line}.", sparsity, ledger]


def layers_table(layers):
    rows = {}
    for block, closed in layers.items():
        rows[f"block {block}"] = [f"{share:.1%}" for share in closed.values()]
    return table("", list(closed), rows)


# Commands ------------------------------------------------------------------------------------------------------------


def report_again(args):
    with held(args.run, args.device):
        evaluate(args.run, device=args.device)


def compare(args):
    """Print a table with one row per finished run, and their mean if they differ only in the seed."""
    rows = {}
    kinds = []
    for folder in dict.fromkeys(args.run):  # each once
        rows[str(folder)] = together([folder])
        results = saved_results(folder)
        kinds.append([{**results["settings"], "seed": None}, sorted(results["perplexity"]["unpruned"])])
    if len(rows) > 1 and kinds.count(kinds[0]) == len(kinds):
        rows["mean +/- std"] = together(list(rows))
    print(side_by_side(rows))


def parse(argv):
    """The arguments of a command line. `work` is the function that carries the command out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name, work, text, device=True):
        """Add a command on a run; returns the function that adds an option to it."""
        one = commands.add_parser(name, help=text, description=text)
        one.set_defaults(work=work)
        one.add_argument("run", type=Path, nargs="+" if name == "compare" else None)
        if device:
            one.add_argument("--device", default="auto", help="cpu or cuda; auto: cuda if available [auto]")
        return one.add_argument

    command("report", report_again, "evaluate a finished run again")

    option = command("perplexity", other_texts, "perplexity of whole texts that the run was not trained on")
    option("texts", type=Path, nargs="+", metavar="TEXT", help="a .txt, a .jsonl or a folder of them")

    command("compare", compare, "compare several finished runs in one table", device=False)

    option = command("lape", lape_report, "did the mask close neurons of few languages, or neurons of all?")
    option("--tokens", type=int, default=100_000, help="tokens of each domain's training text [100000]")

    option = command("probes", probes, "compare hidden states of the backbone alone with the unpruned model's")
    option("--texts", type=int, default=5000, help="held-out windows of 50 tokens per domain [5000]")

    option = command("bench", bench, "benchmark a run with lm-evaluation-harness")
    option("task", help="a task of the harness, or one of ours: koff_mmlu, koff_arc, koff_bbl, koff_pairs")
    option("--rows", help="file or folder with the questions of our tasks (data/prepare.py benchmarks)")
    option("--include", type=Path, help="folder with more task yamls (paths in them: from here)")
    option("--on", nargs="+", metavar="VARIANT", help="unpruned, backbone, routed or module names [the first three]")
    option("--limit", type=int, help="number of questions per task [all]")
    option("--shots", type=int, help="number of examples before a question [the task's own]")
    option("--out", type=Path, help="folder for the results [RUN/bench]")

    command("plot", plot, "draw the saved results of a run or a sweep (needs matplotlib)", device=False)

    option = command("generate", continue_text, "continue a prompt")
    option("prompt")
    sampling(option, tokens=64)

    option = command("chat", chat, "hold a conversation; the module can change in the middle")
    sampling(option, tokens=256)

    option = command("export", export, "write the run for transformers and peft, or for llama.cpp", device=False)
    forms = "one dense checkpoint; one adapter per module for it; the pruned model and adapters for llama.cpp"
    option("form", choices=("hf", "peft", "gguf"), help=forms)
    option("--module", help="hf: merge the LoRA of this module; peft, gguf: export only this module")
    option("--dtype", choices=("f32", "bf16", "q8_0"), default="bf16", help="gguf: numbers of the matrices [bf16]")
    option("--out", type=Path, help="new folder [RUN/export/FORM or RUN/export/FORM-MODULE]")

    option = command("remove", remove, "delete a module", device=False)
    option("module")

    return parser.parse_args(argv)


def sampling(option, tokens):
    """Add the options of the commands that generate text."""
    option("--module", help="domain whose module is attached [the router picks]")
    option("--tokens", type=int, default=tokens, help=f"number of tokens to generate [{tokens}]")
    option("--temperature", type=float, default=0.0, help="0 is greedy [0]")
    option("--top-p", type=float, default=1.0, help="nucleus sampling [1]")
    option("--seed", type=int, default=0)


def main(argv=None):
    args = parse(argv)
    fast.enable()
    return run_script("eval.py", lambda: args.work(args), "the same command begins again")


if __name__ == "__main__":
    sys.exit(main())
