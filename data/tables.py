"""Tables in Markdown, the files of a report, and the figures of finished runs side by side.

save(folder, {"report.md": table("", ["mean"], {"french": ["1.03"]}), "results.json": results})
print(side_by_side({"seeds 0 to 2": together([folder_0, folder_1, folder_2])}))
"""

import contextlib
import json
from pathlib import Path

import numpy as np

from data import MALFORMED, BadInput, atomic
from data.checkpoint import tensors_of
from data.progress import read_log
from data.settings import Settings


def spread(values):
    """(mean, sample deviation) of values, such as one per seed. A single value has deviation 0."""
    deviation = np.std(values, ddof=1) if len(values) > 1 else 0.0
    return np.mean(values), deviation


def table(corner, columns, rows):
    """A Markdown table, aligned for the screen. columns [text]; rows {label: [text, one per column]}."""
    lines = [[corner, *columns]]
    for label, texts in rows.items():
        lines.append([label, *texts])
    cells = np.array(lines)  # [1 + rows, 1 + columns] of text
    widths = np.char.str_len(cells).max(axis=0)
    # Labels are aligned left, figures right. A colon in the rule below the head tells Markdown so.
    padded = np.char.rjust(cells, widths)
    padded[:, 0] = np.char.ljust(cells[:, 0], widths[0])
    rule = np.char.rjust(":", widths + 2, "-")
    rule[0] = "-" * (widths[0] + 2)
    text = ["| " + " | ".join(line) + " |" for line in padded]
    text.insert(1, "|" + "|".join(rule) + "|")
    return "\n".join(text)


def save(folder, files, show=True):
    """Write files {name: text, or data to be saved as JSON} into the folder. Texts are also shown on the screen."""
    for name, content in files.items():
        text = content
        if not isinstance(content, str):
            text = json.dumps(content, indent=1) + "\n"
        elif show:
            print("\n" + text)
        with atomic(Path(folder, name)) as partial:
            partial.write_text(text, encoding="utf-8")


# Finished runs -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def as_saved(path):
    """A context for reading values from the saved file at `path`: any failure becomes a BadInput."""
    try:
        yield
    except MALFORMED as error:
        raise BadInput(f"{path} is not what this version saves ({error!r}); make it again.") from None


def saved_results(folder):
    """The content of a finished run's results.json. BadInput if it is missing or from another version."""
    path = Path(folder, "results.json")
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        if not {"perplexity", "swap", "controls", "sparsity", "settings"} <= results.keys():
            raise ValueError("it is of another version")
    except (OSError, *MALFORMED) as error:
        raise BadInput(f"{path} cannot be read ({error}); name runs that train.py has finished.") from None
    return results


def ratios(results):
    """{variant: [perplexity / unpruned, one per domain]}. A run without modules has no "koff" and no "routed"."""
    perplexity = results["perplexity"]
    table = {}
    for variant, row in perplexity.items():
        if row:
            table[variant] = [value / perplexity["unpruned"][domain] for domain, value in row.items()]
    return table


def settled(log, results):
    """The first step in log.jsonl at which the gates had reached 95% of the final sparsity, in expectation.

    None if they had not reached it before the mask was fixed.
    """
    settings = Settings.from_saved(results["settings"])
    enough = 0.95 * results["sparsity"][settings.count]
    for entry in read_log(log):
        expected = entry.get(settings.count, 0)  # the entry of a solved module has none
        if entry["step"] < settings.gate_steps and expected >= enough:
            return entry["step"]
    return None


def summary(folder):
    """The figures of a finished run in tables of several runs: {column: number, or None where it does not apply}.

    physical, paper, expected    sparsities: shares of all parameters
    backbone, koff, routed       perplexity / unpruned, mean over domains: no module, the domain's own, the router's
    worst                        the highest koff ratio of any domain
    diagonal                     share of the domains whose own module is better for them than every other
    router, settled, minutes     the router's accuracy, see `settled`, the duration of the run
    """
    results = saved_results(folder)
    with as_saved(Path(folder, "results.json")):
        ratio = ratios(results)
        figures = {**results["sparsity"], "backbone": np.mean(ratio["backbone"])}
        figures |= dict.fromkeys(("koff", "routed", "worst", "diagonal"))  # None without modules
        if results["swap"]:
            figures["koff"] = np.mean(ratio["koff"])
            figures["routed"] = np.mean(ratio["routed"])
            figures["worst"] = max(ratio["koff"])
            own_is_best = [min(row, key=row.get) == domain for domain, row in results["swap"].items()]
            figures["diagonal"] = np.mean(own_is_best)
        log = Path(folder, "log.jsonl")
        figures["router"] = results["router"]["accuracy"]
        figures["settled"] = settled(log, results) if log.exists() else None
        figures["minutes"] = results["seconds"] / 60
    return figures


def together(folders):
    """The `summary` of several runs, such as seeds: {column: [one value per run], or None if any run has none}."""
    summaries = [summary(folder) for folder in folders]
    columns = {}
    for name in summaries[0]:
        values = [figures[name] for figures in summaries]
        columns[name] = None if None in values else values
    return columns


def quality(row):
    """Perplexity / unpruned in a row of `together`, [one value per run]: KOFF's, or the backbone's without modules."""
    return row["koff"] or row["backbone"]


def by_way(rows):
    """The rows {"sparsity 0.1, solved": row} of a sweep over sparsity, as {way: {sparsity: row}}. All keys are text."""
    ways = {}
    for label, row in rows.items():
        sparsity, _, way = label.removeprefix("sparsity ").partition(", ")
        ways.setdefault(way or "KOFF", {})[sparsity] = row
    return ways


def side_by_side(rows):
    """{label: `together`} as a table: the value of a single run, mean +/- sample deviation of several (seeds)."""
    columns = []  # those that any row has
    for row in rows.values():
        columns += [name for name, values in row.items() if values and name not in columns]
    cells = {label: [cell(row.get(name)) for name in columns] for label, row in rows.items()}
    return table("", columns, cells)


def cell(values):
    if not values:
        return "-"
    mean, deviation = spread(values)
    if deviation < 0.0005:  # it would be shown as 0.000
        return f"{mean:.3f}"
    return f"{mean:.3f} +/- {deviation:.3f}"


# Parameters ----------------------------------------------------------------------------------------------------------


def ledger(total, removed, modules):
    """Parameters: all of the model, those removed from it, and those of the modules {domain: {block: Memory}}."""
    sizes = []
    for memories in modules.values():
        sizes.append(sum(tensor.numel() for tensor in tensors_of(memories).values()))
    largest = max(sizes, default=0)
    return {
        "total": total,
        "removed": removed,
        "one_module": largest,
        "all_modules": sum(sizes),
        "one_module_share": largest / max(1, removed),
    }
