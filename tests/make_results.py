"""The tables of the documents, made from the JSON files in data/results/.

    python tests/make_results.py                      write every table into its place
    python tests/make_results.py --check              exit 1 if a table differs from its JSON file

A table stands between `<!-- results: NAME -->` and `<!-- /results -->`. It is made from data/results/NAME.json:

    {"command": lines, "commit": "1a2b3c4", "machine": "two cores of ...",
     "columns": [names], "rows": {label: [numbers, texts or null]},
     and optionally:
     "note": a sentence or two, "corner": the heading of the labels,
     "format": "{:.2f}" for every number, or a list with one for each column,
     "star": true to mark the lowest number of each row with a star}

`import` makes such a file from finished work:

    ... import NAME RUN [RUN ...]                     the table of `eval.py compare`
    ... import NAME SWEEP                             the table of a sweep's folder; with --sweep sparsity, a row for
                                                      each sparsity and a column for each way
    ... import NAME FILE.md [--title WORDS]           a printed table, the first one after these words
    ... import NAME RUN --report                      NAME-perplexity, -swap, -holds, -ledger and -router of one run
    ... import NAME RUN [RUN ...] --summary           one run or several seeds, without modules and with them
    ... import NAME SWEEP --controls                  the folder of --sweep ablations, and the controls of its last rows

`--also "LABEL" RUN [RUN ...]` adds a row of other runs to the last two, and `--stranger LABEL RUN ...` a row of runs with
one more module at their end: this module on the texts of the others.

Each needs --machine. A new NAME also needs --command. The commit is the current one unless --commit is given.
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data.tables import by_way, quality, ratios, saved_results, spread, table, together

DOCUMENTS = (ROOT / "README.md", ROOT / "data/RESULTS.md", ROOT / "tests/SPEED.md")
RESULTS = ROOT / "data/results"
MARKED = re.compile(r"(<!-- results: (\S+) -->\n).*?(<!-- /results -->)", re.DOTALL)

# JSON -> Markdown ----------------------------------------------------------------------------------------------------


def shown(value, template):
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    return template.format(value)


def render_table(result):
    """The table itself."""
    columns = result["columns"]
    formats = result.get("format", "{}")
    if isinstance(formats, str):
        formats = [formats] * len(columns)
    rows = {}
    for label, values in result["rows"].items():
        rows[label] = [shown(value, template) for value, template in zip(values, formats, strict=True)]
        if result.get("star"):
            lowest = values.index(min(values))
            rows[label] = [f"{text}{'*' if i == lowest else ' '}" for i, text in enumerate(rows[label])]
    return table(result.get("corner", ""), columns, rows)


def render(result):
    """The table with its origin: command, commit, machine, note."""
    origin = f"commit {result['commit']}, {result['machine']}."
    commands = result["command"].split("\n")
    if len(commands) == 1:
        text = f"{render_table(result)}\n\n`{commands[0]}` at {origin}"
    else:
        text = f"```\n{result['command']}\n```\n\n{render_table(result)}\n\nAt {origin}"
    if "note" in result:
        text += f" {result['note']}"
    return text


def read(name):
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def with_tables(path):
    """The text of a document, with every table as its JSON file has it."""

    def replaced(match):
        begin, name, end = match.groups()
        # The README has room for the table only. RESULTS.md has its command and machine.
        text = render_table(read(name)) if path.name == "README.md" else render(read(name))
        return f"{begin}{text}\n{end}"

    return MARKED.sub(replaced, path.read_text(encoding="utf-8"))


def write(check):
    """Write the tables, or only check them. Returns 1 if a check finds an outdated document, otherwise 0."""
    status = 0
    for path in DOCUMENTS:
        text = with_tables(path)
        if text == path.read_text(encoding="utf-8"):
            continue
        if check:
            print(f"{path.relative_to(ROOT)} has a table that differs from its JSON file: run tests/make_results.py")
            status = 1
        else:
            path.write_text(text, encoding="utf-8")
    return status


# Results -> JSON -----------------------------------------------------------------------------------------------------


def mean_of(values):
    """One number, or the mean and deviation of several seeds as text."""
    mean, deviation = spread(values)
    if deviation < 0.0005:
        return mean
    return f"{mean:.3f} +/- {deviation:.3f}"


def cells_of(row, columns):
    """The columns of a `together`, averaged over seeds; None where a column is missing."""
    return [mean_of(row[name]) if row.get(name) else None for name in columns]


def from_runs(folders):
    """The table of `eval.py compare`."""
    found = {str(folder): together([folder]) for folder in folders}
    settings = [{**saved_results(folder)["settings"], "seed": None} for folder in folders]
    if len(folders) > 1 and settings.count(settings[0]) == len(folders):
        found["mean +/- std"] = together(folders)
    return from_rows(found)


def from_rows(found):
    """The table of {label: `together`}, with every column that occurs in a row."""
    columns = []
    for row in found.values():
        columns += [name for name, values in row.items() if values and name not in columns]
    rows = {label: cells_of(row, columns) for label, row in found.items()}
    return {"columns": columns, "rows": rows, "format": "{:.3f}"}


def from_sweep(path):
    """The table of one sweep.json. The sweep `sparsity` has a table of its own."""
    sweep = json.loads(path.read_text(encoding="utf-8"))
    rows = sweep["rows"]  # {label: a `together`, with the folders of its runs under "runs"}
    if sweep["sweep"] == "sparsity":
        return from_tradeoff(rows)
    for row in rows.values():
        del row["runs"]
    return from_rows(rows)


def from_tradeoff(sweep):
    """Perplexity / unpruned: "sparsity 0.1, solved" is the row "0.1" and the column "solved"."""
    ways = by_way(sweep)
    rows = {}
    for sparsity in next(iter(ways.values())):
        found = [points.get(sparsity) for points in ways.values()]  # None where a sweep was stopped
        rows[sparsity] = [row and mean_of(quality(row)) for row in found]
    return {"corner": "sparsity", "columns": list(ways), "rows": rows, "format": "{:.3f}"}


def from_report(folder):
    """{part: table} of one run's results.json."""
    results = saved_results(folder)
    perplexity = results["perplexity"]
    swap = results["swap"]
    ledger = results["ledger"]
    router = results["router"]
    domains = list(perplexity["unpruned"])

    labels = {
        "unpruned": "unpruned",
        "backbone": "backbone alone",
        "koff": "KOFF, matching module",
        "routed": "KOFF, routed module",
    }
    rows = {}
    for variant, ratio in ratios(results).items():
        rows[labels[variant]] = [*perplexity[variant].values(), float(np.mean(ratio)), max(ratio)]
    formats = ["{:.2f}"] * len(domains) + ["{:.3f} x"] * 2
    parts = {"perplexity": {"columns": [*domains, "mean ratio", "worst"], "rows": rows, "format": formats}}

    rows = {domain: list(row.values()) for domain, row in swap.items()}
    parts["swap"] = {"columns": list(swap), "rows": rows, "format": "{:.2f}", "star": True}

    rows = {}
    for domain, row in swap.items():
        others = [value for module, value in row.items() if module != domain]
        own = [perplexity["unpruned"][domain], row[domain], perplexity["backbone"][domain]]
        rows[domain] = [*own, float(np.mean(others)), max(others)]
    columns = ["unpruned", "own module", "no module", "others, mean", "others, worst"]
    parts["holds"] = {"columns": columns, "rows": rows, "format": "{:.2f}"}

    rows = {"unpruned": [ledger["total"], None, None]}
    for name, label in (("removed", "removed"), ("one_module", "one module"), ("all_modules", "all modules")):
        rows[label] = [ledger[name], ledger[f"{name}_bytes"], ledger[name] / ledger["removed"]]
    columns = ["parameters", "bytes", "of what was removed"]
    parts["ledger"] = {"columns": columns, "rows": rows, "format": ["{:,}", "{:,}", "{:.0%}"]}

    columns = ["accuracy", "windows", "unsure", "unsure, other languages", "windows", "wrong module costs"]
    keys = ("accuracy", "windows", "unsure", "unsure_other_languages", "other_windows", "wrong_route_cost")
    formats = ["{:.4f}", "{:,}", "{:.1%}", "{:.1%}", "{:,}", "{:.3f} x"]
    parts["router"] = {"columns": columns, "rows": {"router": [router.get(k) for k in keys]}, "format": formats}
    return parts


