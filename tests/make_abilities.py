"""Grammar before and after pruning: `python tests/make_abilities.py ROWS RUN [RUN ...] [--picture FILE]`.

ROWS is the folder of minimal pairs on which `eval.py bench RUN koff_pairs --rows ROWS` measured the runs; each RUN/bench
has its answers, one file a variant. A model is right where the grammatical sentence is the more likely one. Prints the
share of right answers in each file of ROWS, with its standard error, and the same by construction (by field in a file of
more than twenty constructions). Runs without modules and repair are "pruning only", and the picture shows everything over
the sparsity.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data.tables import saved_results, table


def answers(path, groups):
    """{(file of the pair, its group): [1 if right]}."""
    found = {}
    for sample in json.loads(path.read_text(encoding="utf-8"))["samples"]["koff_pairs"]:
        file, _, line = sample["doc"]["where"].rpartition(":")
        file = Path(file).stem
        found.setdefault((file, groups[file][int(line) - 1]), []).append(sample["acc"])
    return found


def groups_in(path):
    """The group of each row in a file: its construction, or its field where there are many constructions."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    many = len({row["UID"] for row in rows}) > 20
    return [row["field" if many else "UID"].replace("/", "_") for row in rows]


def share(values):
    """(share of right answers, its standard error)."""
    return np.mean(values), np.std(values) / np.sqrt(len(values))


def measured(runs, groups):
    """{(sparsity, variant): `answers`}; the unpruned model has sparsity 0."""
    found = {}
    for run in runs:
        results = saved_results(run)
        repaired = results["settings"]["repair"] != "none"
        for path in sorted((run / "bench").glob("koff_pairs-*.json")):
            variant = path.stem.split("-")[1]
            sparsity = 0.0 if variant == "unpruned" else round(results["sparsity"]["physical"], 3)
            names = {"backbone": "pruning only, repaired" if repaired else "pruning only", "unpruned": "unpruned"}
            found[sparsity, names.get(variant, f"{variant} module")] = answers(path, groups)
    return dict(sorted(found.items()))


def joined(found, file, construction=None):
    return [x for (f, c), values in found.items() if f == file and construction in (None, c) for x in values]


def draw(results, files, picture):
    from matplotlib import figure

    page = figure.Figure((12, 3.5), facecolor="white", layout="constrained")
    variants = list(dict.fromkeys(variant for _, variant in results if variant != "unpruned"))
    for place, file in enumerate(files, 1):
        axes = page.add_subplot(1, len(files), place, title=file.replace("_", ", "), xlabel="sparsity")
        start = share(joined(results[0.0, "unpruned"], file))
        for variant, style in zip(variants, ("ko-", "ks--", "kD:", "k^-.", "kv-", "kx--"), strict=False):
            points = [(0.0, *start)]
            points += [(s, *share(joined(one, file))) for (s, name), one in results.items() if name == variant]
            x, y, error = zip(*points, strict=True)
            axes.errorbar(x, y, error, fmt=style, markerfacecolor="w", capsize=3, label=variant)
        axes.axhline(0.5, color=".7")  # guessing
        axes.set_ylim(0.4, 1)
    axes.legend(fontsize="small", loc="upper right")
    page.savefig(picture, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    groups = {path.stem: groups_in(path) for path in sorted(args.rows.glob("*.jsonl"))}
    results = measured(args.runs, groups)
    files = list(groups)
    rows = {}
    for (sparsity, variant), found in results.items():
        cells = [share(joined(found, file)) for file in files]
        rows[f"{sparsity:.0%}, {variant}"] = [f"{mean:.3f} +/- {error:.3f}" for mean, error in cells]
    print("## Files\n\n" + table("", files, rows))
    for file in files:
        rows = {}
        for construction in sorted({c for found in results.values() for f, c in found if f == file}):
            cells = [share(joined(found, file, construction)) for found in results.values()]
            rows[construction] = [f"{mean:.2f} +/- {error:.2f}" for mean, error in cells]
        columns = [f"{sparsity:.0%}, {variant}" for sparsity, variant in results]
        print(f"\n## {file}\n\n" + table("construction", columns, rows))
    if args.picture:
        draw(results, files, args.picture)


if __name__ == "__main__":
    main()
