"""The recipes against small files in the Hub's own layout, columns and formats: parquet, and C4's gzipped lines."""

import gzip
import hashlib
import json
import os
import random
import sys
import unicodedata
from itertools import pairwise

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from data import BadInput, prepare
from data.corpus import Conversation, find_domains, load_text, read_documents, split_text, trained_on
from data.router import HALF, Router
from data.tokenizer import Tokenizer
from test_train import ROOT


def parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    """`datasets` sleeps five seconds when a stream ends."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """The six data sets, some rows of each."""
    hub, draw = tmp_path_factory.mktemp("hub"), random.Random(0)
    names = [*prepare.TOPICS, "Sports", "Philosophy"]
    for split, n in ("train", 400), ("test", 40):
        rows = [
            dict(id=i, title=f"{split} {i}", summary="", text=f"{split} article {i}. " + "word " * draw.randint(5, 30),
                 categories=draw.sample(names, draw.randint(1, 3)))
            for i in range(n)
        ]  # fmt: skip
        rows += [dict(rows[5], id=1000, title="the same text again")]
        parquet(hub / f"tarekziade/wikipedia-topics/data/{split}-00000-of-00001.parquet", rows)
    for code in prepare.LANGUAGES.values():
        rows = [dict(id=str(i), url="", title="", text=f"{code} page {i} " * 9) for i in range(60)]
        for part in range(2):
            parquet(hub / f"wikimedia/wikisource/20231201.{code}/train-0000{part}-of-00002.parquet", rows[part::2])
    lines = [json.dumps(dict(text=f"general text {i}", timestamp="", url="")) for i in range(50)]
    (path := hub / "allenai/c4/en/c4-train.00000-of-01024.json.gz").parent.mkdir(parents=True)
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    for split in "train", "test":
        rows = [dict(question=f"{split} {i}?", answer=f"so\n#### {i}") for i in range(30)]
        parquet(hub / f"openai/gsm8k/main/{split}-00000-of-00001.parquet", rows)
        rows = [
            dict(
                id=str(i),
                question=f"which {split} {i}",
                answerKey="2",
                choices=dict(text=["a", f"b{i}"], label=["1", "2"]),
            )
            for i in range(20)
        ]
        parquet(hub / f"allenai/ai2_arc/ARC-Challenge/{split}-00000-of-00001.parquet", rows)
    for split, n in ("test", 12), ("dev", 5):
        rows = [dict(question=f"{split} {i}", subject="anatomy", choices=list("abcd"), answer=i % 4) for i in range(n)]
        parquet(hub / f"cais/mmlu/all/{split}-00000-of-00001.parquet", rows)
    return hub


def run(recipe, hub, out, *more):
    return prepare.main([recipe, "--hub", str(hub), "--out", str(out), *more])


def texts(path):
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_topics_right_ones_right_split_and_no_article_twice(hub, tmp_path, capsys):
    assert run("topics", hub, tmp_path) == 0
    assert "all that there are" in capsys.readouterr().out
    rows = pyarrow.parquet.read_table(hub / "tarekziade/wikipedia-topics/data/train-00000-of-00001.parquet").to_pylist()
    topics = {row["text"]: {name.lower() for name in row["categories"]} for row in rows}
    found = {path.stem: texts(path) for path in tmp_path.glob("*.jsonl")}
    assert sorted(found) == sorted(name.lower() for name in prepare.TOPICS)
    every = [text for some in found.values() for text in some]
    assert len(every) == len(set(every)) and all(text.startswith("train article") for text in every)
    assert all(name in topics[text] for name, some in found.items() for text in some)
    assert set(every) == {text for text, names in topics.items() if names & set(found)}  # all that have a topic of ours
    several = [text for text in every if len(topics[text] & set(found)) > 1]
    first = [text for text in several if text in found[min(topics[text] & set(found))]]
    assert 0.2 < len(first) / len(several) < 0.8  # not always the same of its topics
    how = dict(tokenizer=Tokenizer.from_folder(ROOT / "data/base"), cache=tmp_path / "cache")
    split = load_text(tmp_path / "history.jsonl", **how)
    assert 0.01 < len(split.heldout) / (len(split.train) + len(split.heldout)) < 0.12


def test_languages_limit_and_seed(hub, tmp_path):
    for out, more in ("a", ["--limit", "20"]), ("b", ["--limit", "20"]), ("c", ["--limit", "20", "--seed", "1"]):
        assert run("languages", hub, tmp_path / out, *more) == 0
    a, b, c = ({p.name: texts(p) for p in (tmp_path / out).glob("*.jsonl")} for out in "abc")
    assert sorted(a) == sorted(f"{name}.jsonl" for name in prepare.LANGUAGES)
    assert all(len(x) == 20 and x[0].startswith(prepare.LANGUAGES[name[:-6]] + " page") for name, x in a.items())
    assert a == b != c


class Shards:
    """A streamed data set of three files."""

    num_shards = 3

    def shard(self, number, index):
        assert number == 3
        return [10 * index + i for i in range(8)]


def test_the_order_of_rows_is_ours_in_any_version_of_datasets(monkeypatch):
    monkeypatch.setattr(prepare, "SHUFFLED", 5)
    rows = list(prepare.shuffled(Shards(), random.Random(0)))
    assert sorted(rows) == [10 * index + i for index in range(3) for i in range(8)]
    assert rows[:8] == [12, 14, 13, 17, 15, 20, 21, 16] and rows != list(prepare.shuffled(Shards(), random.Random(1)))


def test_retention_and_evaluation_sets(hub, tmp_path):
    assert run("retention", hub, tmp_path) == 0
    found = {path.stem: texts(path) for path in (tmp_path / "retention").glob("*.jsonl")}
    assert {name: len(some) for name, some in found.items()} == {"c4": 50, "gsm8k": 30, "arc": 20}
    assert (
        "Question: train 3?\nAnswer: so\n#### 3" in found["gsm8k"]
        and "Question: which train 4\nAnswer: b4" in found["arc"]
    )
    assert run("benchmarks", hub, tmp_path / "rows") == 0
    assert sorted(path.stem for path in (tmp_path / "rows").iterdir()) == [
        "arc_challenge_test",
        "mmlu_dev",
        "mmlu_test",
    ]
    for name, n in ("mmlu_test", 12), ("mmlu_dev", 5), ("arc_challenge_test", 20):
        rows = [json.loads(line) for line in (tmp_path / f"rows/{name}.jsonl").read_text().splitlines()]
        assert len(rows) == n and all(row["question"].startswith(("test", "dev", "which test")) for row in rows)
        assert all({"question", "choices"} < row.keys() and row.keys() & {"answer", "answerKey"} for row in rows)


@pytest.mark.parametrize("recipe", ["topics", "languages"])
def test_what_was_stopped_goes_on_and_is_the_same(recipe, hub, tmp_path, monkeypatch, capsys):
    assert run(recipe, hub, tmp_path / "whole", "--limit", "25") == 0
    written, real = [], prepare.digest

    def stopped(text):
        written.append(text)
        if len(written) == 60:
            raise KeyboardInterrupt
        return real(text)

    monkeypatch.setattr(prepare, "digest", stopped)
    assert run(recipe, hub, tmp_path / "two", "--limit", "25") == 130
    assert "the same command continues" in capsys.readouterr().err
    monkeypatch.setattr(prepare, "digest", real)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "two").glob("*.jsonl")}
    assert recipe == "topics" or before
    assert run(recipe, hub, tmp_path / "two", "--limit", "25") == 0
    assert all(p.stat().st_mtime_ns == at for p, at in before.items())  # what was finished is not made again
    whole, two = ({p.name: p.read_bytes() for p in (tmp_path / out).iterdir()} for out in ("whole", "two"))
    assert whole == two


def test_what_cannot_be_is_one_sentence(hub, tmp_path, monkeypatch, capsys):
    assert run("topics", tmp_path / "nothing", tmp_path / "a") == 2
    assert run("topics", hub, tmp_path / "a", "--limit", "0") == 2
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert run("topics", hub, tmp_path / "a") == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and "cannot be read" in lines[0] and "pip install datasets" in lines[2]


# Text on disk, and the router's buckets -----------------------------------------------------------------------------


def test_tools_of_a_conversation_reach_the_template(tmp_path):
    talk = [{"role": "user", "content": "How late is it?"}]
    rows = [dict(messages=talk, tools=[{"name": "clock"}]), dict(messages=talk), dict(messages=talk, tools=None)]
    (tmp_path / "talk.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    given = []

    def template(messages, **more):
        assert messages == talk
        given.append(more)
        return f"text {len(given)}"

    assert read_documents(tmp_path / "talk.jsonl", template) == (["text 1", "text 2", "text 3"], False)
    assert [more["tools"] for more in given] == [[{"name": "clock"}], None, None]


def test_a_stream_is_cut_where_a_line_ends_near_there_or_else_anywhere():
    lines = "".join(f"line {i}\n" for i in range(1000))
    (train,), (held,) = split_text([lines], True)
    assert train + held == lines and train.endswith("\n") and 0.04 < len(held) / len(lines) < 0.06
    title = "A title\n" + "word " * 4000  # the only line end is far away
    (train,), (held,) = split_text([title], True)
    assert train + held == title and len(train) == int(len(title) * 0.95)


def test_domains_are_found_by_name_or_number_and_nothing_hidden_counts(tmp_path):
    for name in "b.txt", "a.jsonl", ".c.txt", "README.md", "d/part.txt":
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    paths = {name: tmp_path / file for name, file in (("a", "a.jsonl"), ("b", "b.txt"), ("d", "d"))}
    assert list(find_domains(tmp_path).items()) == list(paths.items())
    assert list(find_domains(tmp_path, "2")) == ["a", "b"] and list(find_domains(tmp_path, "d,a")) == ["a", "d"]
    for only, least, message in (
        ("4", 1, "--domains is 4, and"), ("0", 1, "--domains is 0, and"), ("b,e", 1, "has no domain 'e'"),
        ("a,a", 2, "only one domain, a;"), ("", 4, "at least 4"),
    ):  # fmt: skip
        with pytest.raises(BadInput, match=message):
            find_domains(tmp_path, only, least)
    (tmp_path / "my, notes.txt").write_text("x")
    assert list(find_domains(tmp_path, "d,a")) == ["a", "d"]  # nobody asked for the other
    with pytest.raises(BadInput, match="a domain's name"):
        find_domains(tmp_path)
    (tmp_path / "my, notes.txt").rename(tmp_path / "SPANISH.TXT")
    assert list(find_domains(tmp_path)) == ["SPANISH", "a", "b", "d"]
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(BadInput, match="the domain a twice"):
        find_domains(tmp_path)


@pytest.mark.parametrize(
    "name", ["médecine", "c++", "my notes", "C#", "日本語", "a.b", "me\u0301decine", "x|y", "100%"]
)
def test_a_domain_may_have_the_name_of_its_file(tmp_path, name):
    (tmp_path / f"{name}.txt").write_text("x")
    found = unicodedata.normalize("NFC", name)  # some systems decompose the names of files
    assert list(find_domains(tmp_path)) == list(find_domains(tmp_path, found)) == [found]
    (tmp_path / f"{name}.txt").rename(tmp_path / "b.txt")
    (tmp_path / name).mkdir()
    assert set(find_domains(tmp_path)) == {found, "b"}


@pytest.mark.parametrize("name", ["a,b", "-x", "a\nb", "x" * 151, "auto"])
def test_names_that_an_option_or_a_file_cannot_have(tmp_path, name):
    (tmp_path / f"{name}.txt").write_text("x")
    with pytest.raises(BadInput, match="a domain"):
        find_domains(tmp_path)


def test_a_line_from_windows_ends_like_any_other(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\r\n")
    assert read_documents(tmp_path / "a.txt") == (["one\ntwo\n"], True)


def test_any_utf8_file_in_the_folder_of_a_domain_is_a_document(tmp_path, capsys):
    files = {"a.md": b"# Title", "b.rst": b"Title\n=====", "c.py": "x = 'é'".encode(), "d": b"no suffix", "e.txt": b"e",
             "f.png": b"\x89PNG\xff", "g.bin": b"a\0b", ".hidden": b"h", "empty.md": b""}  # fmt: skip
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    os.mkfifo(tmp_path / "pipe")
    documents, stream = read_documents(tmp_path)
    assert documents == ["# Title", "Title\n=====", "x = 'é'", "no suffix", "e", ""] and not stream
    said = capsys.readouterr().err.splitlines()
    assert said == [f"{tmp_path / name} is left out: it is no UTF-8 text" for name in ("f.png", "g.bin", "pipe")]


# The split -----------------------------------------------------------------------------------------------------------


def shares(documents):
    train, held = split_text(documents, False)
    assert "".join(train + held) == "".join(documents)
    total = sum(map(len, documents))
    return sum(map(len, held)) / total, train, held


def test_held_out_by_length_not_by_number():
    big, small = "line of the text\n" * 23_000, "line of the text\n" * 350
    for documents in [small, big], [big, small], [big, big], [small] * 20 + [big], [big], [big] + [small] * 20:
        share, train, held = shares(documents)
        assert 0.03 <= share <= 0.1 and all(text.endswith("\n") for text in train + held)
    by_length = sorted(("w" * n + "\n" for n in range(1, 400)), key=len)
    share, train, held = shares(by_length)
    assert 0.04 < share < 0.06 and train + held == by_length  # whole documents
    share, train, held = shares([Conversation("a\n" * 3000)])
    assert type(train[0]) is type(held[0]) is Conversation


@pytest.mark.parametrize("seed", range(200))
def test_splits_of_random_folders(tmp_path, seed):
    rng = random.Random(seed)
    for i in range(rng.randint(1, 50)):
        size = int(10 ** rng.uniform(0, rng.choice([2, 4, 6])))
        lines = []
        while size > 0:
            lines.append("x" * min(size - 1, int(10 ** rng.uniform(0.5, 3.5))))
            size -= len(lines[-1]) + 1
        (tmp_path / f"{i:02}.md").write_text("\n".join(lines) + rng.choice(["", "\n"]))
    documents, _ = read_documents(tmp_path)
    total = sum(map(len, documents))
    if total < 20:  # a character is more than the share
        return
    share, train, _ = shares(documents)
    assert 0.03 <= share <= 0.1 or total < 200, (share, total)
    # A paragraph is cut in two only where none ends near the place.
    ends = set(np.cumsum([len(line) for text in documents for line in text.splitlines(keepends=True)]))
    cut = sum(map(len, train))
    assert cut in ends or not any(0.05 < 1 - end / total < 0.075 for end in ends)


def test_a_finished_run_of_an_earlier_version_keeps_its_split(tmp_path):
    tokenizer = Tokenizer.from_folder(ROOT / "data/base")
    texts = ["word " * 500, "word " * 20, "Ende"]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    content = hashlib.sha256(json.dumps([texts, False, 0.05, 7]).encode()).hexdigest()[:16]
    known = f"{content}-{tokenizer.fingerprint}"
    split = load_text(tmp_path / "a.jsonl", tokenizer, tmp_path / "cache", separator=7, known=known)
    assert split.key == known and split.heldout.tolist() == [*tokenizer.encode("Ende"), 7]  # one document of three
    today = load_text(tmp_path / "a.jsonl", tokenizer, tmp_path / "cache", separator=7)
    assert today.key != known and len(today.heldout) > len(split.heldout)


def test_windows_that_were_trained_on_are_counted():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 50_000, 5000)
    new = rng.integers(0, 50_000, 6 * 128).reshape(6, 128)
    new[1] = ids[1001:1129]  # a paragraph that was there before, at another offset
    new[3, 10:] = ids[3000:3118]
    new[4, 80:] = ids[200:248]  # less than half
    assert trained_on(ids, new).tolist() == [False, True, False, True, False, False]
    assert trained_on(ids, ids[7:23][None]).all() and not trained_on(ids[:10], new).any()


def test_no_text_is_left_out_without_a_word(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d/one.TXT").write_text("one")
    rows = [{"text": "", "messages": [{"role": "user", "content": "two"}]}, {"text": ""}]
    (tmp_path / "d/two.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read_documents(tmp_path / "d", lambda messages, **_: messages[0]["content"])[0] == ["one", "two", ""]
    (tmp_path / "d/later").mkdir()
    with pytest.raises(BadInput, match="later is a folder in that of a domain"):
        read_documents(tmp_path / "d")
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(BadInput, match=r"pipe\.txt is no file"):
        read_documents(tmp_path / "pipe.txt")


def test_one_document_is_enough_where_none_is_held_out(tmp_path):
    (tmp_path / "one.jsonl").write_text(json.dumps({"text": "some words " * 20}))
    tokenizer = Tokenizer.from_folder(ROOT / "data/base")
    split = load_text(tmp_path / "one.jsonl", tokenizer, tmp_path / "cache")
    assert len(split.train) >= 40 and not len(split.heldout)
    split = load_text(tmp_path / "one.jsonl", tokenizer, tmp_path / "cache", need=(0, 1))
    assert 0.03 < len(split.heldout) / (len(split.train) + len(split.heldout)) < 0.12  # its tail


def test_half_of_the_buckets_are_of_unigrams_and_half_of_bigrams():
    ids = np.random.default_rng(0).integers(0, 152_000, (3, 40))
    found = Router.buckets(ids)
    expected = [[int(x) * 2_654_435_761 % 2**32 % HALF for x in row] for row in ids]
    pairs = [[(int(a) * 1_000_003 + int(b)) * 2_654_435_761 for a, b in pairwise(row)] for row in ids]
    assert (found[:, :40] == expected).all()  # Python's integers have no end: what leaves 64 bits does not matter
    assert (found[:, 40:] == [[HALF + x % 2**32 % HALF for x in row] for row in pairs]).all()
    assert found.max() < Router().weight.shape[1] == 2 * HALF
