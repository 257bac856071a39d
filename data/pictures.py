"""Pictures of what a run or a sweep has saved: `python eval.py plot FOLDER` draws them into the folder.

No meaning is in colour: shades, hatches, markers and line styles tell things apart. The ground is set to white, so that
black ink is legible on a dark page too.
"""

import json
from pathlib import Path

import numpy as np

from data import BadInput, atomic
from data.progress import read_log
from data.tables import as_saved, by_way, quality, spread

STYLES = ("ko-", "ks--", "kD:", "k^-.", "kv-", "kx--")  # black; each curve has its own marker and line style


def draw_curve(axes, x, y, label):
    """One more curve in the axes, over whole numbers x."""
    # A marker at every point would hide the line style of a long curve: they keep this distance, of the diagonal.
    style = STYLES[len(axes.lines) % len(STYLES)]
    axes.plot(x, y, style, markerfacecolor="w", markevery=0.05, label=label)
    axes.locator_params(axis="x", integer=True)
    axes.legend()


def draw_layers(figure, results):
    """The share of channels that are closed, over the gated blocks: a curve for each projection."""
    axes = figure.add_subplot(xlabel="block", ylabel="share of channels closed")
    layers = results["layers"]  # {block: {projection: share}}
    blocks = [int(block) for block in layers]
    for name in next(iter(layers.values())):
        draw_curve(axes, blocks, [row[name] for row in layers.values()], name)


def draw_curves(figure, log):
    """The log of train.py over the steps: the loss of each domain, sparsity by both counts, lambda."""
    names = {"physical": "sparsity, physical", "paper": "sparsity, paper", "lambda": "lambda"}
    log = [entry for entry in log if "loss" in entry]  # other lines tell of solved modules
    domains = {}
    for entry in log:  # runs of an earlier version do not name the domain
        domains.setdefault(entry.get("domain", "loss"), []).append(entry)
    axes = figure.add_subplot(1, 4, 1, xlabel="step", ylabel="loss")
    for domain, entries in domains.items():
        draw_curve(axes, [entry["step"] for entry in entries], [entry["loss"] for entry in entries], domain)
    steps = [entry["step"] for entry in log]
    for place, (name, label) in enumerate(names.items(), 2):
        axes = figure.add_subplot(1, 4, place, xlabel="step")
        draw_curve(axes, steps, [entry[name] for entry in log], label)


def draw_swap(figure, results):
    """Perplexity over the unpruned model's: a row for each text, a column for each model without and with a module."""
    perplexity = results["perplexity"]
    swap = results["swap"]  # {domain: {module: perplexity}}
    variants = ["unpruned", "backbone"]
    first = len(variants)  # column of the first module
    # One row of ratios after the other, as the report has them.
    rows = []
    for domain, unpruned in perplexity["unpruned"].items():
        row = [perplexity[name][domain] for name in variants]
        row += [swap[domain][module] for module in swap]
        rows.append(np.divide(row, unpruned))
    ratio = np.array(rows)  # [domains, variants + modules]
    axes = figure.add_subplot(title="perplexity / unpruned: text of the row, module of the column, * the best")
    # The scale goes on beyond the highest ratio: no shade is darker than a middle grey, so that the text is legible.
    axes.imshow(ratio, cmap="Greys", aspect="auto", vmax=ratio.min() + 2 * np.ptp(ratio))
    for (i, j), value in np.ndenumerate(ratio):
        star = "*" if j >= first and value == min(ratio[i, first:]) else ""
        axes.text(j, i, f"{value:.3f}{star}", ha="center", va="center")
    axes.axvline(first - 0.5, color="k")
    axes.set_xticks(range(ratio.shape[1]), [*variants, *swap])
    axes.set_yticks(range(ratio.shape[0]), perplexity["unpruned"])