def from_summary(folders, also):
    """The README's summary: runs unpruned, as a backbone alone and with modules, and the runs `also` {label: folders}
    with the module where they have any."""
    rows = {}

    def add(label, some, variant):
        found = [ratios(one)[variant] for one in some]
        ledger = some[0]["ledger"]
        size = ledger["total"]
        if variant != "unpruned":
            size -= ledger["removed"]
        if variant == "koff":
            size += ledger["one_module"]
        means = [float(np.mean(ratio)) for ratio in found]
        rows[label] = [size / 1e6, mean_of(means), mean_of([max(ratio) for ratio in found])]

    results = [saved_results(folder) for folder in folders]
    add("unpruned", results, "unpruned")
    add("backbone alone", results, "backbone")
    add("KOFF: backbone and the text's own module", results, "koff")
    for label, others in also.items():
        some = [saved_results(folder) for folder in others]
        add(label, some, "koff" if some[0]["swap"] else "backbone")
    columns = ["parameters at work", "perplexity / unpruned", "worst language"]
    return {"columns": columns, "rows": rows, "format": ["{:.2f}M", "{:.3f}", "{:.3f}"]}


def from_controls(sweep, also, strangers):
    """What each part is worth: perplexity / unpruned. `also` and `strangers` are {label: folders}."""
    rows = {}

    def add(label, runs):
        row = together(runs)
        sizes = [saved_results(run)["ledger"]["one_module"] for run in runs]
        size = f"{np.mean(sizes) / 1e3:.0f}k" if max(sizes) else None
        rows[label] = [*cells_of(row, ["backbone", "koff", "worst"]), size, mean_of(row["minutes"])]

    def add_ratios(label, found):  # for each seed, the ratios of all domains
        means = [np.mean(ratio) for ratio in found]
        worst = [max(ratio) for ratio in found]
        rows[label] = [None, mean_of(means), mean_of(worst), None, None]

    runs_of = {label: row["runs"] for label, row in sweep.items()}
    for label, runs in {**runs_of, **also}.items():
        add(label, runs)
    whole = [saved_results(run)["controls"] for run in runs_of["LoRA + KV, solved and trained"]]
    for label in whole[0]:
        add_ratios(label, [list(one[label].values()) for one in whole])
    for label, runs in strangers.items():
        found = []
        for results in map(saved_results, runs):
            *domains, stranger = results["swap"]
            unpruned = results["perplexity"]["unpruned"]
            found.append([results["swap"][domain][stranger] / unpruned[domain] for domain in domains])
        add_ratios(label, found)
    columns = ["backbone", "koff", "worst", "a module", "minutes"]
    return {"columns": columns, "rows": rows, "format": "{:.3f}"}


