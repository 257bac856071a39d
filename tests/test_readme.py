"""The documents have to stay true: their commands, pointers into the code, links, tables and examples."""

import ast
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import eval as evaluation
import make_results
import train
from data.run import Run, fitting_gates
from data.settings import PRESETS, Settings
from data.sweeps import SWEEPS
from data.tables import ratios, saved_results

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
FORKS = ROOT / "data/FORKS.md"
DOCUMENTS = [
    README,
    ROOT / "data/README.md",
    ROOT / "data/RESULTS.md",
    ROOT / "data/PAPER.md",
    ROOT / "tests/SPEED.md",
    FORKS,
]

each_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def text_of(path):
    return path.read_text(encoding="utf-8")


def commands(script):
    """The arguments of every `python SCRIPT ...` in the documents, except for the forks: see test_forks.py."""
    found = []
    for path in DOCUMENTS:
        if path == FORKS:
            continue
        text = re.sub(r"\n## Forks\n.*?\n## ", "\n## ", text_of(path), flags=re.DOTALL)
        for line in re.findall(rf"python {re.escape(script)}([^;#\n`|]*)", text):
            found.append(shlex.split(line.replace("$s", "0")))
    return found


def block_with(words):
    """The code block of the README that contains these words."""
    blocks = re.findall(r"^```\w*\n(.*?)^```$", text_of(README), re.DOTALL | re.MULTILINE)
    (block,) = [block for block in blocks if words in block]
    return block


# The text itself -----------------------------------------------------------------------------------------------------


def test_the_readme_is_short():
    assert len(text_of(README).splitlines()) <= 200
    assert len(text_of(README).split()) <= 2000


def test_the_command_that_the_continuous_integration_takes_from_the_readme():
    assert re.search(
        r"^```\npip install -r requirements-test.txt && python -m pytest -n 2 --dist loadfile\n```$",
        text_of(README),
        re.M,
    )


def test_every_training_command_parses_and_fits_its_model():
    found = [arguments for arguments in commands("train.py") if "--help" not in arguments]
    assert len(found) >= 20
    for arguments in found:
        s = train.parse(arguments).settings
        if s.model == Settings().model:  # the shipped model: here it must have the blocks that the command names
            fitting_gates(s)


def test_every_evaluation_command_parses():
    found = commands("eval.py")
    assert len(found) >= 15
    for arguments in found:
        assert evaluation.parse(arguments)


def test_every_sweep_and_preset_stands_in_the_documents():
    found = commands("train.py")
    assert {a[a.index("--sweep") + 1] for a in found if "--sweep" in a} == set(SWEEPS)
    presets = text_of(ROOT / "data/RESULTS.md")
    assert all(f"`{name}`" in presets for name, settings in PRESETS.items() if "/" in settings.get("model", ""))


def names_in(path):
    """The names that a file defines, in the form of a pointer: `function`, `Class`, `Class.method`, `CONSTANT`."""
    names = set()
    for node in ast.parse(text_of(path)).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
        if isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


def test_every_pointer_into_the_code_is_found():
    """A pointer has the form `name` ([file.py](path/to/file.py)), possibly with a line break in it."""
    pointers = []
    for path in DOCUMENTS:
        before = len(pointers)
        for name, shown, link in re.findall(r"`([\w.]+)`\s+\(\[([^\]]+\.py)\]\(([^)]+)\)\)", text_of(path)):
            pointers.append((path.parent / link, shown, name))
        # No pointer has another form.
        assert len(re.findall(r"\(\[[^\]]+\.py\]", text_of(path))) == len(pointers) - before
    assert len(pointers) >= 25
    for path, shown, name in pointers:
        assert path.name == shown and name in names_in(path), f"{name} is not in {shown}"


