"""Pictures of the saved results of a run or a sweep: `python eval.py plot FOLDER` draws them into the folder.

Shades, hatches, markers and line styles carry the meaning, and never colour. The background is white, which keeps black
ink legible on a dark page.
"""

import json

import numpy as np

from data import BadInput, atomic
from data.progress import read_log
from data.tables import as_saved, by_way, quality, spread

STYLES = ("ko-", "ks--", "kD:", "k^-.", "kv-", "kx--")  # black; one marker and line style per curve


def draw_curve(axes, x, y, label):
    """Add a curve over whole numbers x to the axes."""
    style = STYLES[len(axes.lines) % len(STYLES)]
    # A marker at every point would hide the line style of a long curve. 0.05: a twentieth of the diagonal apart.
    axes.plot(x, y, style, markerfacecolor="w", markevery=0.05, label=label)
    axes.locator_params(axis="x", integer=True)
    axes.legend()


def draw_layers(figure, results):
    """The share of closed channels over the gated blocks, one curve per projection."""
    axes = figure.add_subplot(xlabel="block", ylabel="share of channels closed")
    layers = results["layers"]  # {block: {projection: share}}
    blocks = [int(block) for block in layers]
    for name in next(iter(layers.values())):
        draw_curve(axes, blocks, [row[name] for row in layers.values()], name)


def draw_curves(figure, log):
    """The log of train.py over the steps: the loss of each domain, sparsity by both counts, lambda."""
    log = [entry for entry in log if "loss" in entry]  # the other entries report solved modules
    domains = {}
    for entry in log:  # runs of an earlier version do not name the domain
        domains.setdefault(entry.get("domain", "loss"), []).append(entry)
    axes = figure.add_subplot(1, 4, 1, xlabel="step", ylabel="loss")
    for domain, entries in domains.items():
        draw_curve(axes, [entry["step"] for entry in entries], [entry["loss"] for entry in entries], domain)
    steps = [entry["step"] for entry in log]
    labels = {"physical": "sparsity, physical", "paper": "sparsity, paper", "lambda": "lambda"}
    for place, (name, label) in enumerate(labels.items(), 2):
        axes = figure.add_subplot(1, 4, place, xlabel="step")
        draw_curve(axes, steps, [entry[name] for entry in log], label)


def draw_swap(figure, results):
    """Perplexity / unpruned: one row per text, one column per model (unpruned, backbone, backbone with each module)."""
    perplexity = results["perplexity"]
    swap = results["swap"]  # {domain: {module: perplexity}}
    columns = ["unpruned", "backbone", *swap]
    modules_from = 2  # the first column with a module
    rows = []
    for domain, unpruned in perplexity["unpruned"].items():
        row = [perplexity["unpruned"][domain], perplexity["backbone"][domain]]
        row += [swap[domain][module] for module in swap]
        rows.append(np.divide(row, unpruned))
    ratio = np.array(rows)  # [domains, columns]
    axes = figure.add_subplot(title="perplexity / unpruned: text of the row, module of the column, * the best")
    # The scale ends far above the highest ratio. No shade is darker than medium grey, and the text stays legible.
    axes.imshow(ratio, cmap="Greys", aspect="auto", vmax=ratio.min() + 2 * np.ptp(ratio))
    for (i, j), value in np.ndenumerate(ratio):
        star = "*" if j >= modules_from and value == min(ratio[i, modules_from:]) else ""
        axes.text(j, i, f"{value:.3f}{star}", ha="center", va="center")
    axes.axvline(modules_from - 0.5, color="k")
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(ratio)), perplexity["unpruned"])


def draw_lape(figure, results):
    """P(closed) of language-specific neurons, of general neurons, and of all neurons."""
    closed = results["closed"]  # {"gate", "up", "either": {"specific", "general", "all": P(closed)}}
    if closed["gate"] == closed["up"]:  # granularity neuron: one gate closes both
        closed = {"neuron": closed["gate"]}
    groups = ["15% most\nspecific", "15% most\ngeneral", "all: local\nsparsity"]
    for place, (gate, shares) in enumerate(closed.items(), 1):
        axes = figure.add_subplot(1, len(closed), place, title=gate, ylabel="P(closed)", ylim=(0, 1.1))
        bars = axes.bar(groups, shares.values(), fc=".8", ec="k")
        axes.bar_label(bars, fmt="%.2f")


def draw_sweep(figure, sweep):
    """Rows of a sweep as bars. Rows that vary the sparsity are drawn as quality over sparsity."""
    swept = {}
    others = {}
    for label, row in sweep["rows"].items():  # {label: {column: [one value per seed] or None}}
        group = swept if label.startswith("sparsity ") else others
        group[label] = row
    panels = bool(swept) + bool(others)
    if swept:
        draw_tradeoff(figure.add_subplot(1, panels, 1), swept)
    if others:
        draw_bars(figure.add_subplot(1, panels, panels), others)


def draw_tradeoff(axes, rows):
    """Perplexity over sparsity, one curve per way: "sparsity 0.1, solved" is a point of the curve "solved"."""
    for number, (way, points) in enumerate(by_way(rows).items()):
        x = [spread(row["physical"])[0] for row in points.values()]
        y, deviation = np.transpose([spread(quality(row)) for row in points.values()])
        style = STYLES[number % len(STYLES)]
        axes.errorbar(x, y, deviation, fmt=style, markerfacecolor="w", capsize=3, label=way)
    axes.legend()
    axes.set(xlabel="physical sparsity", ylabel="mean perplexity / unpruned")


def draw_bars(axes, rows):
    """A bar from 1, the unpruned model, to the mean ratio of a row: KOFF's, or the backbone's without modules."""
    for label, row in rows.items():
        mean, deviation = spread(quality(row))
        hatch = "" if row["koff"] else "///"
        bar = axes.barh(label, mean - 1, left=1, xerr=deviation, fc="w", ec="k", hatch=hatch)
        axes.bar_label(bar, [f"{mean:.3f}"], padding=3)
    axes.invert_yaxis()  # the first row is on top
    axes.set(xlabel="mean perplexity / unpruned", title="white: KOFF, hatched: pruning only", xmargin=0.15)


# What can be drawn ----------------------------------------------------------------------------------------------------

# {picture: (its source, the function that draws it)}
PICTURES = {
    "layers": ("results.json", draw_layers),
    "swap": ("results.json", draw_swap),
    "curves": ("log.jsonl", draw_curves),
    "lape": ("lape.json", draw_lape),
    "sweep": ("sweep.json", draw_sweep),
}


def plot(args):
    """Draw the saved results in the folder `args.run` into that folder. BadInput if there are none."""
    try:
        from matplotlib import figure  # pyplot would want a screen, and keep every figure
    except ImportError:
        raise BadInput("pictures need matplotlib: pip install matplotlib.") from None
    drawn = False
    for name, (source, draw) in PICTURES.items():
        path = args.run / source
        if not path.exists():
            continue
        page = figure.Figure((12, 4), facecolor="white", layout="constrained")  # as wide as a page of text
        with as_saved(path):
            saved = read_log(path) if path.suffix == ".jsonl" else json.loads(path.read_text(encoding="utf-8"))
            draw(page, saved)
        picture = path.with_name(f"{name}.png")
        with atomic(picture) as partial:
            page.savefig(partial, format="png", dpi=150)
        print(picture)
        drawn = True
    if not drawn:
        raise BadInput(f"{args.run} has no results.json, log.jsonl, lape.json, sweep.json; name a run or a sweep.")
