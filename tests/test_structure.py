"""The ladder: model.py -> koff.py -> data/*.py -> eval.py -> train.py. Each imports only to its left, and without circles."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LADDER = ("model", "koff", "data", "eval", "train")
FILES = [*(ROOT / f"{name}.py" for name in LADDER if name != "data"), *sorted((ROOT / "data").rglob("*.py"))]


def name_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imports(path):
    """Our own modules that a file imports, wherever in it the import stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "data":  # a file of data/, or data/__init__.py itself
            files = {alias.name for alias in node.names if (ROOT / "data" / f"{alias.name}.py").exists()}
            found |= {f"data.{name}" for name in files} or {"data.__init__"}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return {name for name in found if name.split(".")[0] in LADDER}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_run_to_the_left_and_stand_at_the_top(path):
    own = LADDER.index(name_of(path).split(".")[0])
    for name in imports(path):
        there = LADDER.index(name.split(".")[0])
        assert there < own or (there == own and name.startswith("data.")), f"{path.name} imports {name}"
    for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(function, ast.FunctionDef):
            inside = [node for node in ast.walk(function) if isinstance(node, ast.Import | ast.ImportFrom)]
            names = {a.name for n in inside if isinstance(n, ast.Import) for a in n.names}
            names |= {n.module for n in inside if isinstance(n, ast.ImportFrom)}
            assert not {name.split(".")[0] for name in names} & set(LADDER), f"{function.name} imports {names}"


def test_no_file_is_on_a_circle():
    left = {name_of(path): imports(path) for path in FILES}
    while left:  # take away what imports nothing that is still there
        free = [name for name, needs in left.items() if not needs & left.keys() - {name}]
        assert free, f"a circle among {sorted(left)}"
        for name in free:
            del left[name]


def test_train_py_is_loaded_once():
    code = (
        "import sys, runpy; sys.argv = ['train.py', '--help']\ntry: runpy.run_path('train.py', run_name='__main__')\n"
    )
    code += "except SystemExit: print('train' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("False\n")  # it is __main__ alone, and nothing imported it a second time