def from_markdown(text, title):
    """The first table after `title`. A column whose numbers look alike becomes numbers with a format to match."""
    if title not in text:
        raise SystemExit(f"the file does not contain {title!r}")
    lines = []
    for line in text[text.index(title) :].splitlines():
        if line.startswith("|"):
            lines.append([cell.strip() for cell in line.strip("|").split("|")])
        elif lines:
            break
    head, _, *body = lines
    corner, *columns = head
    rows = {row[0]: row[1:] for row in body}
    formats = []
    for i in range(len(columns)):
        matches = {label: re.fullmatch(r"(-?[\d,]*\d)(\.\d+)?( x|%)?", row[i]) for label, row in rows.items()}
        looks = {(len(match[2] or ".") - 1, match[3] or "") for match in matches.values() if match}
        formats.append("{}")
        for label, row in rows.items():
            if row[i] == "-":
                row[i] = None
            elif matches[label] and len(looks) == 1:
                digits, unit = looks.copy().pop()
                formats[i] = f"{{:,.{digits}f}}{unit}" if digits == 0 else f"{{:.{digits}f}}{unit}"
                number = row[i].removesuffix(unit).replace(",", "")
                row[i] = float(number) if digits else int(number)
    return {"corner": corner, "columns": columns, "rows": rows, "format": formats}


def save(name, result, args):
    """Write NAME.json. Without --command it keeps its earlier command."""
    path = RESULTS / f"{name}.json"
    old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    command = "\n".join(args.command) if args.command else old.get("command")
    if not command:
        raise SystemExit(f"{name} is new: give its --command")
    origin = {"command": command, "commit": args.commit, "machine": args.machine}
    if args.note:
        origin["note"] = args.note
    text = json.dumps({**origin, **result}, indent=1, ensure_ascii=False)
    # A list of numbers takes one line, not one line for each number.
    text = re.sub(r"\[[^\[\]]*\]", lambda match: re.sub(r"\s*\n\s*", " ", match[0]), text)
    path.write_text(text.replace("[ ", "[").replace(" ]", "]") + "\n", encoding="utf-8")
    print(path.relative_to(ROOT))


def import_results(args):
    folder = args.source[0]
    if folder.suffix == ".md":
        save(args.name, from_markdown(folder.read_text(encoding="utf-8"), args.title), args)
    elif args.report:
        for part, result in from_report(folder).items():
            save(f"{args.name}-{part}", result, args)
    elif (folder / "sweep.json").exists():
        sweep = folder / "sweep.json"
        if args.controls:
            rows = json.loads(sweep.read_text(encoding="utf-8"))["rows"]
            save(args.name, from_controls(rows, labelled(args.also), labelled(args.stranger)), args)
        else:
            save(args.name, from_sweep(sweep), args)
    elif args.summary:
        save(args.name, from_summary(args.source, labelled(args.also)), args)
    else:
        save(args.name, from_runs(args.source), args)


def labelled(rows):
    """[[label, run, ...], ...] of the command line as {label: runs}."""
    return {label: runs for label, *runs in rows}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    commands = parser.add_subparsers(dest="what")
    one = commands.add_parser("import")
    one.add_argument("name")
    one.add_argument("source", nargs="+", type=Path)
    one.add_argument("--report", action="store_true")
    one.add_argument("--summary", action="store_true")
    one.add_argument("--controls", action="store_true")
    one.add_argument("--also", nargs="+", action="append", default=[], metavar=("LABEL", "RUN"))
    one.add_argument("--stranger", nargs="+", action="append", default=[], metavar=("LABEL", "RUN"))
    one.add_argument("--title", default="")
    one.add_argument("--command", action="append", help="one line of the command; repeat it for further lines")
    one.add_argument("--machine", required=True)
    one.add_argument("--note")
    one.add_argument("--commit", help="[the current one]")
    args = parser.parse_args(argv)
    if args.what is None:
        return write(args.check)
    if args.commit is None:
        done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        args.commit = done.stdout.strip()
    import_results(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