def anchors_in(path):
    """The anchors that GitHub gives to the headings of a document."""
    headings = re.findall(r"^#+ (.*)$", text_of(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_document
def test_every_link_leads_to_a_file_and_a_heading(path):
    for link in re.findall(r"\]\(([^)\s]+)\)", text_of(path)):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        there = path.parent / name if name else path
        assert there.exists(), link
        assert not anchor or anchor in anchors_in(there), link


def test_every_file_of_the_data_folder_is_described_below_those_that_it_imports():
    """data/README.md promises this order, in which a reader meets every file before it is used."""
    described = re.findall(r"^\| `(\w+)\.py` \|", text_of(ROOT / "data/README.md"), re.M)
    assert sorted(described) == sorted(path.stem for path in (ROOT / "data").glob("*.py"))
    for i, name in enumerate(described):
        for node in ast.walk(ast.parse(text_of(ROOT / f"data/{name}.py"))):
            needed = set()
            if isinstance(node, ast.ImportFrom) and node.module == "data":
                needed = {alias.name for alias in node.names} & set(described)
            elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("data."):
                needed = {node.module.removeprefix("data.")}
            assert needed <= set(described[:i]), f"{name}.py imports {needed}"


# Tables --------------------------------------------------------------------------------------------------------------


def test_every_table_agrees_with_its_json_file():
    assert make_results.main(["--check"]) == 0


def test_every_json_file_is_shown_and_names_its_origin():
    shown = {name for path in make_results.DOCUMENTS for _, name, _ in make_results.MARKED.findall(text_of(path))}
    assert shown == {path.stem for path in make_results.RESULTS.glob("*.json")}
    for name in shown:
        result = make_results.read(name)
        assert {"command", "commit", "machine", "columns", "rows"} <= result.keys()


def test_a_table_that_was_changed_by_hand_is_found_and_corrected(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(make_results, "ROOT", tmp_path)
    monkeypatch.setattr(make_results, "DOCUMENTS", [tmp_path / "RESULTS.md"])
    right = text_of(ROOT / "data/RESULTS.md")
    (tmp_path / "RESULTS.md").write_text(right.replace("| unpruned ", "| pruned   ", 1))
    assert make_results.main(["--check"]) == 1
    assert "RESULTS.md" in capsys.readouterr().out
    assert make_results.main([]) == 0
    assert text_of(tmp_path / "RESULTS.md") == right


# The examples of the README ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder where out/handbook is a run of the shipped model with little text and a few steps."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "text").mkdir()
    for name in ("german", "french"):
        lines = text_of(ROOT / f"data/handbook/{name}.txt").splitlines()
        (folder / f"text/{name}.txt").write_text("\n".join(lines[:150]) + "\n", encoding="utf-8")
    short = shlex.split("--steps 4 --batch 1 --seq-len 32 --fisher-sequences 4 --eval-windows 2 --eval-len 32")
    assert train.main([*short, "--data", str(folder / "text"), "--out", str(folder / "out/handbook")]) == 0
    return folder


def test_the_python_example_runs(home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    exec(compile(block_with("from data.run import Run"), "README.md", "exec"), {})
    assert len([line for line in capsys.readouterr().out.splitlines() if line.strip()]) >= 3


def test_a_colleague_gets_a_run_with_one_module(home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    subprocess.run(["bash", "-ec", block_with("mkdir -p german/modules")], check=True)
    assert Run("german").names == ["german"]
    assert evaluation.main(["generate", "german", "Der Kernel ist", "--tokens", "3", "--module", "german"]) == 0
    assert "Der Kernel ist" in capsys.readouterr().out
    assert evaluation.main(["generate", "german", "Der Kernel ist", "--tokens", "3", "--module", "french"]) == 2


@pytest.mark.parametrize("script", ["make_base", "make_withheld"])
def test_the_scripts_behind_the_files_still_start(script):
    done = subprocess.run([sys.executable, f"tests/{script}.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("usage:"), done.stderr


# Runs become JSON ----------------------------------------------------------------------------------------------------


@pytest.fixture
def imported(tmp_path, monkeypatch):
    """Import into an empty folder; returns a function that makes the results of a name."""
    monkeypatch.setattr(make_results, "ROOT", tmp_path)
    monkeypatch.setattr(make_results, "RESULTS", tmp_path)

    def run(name, *arguments):
        origin = ["--command", "python train.py", "--machine", "two cores", "--commit", "1a2b3c4"]
        assert make_results.main(["import", name, *map(str, arguments), *origin]) == 0

    return run


def test_a_report_becomes_the_tables_that_it_shows(home, imported):
    run = home / "out/handbook"
    imported("default", run, "--report")
    report = text_of(run / "report.md")
    for part in ("perplexity", "swap", "holds"):
        assert make_results.render_table(make_results.read(f"default-{part}")) in report
    ledger = saved_results(run)["ledger"]
    assert f"{ledger['one_module']:,}" in make_results.render_table(make_results.read("default-ledger"))
    assert make_results.render(make_results.read("default-router")).endswith(
        "`python train.py` at commit 1a2b3c4, two cores."
    )


def figures_in(text):
    """{column: cell} of a table with one row, without its empty cells."""
    head, _, row = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    pairs = [(name.strip(), cell.strip()) for name, cell in zip(head, row, strict=True)]
    return {name: cell for name, cell in pairs if cell != "-"}


def test_several_runs_become_the_table_of_compare(home, imported, capsys):
    run = home / "out/handbook"
    imported("default", run)
    ours = figures_in(make_results.render_table(make_results.read("default")))
    capsys.readouterr()
    evaluation.main(["compare", str(run)])
    assert ours == figures_in(capsys.readouterr().out)


@pytest.fixture
def pruned(home, tmp_path):
    """The folder of a run without modules that is otherwise that of `home`."""
    results = saved_results(home / "out/handbook")
    results["perplexity"] |= {"koff": {}, "routed": {}}
    results["swap"] = {}
    results["ledger"]["one_module"] = 0
    (tmp_path / "pruned").mkdir()
    (tmp_path / "pruned/results.json").write_text(json.dumps(results))
    return tmp_path / "pruned"


def test_pruned_runs_stand_beside_runs_with_modules(home, imported, pruned):
    run = home / "out/handbook"
    imported("summary", run, "--summary", "--also", "pruning only", pruned, "--also", "the same", run, run)
    rows = make_results.read("summary")["rows"]
    assert rows["unpruned"][1:] == [1.0, 1.0]
    assert rows["pruning only"] == rows["backbone alone"]
    ours = rows["KOFF: backbone and the text's own module"]
    assert rows["the same"] == pytest.approx(ours)
    assert rows["unpruned"][0] > ours[0] > rows["pruning only"][0]


def test_the_controls_are_one_table(home, imported, pruned, tmp_path):
    run = home / "out/handbook"
    results = saved_results(run)
    runs = {"pruning only": [pruned], "LoRA + KV, solved and trained": [run, run]}
    rows = {label: {"runs": [str(folder) for folder in folders]} for label, folders in runs.items()}
    (tmp_path / "sweep.json").write_text(json.dumps({"sweep": "ablations", "rows": rows}))
    more = ["--also", "another", run, "--stranger", "a stranger's module", run]
    imported("controls", tmp_path, "--controls", *more)
    rows = make_results.read("controls")["rows"]
    means = {kind: sum(ratio) / len(ratio) for kind, ratio in ratios(results).items()}
    minutes = pytest.approx(results["seconds"] / 60)
    size = f"{results['ledger']['one_module'] / 1e3:.0f}k"
    assert rows["pruning only"] == [pytest.approx(means["backbone"]), None, None, None, minutes]
    worst = pytest.approx(max(ratios(results)["koff"]))
    assert rows["another"] == [pytest.approx(means["backbone"]), pytest.approx(means["koff"]), worst, size, minutes]
    assert rows["LoRA + KV, solved and trained"][1] == pytest.approx(means["koff"])
    for label, ratio in results["controls"].items():
        assert rows[label][1] == pytest.approx(sum(ratio.values()) / len(ratio))
    *domains, last = results["swap"]  # as if the last one had been added later
    ratio = [results["swap"][domain][last] / results["perplexity"]["unpruned"][domain] for domain in domains]
    assert rows["a stranger's module"][1:3] == pytest.approx([sum(ratio) / len(ratio), max(ratio)])


def test_a_sweep_of_sparsity_has_a_column_for_each_way(imported, tmp_path):
    pruned = {"backbone": [1.5, 1.7], "koff": None}
    solved = {"backbone": [1.6], "koff": [1.25]}
    rows = {"sparsity 0.1, pruning only": pruned, "sparsity 0.1, solved": solved, "sparsity 0.2, pruning only": pruned}
    (tmp_path / "sweep.json").write_text(json.dumps({"sweep": "sparsity", "rows": rows}))
    imported("sparsity", tmp_path)
    found = make_results.read("sparsity")
    assert (found["corner"], found["columns"]) == ("sparsity", ["pruning only", "solved"])
    assert found["rows"] == {"0.1": ["1.600 +/- 0.141", 1.25], "0.2": ["1.600 +/- 0.141", None]}


def test_a_sweep_and_a_printed_table_become_json(imported, tmp_path):
    (tmp_path / "sweep").mkdir()
    both = {"runs": ["a", "b"], "physical": [0.25, 0.25], "koff": [1.1, 1.2], "settled": None}
    (tmp_path / "sweep/sweep.json").write_text(json.dumps({"sweep": "x", "rows": {"both": both}}))
    imported("sweep", tmp_path / "sweep")
    result = make_results.read("sweep")
    assert result["columns"] == ["physical", "koff"] and result["rows"] == {"both": [0.25, "1.150 +/- 0.071"]}

    printed = make_results.render_table(result)
    (tmp_path / "printed.md").write_text(f"# One\n\n| a | b |\n|---|--:|\n| c | 1 |\n\n# Two\n\n{printed}\n")
    imported("printed", tmp_path / "printed.md", "--title", "Two")
    again = make_results.read("printed")
    assert again["rows"] == result["rows"] and make_results.render_table(again) == printed


def test_a_new_name_needs_its_command(tmp_path, monkeypatch):
    monkeypatch.setattr(make_results, "RESULTS", tmp_path)
    (tmp_path / "printed.md").write_text("| a | b |\n|---|--:|\n| c | 1 |\n")
    with pytest.raises(SystemExit, match="--command"):
        make_results.main(["import", "new", str(tmp_path / "printed.md"), "--machine", "two cores"])
