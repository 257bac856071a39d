"""Pictures of what a run or a sweep has saved: shades, hatches, markers and line styles, no meaning in colour."""

import json
from pathlib import Path

import numpy as np

from data import BadInput, atomic


def spread(x):
    """(mean, sample deviation) of some values, such as the seeds of a row; 0 for a single one."""
    return float(np.mean(x)), float(np.std(x, ddof=1)) if len(x) > 1 else 0.0


def lines(ax, x, columns, **labels):
    """Columns {name: y} over x, each with its own line style and marker."""
    for (name, y), style in zip(columns.items(), ("ko-", "ks--", "kD:", "k^-.", "kv-", "kx--"), strict=False):
        ax.plot(x, y, style, mfc="w", markevery=max(1, len(x) // 18), label=name)
    ax.set(**labels)
    ax.locator_params(axis="x", integer=True)
    ax.legend()


def draw_swap(plt, results):
    p, swap = results["perplexity"], results["swap"]
    columns = {"unpruned": p["unpruned"], "no\nmodule": p["backbone"], "pruning\nonly": p.get("pruned")}
    columns = {name: column for name, column in columns.items() if column}
    own = len(columns)
    columns |= {m: {d: row[m] for d, row in swap.items()} for m in swap}
    ratio = np.array([[column[d] / x for column in columns.values()] for d, x in p["unpruned"].items()])
    ax = plt.figure(figsize=(1 + 0.95 * len(columns), 1 + 0.45 * len(ratio))).add_subplot()
    image = ax.imshow(ratio, cmap="Greys", aspect="auto", vmin=min(1, ratio.min()), vmax=ratio.max() + 0.02)
    for (i, j), x in np.ndenumerate(ratio):
        best, ink = j >= own and x == ratio[i, own:].min(), "w" if image.norm(x) > 0.5 else "k"
        ax.text(j, i, f"{x:.3f}{'*' if best else ''}", ha="center", va="center", color=ink)
    ax.axvline(own - 0.5, color="k", lw=3)
    ax.set_xticks(range(len(columns)), columns)
    ax.set_yticks(range(len(ratio)), p["unpruned"])
    ax.set(title="perplexity / unpruned: text of the row, module of the column, * the best")


def draw_layers(plt, results):
    rows = results["layers"]
    columns = {name: [row[name] for row in rows.values()] for name in next(iter(rows.values()))}
    ax = plt.figure(figsize=(7, 3.5)).add_subplot()
    lines(ax, [int(i) for i in rows], columns, xlabel="block", ylabel="share of channels closed")


def draw_curves(plt, log):
    _, axes = plt.subplots(1, 3, figsize=(12, 3), layout="constrained")
    for ax, names in zip(axes, (["loss"], ["physical", "paper"], ["lambda"]), strict=True):
        label = "sparsity" if len(names) > 1 else names[0]
        lines(ax, [x["step"] for x in log], {n: [x[n] for x in log] for n in names}, xlabel="step", ylabel=label)


def draw_lape(plt, found):
    closed, ax = found["closed"], plt.figure(figsize=(6, 3.5)).add_subplot()
    closed = {"neurons": closed["gate"]} if closed["gate"] == closed["up"] else closed
    for i, (group, hatch) in enumerate({"specific": "///", "general": "...", "all": ""}.items()):
        label = "all: local sparsity" if group == "all" else f"15% most {group}"
        height, at = [row[group] for row in closed.values()], np.arange(len(closed)) + 0.27 * (i - 1)
        ax.bar_label(ax.bar(at, height, 0.25, fc="w", ec="k", hatch=hatch, label=label), fmt="%.2f")
    ax.set_xticks(range(len(closed)), closed)
    ax.set(ylabel="P(closed)", ymargin=0.4)  # room for the legend
    ax.legend()


def draw_sweep(plt, sweep):
    rows, label = sweep["rows"], "mean perplexity / unpruned"
    curve = [row for name, row in rows.items() if name.startswith("sparsity ")]
    size = (12 if curve else 7, 1 + max(2.5, 0.3 * len(rows)))
    *left, ax = plt.subplots(1, 2 if curve else 1, figsize=size, layout="constrained", squeeze=False)[1][0]
    for name, style in (("koff", "ko-"), ("backbone", "ks--")) if curve else ():
        points = sorted((*spread(row["physical"]), *spread(row[name])) for row in curve if row[name])
        x, dx, y, dy = zip(*points, strict=True) if points else [[]] * 4
        legend = "KOFF" if name == "koff" else "backbone alone"
        left[0].errorbar(x, y, dy, dx, style, mfc="w", capsize=3, label=legend)
        left[0].set(xlabel="physical sparsity", ylabel=label)
        left[0].legend()
    for i, row in enumerate(rows.values()):
        (x, dx), look = spread(row["koff"] or row["backbone"]), {} if row["koff"] else {"hatch": "///"}
        ax.barh(i, x - 1, left=1, xerr=dx or None, fc="w" if look else ".8", ec="k", capsize=3, **look)
        ax.text(max(1, x + dx), i, f" {x:.3f}", va="center")
    ax.set_yticks(range(len(rows)), rows)
    ax.set(xlabel=label, title="grey: KOFF, hatched: pruning only", ymargin=0.02, xmargin=0.15)
    ax.invert_yaxis()


PICTURES = {
    "results.json": {"layers": draw_layers, "swap": draw_swap}, "log.jsonl": {"curves": draw_curves},
    "lape.json": {"lape": draw_lape}, "sweep.json": {"sweep": draw_sweep},
}  # fmt: skip


def plot(folder):
    """Draw what a run or a sweep has saved in the folder, into the folder."""
    try:
        from matplotlib import pyplot
    except ImportError:
        raise BadInput("pictures need matplotlib, which is not here; pip install matplotlib.") from None
    pyplot.switch_backend("Agg")  # files only: works without a screen
    there = {path: draws for file, draws in PICTURES.items() if (path := Path(folder, file)).exists()}
    if not there:
        raise BadInput(f"{folder} has no {', '.join(PICTURES)}; name the folder of a run or of a sweep.")
    for path, (name, draw) in ((path, item) for path, draws in there.items() for item in draws.items()):
        text = path.read_text(encoding="utf-8")
        try:
            draw(pyplot, [json.loads(x) for x in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise BadInput(f"{path} is not what this version saves ({error!r}); make it again.") from None
        with atomic(path.with_name(f"{name}.png")) as partial:
            pyplot.savefig(partial, format="png", dpi=150, bbox_inches="tight")
        pyplot.close()
        print(path.with_name(f"{name}.png"))
