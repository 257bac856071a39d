"""Tables in Markdown, and the figures of finished runs that tables of several runs show."""

import json
from pathlib import Path

import numpy as np

from data import BadInput, atomic
from data.checkpoint import tensors_of
from data.pictures import spread


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


def parameters_of(blocks):
    """How many parameters a module {block: BlockMemory} has."""
    return sum(t.numel() for t in tensors_of(blocks).values())


def ledger(total, removed, modules):
    """What left the model against what the modules hold, in parameters; `modules` {domain: {block: BlockMemory}}."""
    sizes = [parameters_of(blocks) for blocks in modules.values()]
    one = max(sizes, default=0)
    share, every = one / max(1, removed), sum(sizes)
    return dict(total=total, removed=removed, one_module=one, all_modules=every, one_module_share=share)