def draw_lape(figure, found):
    """P(closed) of the neurons that few domains use, of those that all use, and of all neurons."""
    closed = found["closed"]  # {"gate", "up", "either": {"specific", "general", "all": P(closed)}}
    if closed["gate"] == closed["up"]:  # granularity neuron: one gate closes both
        closed = {"neuron": closed["gate"]}
    groups = ["15% most\nspecific", "15% most\ngeneral", "all: local\nsparsity"]
    for place, (gate, shares) in enumerate(closed.items(), 1):
        axes = figure.add_subplot(1, len(closed), place, title=gate, ylabel="P(closed)", ylim=(0, 1.1))
        bars = axes.bar(groups, shares.values(), fc=".8", ec="k")
        axes.bar_label(bars, fmt="%.2f")


def draw_sweep(figure, sweep):
    """Runs as bars; those in which sparsity was swept as quality over sparsity."""
    swept = {}
    others = {}
    for label, row in sweep["rows"].items():  # {label: {column: [value of each seed], or None}}
        group = swept if label.startswith("sparsity ") else others
        group[label] = row
    panels = bool(swept) + bool(others)
    if swept:
        draw_tradeoff(figure.add_subplot(1, panels, 1), swept)
    if others:
        draw_bars(figure.add_subplot(1, panels, panels), others)


def draw_tradeoff(axes, rows):
    """Perplexity over sparsity, a curve for each way: "sparsity 0.1, solved" is a point of the curve "solved"."""
    for number, (way, points) in enumerate(by_way(rows).items()):
        x = [spread(row["physical"])[0] for row in points.values()]
        y, deviation = np.transpose([spread(quality(row)) for row in points.values()])
        style = STYLES[number % len(STYLES)]
        axes.errorbar(x, y, deviation, fmt=style, markerfacecolor="w", capsize=3, label=way)
    axes.legend()
    axes.set(xlabel="physical sparsity", ylabel="mean perplexity / unpruned")


def draw_bars(axes, rows):
    """A bar from 1, which is the unpruned model, to the mean ratio: a run's own modules, or its backbone if none."""
    for label, row in rows.items():
        mean, deviation = spread(quality(row))
        hatch = "" if row["koff"] else "///"
        bar = axes.barh(label, mean - 1, left=1, xerr=deviation, fc="w", ec="k", hatch=hatch)
        axes.bar_label(bar, [f"{mean:.3f}"], padding=3)
    axes.invert_yaxis()  # the first row is on top
    axes.set(xlabel="mean perplexity / unpruned", title="white: KOFF, hatched: pruning only", xmargin=0.15)


# What can be drawn ----------------------------------------------------------------------------------------------------

PICTURES = {  # picture: (the file that it shows, the function that draws it)
    "layers": ("results.json", draw_layers),
    "swap": ("results.json", draw_swap),
    "curves": ("log.jsonl", draw_curves),
    "lape": ("lape.json", draw_lape),
    "sweep": ("sweep.json", draw_sweep),
}


def plot(folder):
    """Draw what a run or a sweep has saved in the folder, into the folder. BadInput if that is nothing."""
    try:
        from matplotlib import figure  # not pyplot, which wants a screen and keeps every figure
    except ImportError:
        raise BadInput("pictures need matplotlib: pip install matplotlib.") from None
    drawn = 0
    for name, (source, draw) in PICTURES.items():
        path = Path(folder, source)
        if not path.exists():
            continue
        # One size for all pictures: as wide as a page of text.
        page = figure.Figure((12, 4), facecolor="white", layout="constrained")
        with as_saved(path):
            draw(page, read(path))
        picture = path.with_name(f"{name}.png")
        with atomic(picture) as partial:
            page.savefig(partial, format="png", dpi=150)
        print(picture)
        drawn += 1
    if not drawn:
        raise BadInput(f"{folder} has no results.json, log.jsonl, lape.json, sweep.json; name a run or a sweep.")


def read(path):
    """What a .json holds, or a list of what the lines of a .jsonl hold."""
    if path.suffix == ".jsonl":
        return read_log(path)
    return json.loads(path.read_text(encoding="utf-8"))
