"""Runs of earlier versions stay readable: run_b144f8a.zip is one that the commit b144f8a made.

Its model has 34,344 random parameters. Its text is the first 60 lines of two handbooks; the tokenizer is the shipped one.
"""

import json
import shutil
import zipfile
from pathlib import Path

import pytest

import eval as evaluation
import train
from data.settings import Settings

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def old(tmp_path):
    """The folder of the old run, beside its model and its text."""
    with zipfile.ZipFile(ROOT / "tests/run_b144f8a.zip") as file:
        file.extractall(tmp_path)
    for folder in ("base", "run/backbone"):
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(ROOT / "data/base" / name, tmp_path / folder)
    (tmp_path / "data").mkdir()
    for name in ("german", "french"):
        lines = (ROOT / f"data/handbook/{name}.txt").read_text(encoding="utf-8").splitlines()
        (tmp_path / f"data/{name}.txt").write_text("\n".join(lines[:60]) + "\n", encoding="utf-8")
    settings = tmp_path / "run/settings.json"
    settings.write_text(settings.read_text().replace("HERE", str(tmp_path)))
    return tmp_path / "run"


def test_its_settings_are_read_under_todays_names(old):
    saved = json.loads((old / "settings.json").read_text())
    assert (saved["fix_mask"], saved["text"], saved["tail"], saved["constraint"]) == (0.5, 0.9, "renormalise", "hinge")
    s = Settings.from_file(old / "settings.json")
    assert (s.gate_share, s.text_share, s.objective, s.constraint, s.rise) == (0.5, 0.9, "kl-renormalise", "hinge", 0)
    assert (s.repair, s.gate_init) == ("none", saved["gate_init"])
    assert s.gate_family == "hard-concrete"  # it had no such setting


def test_a_setting_that_nobody_knows_is_named(old, capsys):
    saved = json.loads((old / "settings.json").read_text())
    (old / "settings.json").write_text(json.dumps({**saved, "warmth": 3}))
    assert evaluation.main(["report", str(old)]) == 2
    assert "the unknown setting warmth" in capsys.readouterr().err


def test_its_report_is_made_again_with_the_same_numbers(old, capsys):
    before = json.loads((old / "results.json").read_text())
    assert evaluation.main(["report", str(old)]) == 0
    after = json.loads((old / "results.json").read_text())
    for part in ("perplexity", "swap", "controls"):
        assert after[part].keys() == before[part].keys()
        for name, row in before[part].items():
            assert after[part][name] == pytest.approx(row, rel=1e-5), (part, name)
    assert after["sparsity"] == pytest.approx(before["sparsity"])
    assert after["ledger"] == before["ledger"] and after["layers"] == before["layers"]
    accuracies = after["router"].pop("accuracies")  # earlier versions had no more than one for all domains
    assert after["router"] == pytest.approx(before["router"]) and set(accuracies) == set(before["swap"])
    assert after["seconds"] == before["seconds"]


def test_another_model_in_its_place_is_noticed(old, capsys):
    config = json.loads((old.parent / "base/config.json").read_text())
    (old.parent / "base/config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-5}))
    assert evaluation.main(["report", str(old)]) == 2
    assert "began with another model" in capsys.readouterr().err


def test_it_generates_what_it_generated(old, capsys):
    assert evaluation.main(["generate", str(old), "Der Kernel ist", "--module", "german", "--tokens", "8"]) == 0
    assert capsys.readouterr().out == "Der Kernel istyeryeryeryeryeryeryeryer\n"


def test_its_saved_results_stand_beside_new_ones(old, capsys):
    assert evaluation.main(["compare", str(old)]) == 0
    assert " 0.021 " in capsys.readouterr().out


def test_a_module_is_added_to_it(old, capsys):
    text = old.parent / "dutch.txt"
    text.write_text((old.parent / "data/german.txt").read_text())
    assert train.main(["--add", str(text), "--out", str(old)]) == 0
    assert "dutch" in json.loads((old / "results.json").read_text())["swap"]


def test_pictures_are_drawn_of_its_log(old):
    pytest.importorskip("matplotlib")
    assert evaluation.main(["plot", str(old)]) == 0
    assert (old / "curves.png").exists()
