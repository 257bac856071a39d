"""Domains that data/discover.py finds in mixed documents, against the domains that we mixed."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from data import discover
from data.corpus import domain_name
from make_domains import mutual_information, purity
from test_train import ROOT

OTHERS = ROOT / "data/other_languages.jsonl"


def paragraphs(language, count=60):
    lines = (ROOT / f"data/handbook/{language}.txt").read_text(encoding="utf-8").split("\n")
    return [line for line in lines if len(line) > 300][:count]


def mixed(path, domains):
    """Write the texts of {domain: [text]} in random order into a .jsonl. Returns {line: domain}."""
    lines = {json.dumps({"text": text}, ensure_ascii=False): name for name, texts in domains.items() for text in texts}
    order = list(lines)
    random.Random(0).shuffle(order)
    path.write_text("".join(f"{line}\n" for line in order), encoding="utf-8")
    return lines


def found(folder):
    """{file: [line]}."""
    return {path.stem: path.read_text(encoding="utf-8").splitlines() for path in sorted(folder.iterdir())}


def run(*given):
    return discover.main([str(value) for value in given])


def test_six_languages_are_told_apart_and_no_document_is_lost(tmp_path):
    languages = ("english", "french", "german", "italian", "portuguese", "spanish")
    given = mixed(tmp_path / "mix.jsonl", {name: paragraphs(name) for name in languages})
    assert run(tmp_path / "mix.jsonl", "--domains", 6, "--out", tmp_path / "found") == 0
    files = found(tmp_path / "found")
    assert sorted(line for lines in files.values() for line in lines) == sorted(given)  # each in one file
    of_file = {name: {given[line] for line in lines} for name, lines in files.items()}
    assert sorted(map(len, of_file.values())) == [1] * 6
    # Names are words of the language, which few others have.
    german = next(name for name, domains in of_file.items() if domains == {"german"})
    assert set(german.split("-")) < {"die", "der", "und", "das", "den", "sie", "werden", "ist"}


@pytest.mark.parametrize("languages", [("german",), ("french", "german", "spanish")])
def test_auto_finds_how_many_and_not_two_halves_of_one(tmp_path, languages, capsys, monkeypatch):
    monkeypatch.setattr(discover, "MOST", 6)  # for the sake of time
    given = mixed(tmp_path / "mix.jsonl", {name: paragraphs(name, 150) for name in languages})
    assert run(tmp_path / "mix.jsonl", "--out", tmp_path / "found") == 0
    files = found(tmp_path / "found")
    assert len(files) == len(languages) and sum(map(len, files.values())) == len(given)
    assert f"{len(languages) + 1} domains: prediction strength 0." in capsys.readouterr().out


def test_a_document_unlike_all_others_is_named_and_left_out(tmp_path, capsys):
    rows = [json.loads(line) for line in OTHERS.read_text(encoding="utf-8").splitlines()]
    japanese = next(row["text"] for row in rows if row["language"] == "japanese")
    given = mixed(tmp_path / "mix.jsonl", {"a": paragraphs("german"), "b": paragraphs("french"), "c": [japanese, "12"]})
    assert run(tmp_path / "mix.jsonl", "--domains", 2, "--out", tmp_path / "found") == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("fits no domain")]
    assert len(said) == 2 and any(japanese[:40] in line for line in said) and any("'12'" in line for line in said)
    kept = [given[line] for lines in found(tmp_path / "found").values() for line in lines]
    assert sorted(kept) == ["a"] * 60 + ["b"] * 60


@pytest.mark.parametrize("form", ["folders", "paragraphs", "lines"])
def test_documents_come_from_files_folders_and_paragraphs(tmp_path, form):
    texts = paragraphs("german", 50) + paragraphs("french", 50)
    mix = tmp_path / "mix"
    if form == "folders":
        (mix / "below").mkdir(parents=True)
        for i, text in enumerate(texts[:80]):
            (mix / ("below" if i % 2 else ".") / f"{i}.md").write_text(text, encoding="utf-8")
        mixed(mix / "more.jsonl", {"": texts[75:]})  # five are there twice
        (mix / ".hidden").write_text("no document", encoding="utf-8")
        (mix / ".git").mkdir()
        (mix / ".git/config").write_text("no document", encoding="utf-8")
        (mix / "picture.png").write_bytes(b"\x89PNG\0")
    else:
        mix = tmp_path / "mix.txt"
        if form == "paragraphs":  # of several lines each
            texts = [text.replace(" ", "\n", 2) for text in texts]
        mix.write_text(("\n \n" if form == "paragraphs" else "\n").join(texts) + "\n\n\n", encoding="utf-8")
    assert run(mix, "--domains", 2, "--out", tmp_path / "found") == 0
    files = found(tmp_path / "found")
    groups = [[json.loads(line)["text"] for line in lines] for lines in files.values()]
    assert sorted(text for group in groups for text in group) == sorted(texts)
    for group in groups:
        assert not 0.04 < np.mean([text in texts[:50] for text in group]) < 0.96


def test_modules_decide_and_the_rest_of_a_line_stays(tmp_path, capsys, monkeypatch):
    """On a run of the shipped model, from found domains, of which one has documents of the other."""
    monkeypatch.setattr(discover, "READ", 64)  # for the sake of time
    french, german = paragraphs("french", 200), paragraphs("german", 200)
    (tmp_path / "text").mkdir()
    mixed(tmp_path / "text/french.jsonl", {"": french[:150] + german[:8]})
    mixed(tmp_path / "text/german.jsonl", {"": german[8:150]})
    short = dict(preset="solved", device="cpu", dtype="float32", data=tmp_path / "text", out=tmp_path / "run",
                 fisher_sequences=4, repair_tokens=1024, solve_tokens=2048, curvature_tokens=512, kv_passages=2,
                 kv_places=4, eval_windows=1, eval_len=64, seq_len=64)  # fmt: skip
    assert train.main([x for name, value in short.items() for x in (f"--{name.replace('_', '-')}", str(value))]) == 0
    rows = [{"text": text, "source": i} for i, text in enumerate(french[:60] + german[:60])]
    (tmp_path / "mix.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    capsys.readouterr()
    assert run(tmp_path / "mix.jsonl", "--by", tmp_path / "run", "--out", tmp_path / "moved") == 0
    sources = {
        name: [json.loads(line)["source"] for line in lines] for name, lines in found(tmp_path / "moved").items()
    }
    assert sorted(sources) == ["french", "german"] and sum(map(len, sources.values())) == 120
    assert np.mean(np.array(sources["french"]) < 60) > 0.95 and np.mean(np.array(sources["german"]) >= 60) > 0.95
    assert "0 of 120 documents moved" in capsys.readouterr().out  # nobody was in the text of the run
    # Of the run's own documents, the eight that were in the wrong domain move, and the others stay.
    lines = [path.read_text(encoding="utf-8") for path in sorted((tmp_path / "text").iterdir())]
    (tmp_path / "again.jsonl").write_text("".join(lines), encoding="utf-8")
    assert run(tmp_path / "again.jsonl", "--by", tmp_path / "run", "--out", tmp_path / "again") == 0
    again = {name: [json.loads(line)["text"] for line in lines] for name, lines in found(tmp_path / "again").items()}
    assert len(set(again["german"]) & set(german[:8])) >= 6
    assert np.mean([text in german for text in again["german"]]) > 0.97
    moved = len(set(again["german"]) - set(german[8:150])) + len(set(again["french"]) & set(german[8:150]))
    assert f"{moved} of 300 documents moved" in capsys.readouterr().out
    # A module that no document suits gets no file.
    mixed(tmp_path / "german.jsonl", {"": german[150:160]})
    assert run(tmp_path / "german.jsonl", "--by", tmp_path / "run", "--out", tmp_path / "only") == 0
    assert list(found(tmp_path / "only")) == ["german"]
    capsys.readouterr()
    # A margin that no module reaches keeps all where they are.
    monkeypatch.setattr(discover, "MARGIN", 100)
    assert run(tmp_path / "again.jsonl", "--by", tmp_path / "run", "--out", tmp_path / "kept") == 0
    assert "0 of 300 documents moved" in capsys.readouterr().out


FAULTS = {
    "no such file": (["MIX.jsonl"], "does not exist"),
    "more domains than documents allow": (
        ["mix.jsonl", "--domains", "40"],
        "12 documents, which do not suit --domains 40; give a number from 1 to 6",
    ),
    "too few for auto": (["mix.jsonl"], "do not suit --domains auto"),
    "no domains": (["mix.jsonl", "--domains", "0"], "give a number from 1 to 6"),
    "a broken line": (["broken.jsonl", "--domains", "2"], "broken.jsonl:1 is not a JSON object"),
    "a conversation": (["chat.jsonl", "--domains", "2"], "the model has no chat template"),
    "nothing in common": (["disjoint.jsonl", "--domains", "2"], "nothing tells which documents belong together"),
    "no run": (["mix.jsonl", "--by", "nowhere"], "nowhere"),
    "no document": (["empty.md"], "empty.md has no document"),
    "one file that is no UTF-8": (["latin.txt"], "latin.txt is not UTF-8 at byte 1"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_input_is_one_sentence(tmp_path, fault, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mixed(tmp_path / "mix.jsonl", {"": paragraphs("german", 12)})
    (tmp_path / "broken.jsonl").write_text("{}\n")
    texts = ("qqq", "zz yy", "123", "ÄÖ")
    (tmp_path / "disjoint.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "a"}]}))
    (tmp_path / "empty.md").write_text("\n")
    (tmp_path / "latin.txt").write_bytes("für".encode("latin-1"))
    given, words = FAULTS[fault]
    assert run(*given, "--out", "found") == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1 and not (tmp_path / "found").exists()


def test_nothing_is_overwritten(tmp_path, capsys):
    (tmp_path / "found").mkdir()
    assert run("mix", "--out", tmp_path / "found") == 2 and "is there already" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("mix", "--domains", "six", "--out", tmp_path / "other")
    with pytest.raises(SystemExit):  # the run has them
        run("mix", "--domains", "6", "--by", tmp_path / "run", "--out", tmp_path / "other")


def test_names_are_names_of_domains():
    texts = ["\u6f22" * 60, "\u5b57" * 60]
    named = discover.names_of(texts, [[0], [1]])
    assert list(named.values()) == [[0], [1]]
    for name in named:
        assert domain_name(Path(f"{name}.jsonl")) == name


def test_documents_alone_in_their_domains_fit_none_whatever_the_rounding():
    x = torch.block_diag(*[torch.rand(1, 7) for _ in range(40)])
    x = torch.nn.functional.normalize(x, dim=1).to_sparse()
    assert not discover.fitting(x, np.arange(40)).any()


def test_any_whole_number_is_a_seed(tmp_path):
    mixed(tmp_path / "mix.jsonl", {"": paragraphs("german", 12) + paragraphs("french", 12)})
    for seed in -1, 2**70:
        assert run(tmp_path / "mix.jsonl", "--domains", 2, "--seed", seed, "--out", tmp_path / f"found{seed}") == 0


def test_purity_and_mutual_information_in_closed_form():
    same = np.diag([3, 5, 2])[:, [2, 0, 1]]
    assert purity(same) == 1 and mutual_information(same) == pytest.approx(1)
    nothing = np.outer([2, 1], [3, 6])
    assert purity(nothing) == pytest.approx(2 / 3) and mutual_information(nothing) == pytest.approx(0, abs=1e-12)
    # Two bits given, one bit found: I = 1, H = 2 and 1.
    halves = np.array([[1, 0], [1, 0], [0, 1], [0, 1]])
    assert purity(halves) == 0.5 and mutual_information(halves) == pytest.approx(2 / 3)
