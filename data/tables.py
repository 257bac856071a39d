"""Tables in Markdown, the files that a report consists of, and the figures of finished runs side by side.

save(folder, {"report.md": table("", ["mean"], {"french": ["1.03"]}), "results.json": results})
print(side_by_side({"seeds 0 to 2": together([folder_0, folder_1, folder_2])}))
"""

import contextlib
import json
from pathlib import Path

import numpy as np

from data import BadInput, atomic
from data.checkpoint import tensors_of
from data.progress import read_log
from data.settings import Settings


def spread(values):
    """(mean, sample deviation) of some values, such as the seeds of a row; the deviation of a single one is 0."""
    deviation = np.std(values, ddof=1) if len(values) > 1 else 0.0
    return np.mean(values), deviation


def table(corner, columns, rows):
    """A Markdown table that also reads well on a screen. columns [text]; rows {label: [text, one per column]}."""
    lines = [[corner, *columns]]
    for label, texts in rows.items():
        lines.append([label, *texts])
    cells = np.array(lines)  # [1 + rows, 1 + columns] of text
    widths = np.char.str_len(cells).max(axis=0)
    # Labels stand to the left, figures to the right, which a colon in the rule below the head tells Markdown.
    padded = np.char.rjust(cells, widths)
    padded[:, 0] = np.char.ljust(cells[:, 0], widths[0])
    rule = np.char.rjust(":", widths + 2, "-")
    rule[0] = "-" * (widths[0] + 2)
    text = ["| " + " | ".join(line) + " |" for line in padded]
    text.insert(1, "|" + "|".join(rule) + "|")
    return "\n".join(text)


def save(folder, files, show=True):
    """Write {name: text, or what becomes JSON} into the folder, and show the texts on the screen."""
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
    """Under it, what the file at `path` holds is made use of: BadInput where that fails, for it was not saved by us."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise BadInput(f"{path} is not what this version saves ({error!r}); make it again.") from None


def saved_results(folder):
    """results.json of a finished run. BadInput if there is none, or one of another version."""
    path = Path(folder, "results.json")
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        if not {"perplexity", "swap", "controls", "sparsity", "settings"} <= results.keys():
            raise ValueError("it is of another version")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise BadInput(f"{path} cannot be read ({error}); name runs that train.py has finished.") from None
    return results


def ratios(results):
    """{variant: [perplexity / that of the unpruned model, one per domain]} of the results of a run."""
    perplexity = results["perplexity"]
    found = {}
    for variant, row in perplexity.items():
        if row:  # a run without modules has an empty one for "koff" and "routed"
            found[variant] = [x / perplexity["unpruned"][domain] for domain, x in row.items()]
    return found


def settled(log, results):
    """The first step in log.jsonl at which the gates had closed, in expectation, 95% of what is closed in the end.

    None if they never had while they learnt. Later steps do not count: then the mask is fixed, and nothing closes.
    """
    settings = Settings.from_saved(results["settings"])
    count = settings.count  # "physical" or "paper": the sparsity that the run aimed at
    for entry in read_log(log):
        if (
            entry["step"] < settings.gate_steps and entry.get(count, 0) >= 0.95 * results["sparsity"][count]
        ):  # else it is no step's
            return entry["step"]
    return None


def summary(folder):
    """The figures of a finished run that tables of several runs show: {column: number, None where it has none}.

    physical, paper, expected    sparsities: shares of all parameters
    backbone, koff, routed       perplexity / unpruned, mean over domains: no module, the domain's own, the router's
    worst                        the highest such ratio of a domain with its own module
    diagonal                     share of the domains whose own module is better on them than every other
    router, settled, minutes     the router's accuracy, see `settled`, how long the run took
    """
    results = saved_results(folder)
    with as_saved(Path(folder, "results.json")):
        return figures_of(results, Path(folder, "log.jsonl"))


def figures_of(results, log):
    """The `summary` of results and a log.jsonl."""
    ratio = ratios(results)
    figures = {**results["sparsity"], "backbone": np.mean(ratio["backbone"])}
    figures |= dict.fromkeys(("koff", "routed", "worst", "diagonal"))  # None, unless there are modules
    if results["swap"]:
        figures["koff"] = np.mean(ratio["koff"])
        figures["routed"] = np.mean(ratio["routed"])
        figures["worst"] = max(ratio["koff"])
        own_is_best = [min(row, key=row.get) == domain for domain, row in results["swap"].items()]
        figures["diagonal"] = np.mean(own_is_best)
    figures["router"] = results["router"]["accuracy"]
    figures["settled"] = settled(log, results) if log.exists() else None
    figures["minutes"] = results["seconds"] / 60
    return figures


def together(folders):
    """The `summary` of several runs, such as seeds: {column: [one value per run], None where any run has none}."""
    summaries = list(map(summary, folders))
    columns = {}
    for name in summaries[0]:
        values = [figures[name] for figures in summaries]
        columns[name] = None if None in values else values
    return columns


def quality(row):
    """Perplexity / unpruned of a `together`, [one value per run]: KOFF's, or the backbone's if runs have no modules."""
    return row["koff"] or row["backbone"]


def by_way(rows):
    """{way: {sparsity, as text: row}} of a sweep of sparsity, in which a row is "sparsity 0.1, solved"."""
    ways = {}
    for label, row in rows.items():
        sparsity, _, way = label.removeprefix("sparsity ").partition(", ")
        ways.setdefault(way or "KOFF", {})[sparsity] = row
    return ways


def side_by_side(rows):
    """{label: `together`} as a table: of one run the value, of several (seeds) mean +/- sample deviation."""
    columns = []  # that some row has
    for row in rows.values():
        columns += [name for name, values in row.items() if values and name not in columns]
    cells = {}
    for label, row in rows.items():
        cells[label] = [cell(row.get(name)) for name in columns]
    return table("", columns, cells)


def cell(values):
    if not values:
        return "-"
    mean, deviation = spread(values)
    if deviation < 0.0005:  # would be shown as 0.000
        return f"{mean:.3f}"
    return f"{mean:.3f} +/- {deviation:.3f}"


# Parameters ----------------------------------------------------------------------------------------------------------


def parameters_of(module):
    """How many parameters a module {block: Memory} has."""
    return sum(tensor.numel() for tensor in tensors_of(module).values())


def ledger(total, removed, modules):
    """What left the model against what the modules hold, in parameters; modules {domain: {block: Memory}}."""
    sizes = [parameters_of(module) for module in modules.values()]
    largest = max(sizes, default=0)
    return {
        "total": total,
        "removed": removed,
        "one_module": largest,
        "all_modules": sum(sizes),
        "one_module_share": largest / max(1, removed),
    }
