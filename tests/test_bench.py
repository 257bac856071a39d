"""Benchmarks: prompts, log-likelihoods, shared prefixes, resume, results, and every kind of bad input."""

import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import eval as evaluation
import train
from data import BadInput, router, scoring
from data.benchmarks import LITE, TASKS, encode, load_items
from data.checkpoint import checkpoint_name, load, parse_config
from data.tokenizer import Tokenizer
from model import Model
from test_train import Killed

ROOT = Path(__file__).resolve().parent.parent
REAL = Path(os.environ.get("KOFF_ROWS", ROOT / "../shared/data/benchmarks"))
CONFIG = dict(
    model_type="llama", vocab_size=4096, hidden_size=24, intermediate_size=40, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=2048, eos_token_id=0,
    tie_word_embeddings=True,
)  # fmt: skip
WORDS = "the kernel boots a shell and then waits for what people may type into it while disks and drivers come up"


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        path.write_text(json.dumps({"canary": "x", "examples": rows}))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def sentence(rng, n):
    return " ".join(rng.choice(WORDS.split(), n))


def mmlu(rng, subject, n=6):
    words = [sentence(rng, int(rng.integers(1, 4))) for _ in range(4)]
    question = sentence(rng, int(rng.integers(2, n)))
    return dict(question=question, subject=subject, choices=words, answer=int(rng.integers(4)))


@pytest.fixture
def world(tmp_path):
    """A tiny random checkpoint with the shipped tokenizer, and tiny rows of every task."""
    base, rows, rng = tmp_path / "base", tmp_path / "rows", np.random.default_rng(0)
    base.mkdir()
    torch.manual_seed(0)
    model = Model(parse_config(CONFIG))
    state = {checkpoint_name(n): torch.randn_like(p) * 0.4 + (p.ndim == 1) for n, p in model.named_parameters()}
    save_file(state, base / "model.safetensors")
    (base / "config.json").write_text(json.dumps(CONFIG))
    shutil.copy(ROOT / "data/base/tokenizer.json", base)
    names = ("world_religions", "astronomy")
    write(rows / "mmlu_dev.jsonl", [mmlu(rng, name) for name in names for _ in range(5)])
    write(rows / "mmlu_test.jsonl", [mmlu(rng, name) for name in names for _ in range(9)])
    arc = [dict(id=str(i), question=sentence(rng, 5), answerKey="2",
                choices=dict(text=[sentence(rng, n) for n in (1, 4, 2)], label=["1", "2", "3"])) for i in range(7)]  # fmt: skip
    write(rows / "arc_challenge_test.jsonl", arc)
    scores = [{"target_scores": {"yes": 1, "not at all": 0}, "input": sentence(rng, 4)} for _ in range(7)]
    write(rows / "bbl/strategyqa.json", scores)
    write(rows / "bbl/another.json", scores)  # not of the Lite tasks
    return tmp_path


def command(world, task, *more, run="base"):
    return evaluation.main(["bench", str(world / run), task, "--rows", str(world / "rows"), "--out", str(world / "out"),
                            "--device", "cpu", *map(str, more)])  # fmt: skip


def samples(world, name):
    return [json.loads(line) for line in (world / f"out/{name}.jsonl").read_text().splitlines()][1:]


def prompts_of(world, task, **how):
    tokenizer = Tokenizer.from_folder(world / "base")
    return [encode(item, tokenizer, 2048) for item in load_items(task, world / "rows", **how)], tokenizer


# Prompts ------------------------------------------------------------------------------------------------------------


def test_prompts_are_those_that_the_papers_write(tmp_path):
    row = dict(question="What is 1+1?", subject="abstract_algebra", choices=["1", "2", "3", "4"], answer=1)
    write(tmp_path / "mmlu_dev.jsonl", [row, {**row, "question": "And 2+2?", "answer": 3}])
    write(tmp_path / "mmlu_test_some.jsonl", [{**row, "question": "And 1+2?", "answer": 2}])
    (item,) = load_items("mmlu", tmp_path, shots=2)
    assert item.head + "".join(item.shots) + item.question == (
        "The following are multiple choice questions (with answers) about abstract algebra.\n\n"
        "What is 1+1?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: B\n\n"
        "And 2+2?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: D\n\n"
        "And 1+2?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:"
    )
    assert item.options == [" A", " B", " C", " D"] and item.right == [2] and item.subject == "abstract_algebra"

    arc = dict(id="x", question="Why?", choices=dict(text=["so", "not so"], label=["1", "2"]), answerKey="2")
    write(tmp_path / "arc_challenge_test.jsonl", [arc])
    (item,) = load_items("arc", tmp_path)
    assert (item.question, item.options, item.right) == ("Question: Why?\nAnswer:", [" so", " not so"], [1])

    row = dict(input="Is it?", target_scores={"yes": 0, "no": 1})
    write(tmp_path / "bbl/winowhy.json", [row])
    write(tmp_path / "lite/strategyqa/task.json", [row, {**row, "target_scores": {"a": 1, "b": 1, "c": 0}}])
    (item,) = load_items("bbl", tmp_path / "bbl")
    # In another order than the file's, where the right one may come first.
    assert item.head + item.question == "\nQ: Is it?\n  choice: no\n  choice: yes\nA: "
    assert item.options == ["no", "yes"] and item.right == [0]
    one, two = load_items("bbl", tmp_path / "lite")
    assert (one.subject, one.right, two.right) == ("strategyqa", [0], [0, 1])
    first, second = load_items("bbl", tmp_path / "lite", shots=0)[0], load_items("bbl", tmp_path / "lite", shots=1)[0]
    assert (
        second.shots == [first.question + "no\n\n"] and len(LITE) == 18
    )  # the first row is the example, and not asked


def test_context_and_option_are_encoded_together_and_shots_are_dropped_until_they_fit(world):
    (p, *_), tokenizer = prompts_of(world, "bbl")
    assert p.question.endswith("A: ")  # the space goes to the option
    for option, ids in zip(p.options, p.continuations, strict=True):
        assert tokenizer.decode(ids) == f" {option}"
        assert p.shared + p.context + ids == tokenizer.encode(p.head + p.question + option)
    whole, _ = prompts_of(world, "mmlu")
    item, longest = load_items("mmlu", world / "rows")[0], len(whole[0].shared + whole[0].context) + 1
    assert encode(item, tokenizer, longest) == whole[0] and len(whole[0].shots) == 5
    less = encode(item, tokenizer, longest - 1)
    assert len(less.shots) == 4
    assert tokenizer.decode(less.shared + less.context) == item.head + "".join(item.shots[:4]) + item.question
    with pytest.raises(BadInput, match=r"mmlu_test.jsonl:1 takes \d+ tokens without examples, the model has 10"):
        encode(item, tokenizer, 10)


# Numbers ------------------------------------------------------------------------------------------------------------


def scores_of(model, items, module=None):
    """[log-likelihoods of the options of each item], as `scoring.measure` finds them."""
    found = []
    for item in items:
        memory = scoring.remember(model, item.shared, module)
        found.append(scoring.log_likelihoods(model, item.context, item.continuations, memory)[0])
    return found


@pytest.mark.parametrize("task", TASKS)
def test_log_likelihoods_are_those_of_one_plain_pass_per_option_ours_and_transformers(world, task):
    transformers = pytest.importorskip("transformers")
    items, _ = prompts_of(world, task)
    model = load(world / "base")
    peer = transformers.AutoModelForCausalLM.from_pretrained(world / "base", dtype=torch.float32)
    assert len(items) >= 7
    for item, scores in zip(items, scores_of(model, items), strict=True):
        context = item.shared + item.context
        for option, got in zip(item.continuations, scores, strict=True):
            tokens, at = torch.tensor([context + option]), slice(len(context) - 1, -1)
            for logits in model(tokens), peer(tokens).logits:
                plain = logits[0, at].log_softmax(-1).gather(1, torch.tensor(option)[:, None]).sum().item()
                assert got == pytest.approx(plain, abs=2e-4)
        sample = scoring.sample_of(item, None, scores)
        assert sample["choice"] == int(np.argmax(scores)) and sample["acc"] == (sample["choice"] in item.right)
        if task == "arc":
            norm = [x / (len(o) - 1) for x, o in zip(scores, item.options, strict=True)]
            assert sample["acc_norm"] == (int(np.argmax(norm)) in item.right)


def test_greedy_says_whether_the_model_would_write_the_option(world):
    model = load(world / "base")
    context = [5, 6, 7]
    first = model(torch.tensor([context]))[0, -1].argmax().item()
    second = model(torch.tensor([[*context, first]]))[0, -1].argmax().item()
    _, greedy = scoring.log_likelihoods(model, context, [[first, second], [first, second + 1], [first], [second + 1]])
    assert greedy == [True, False, True, False]


def test_a_shared_prefix_changes_nothing_with_a_module_attached_and_saves_work(world, monkeypatch):
    items, tokenizer = prompts_of(world, "mmlu")
    model = load(world / "base")
    module = {
        i: m for i, m in scoring.remember(model, items[3].context[:5]).items() if i
    }  # a KV memory, not in every block
    module[2].lora = {"k": (torch.randn(2, 24), torch.randn(16, 2) * 0.1)}
    for item, scores in zip(items, scores_of(model, items, module), strict=True):
        tokens = torch.tensor([item.shared + item.context])
        plain = model(tokens, module=module)[0, -1].log_softmax(-1)[[ids[0] for ids in item.continuations]]
        assert np.allclose(scores, plain, atol=2e-4)
        assert tokenizer.decode(item.shared).startswith(item.head)
    seen = []
    monkeypatch.setattr(Model, "hidden", counted(seen, Model.hidden))
    assert command(world, "mmlu") == 0
    assert sum(seen) < sum(len(item.shared + item.context) for item in items) / 2


def counted(seen, hidden):
    def work(self, tokens, *args, **more):
        seen.append(tokens.numel())
        return hidden(self, tokens, *args, **more)

    return work


# The command --------------------------------------------------------------------------------------------------------


def test_results_have_the_shape_of_lm_evaluation_harness_and_standard_errors(world, capsys):
    assert command(world, "mmlu", "--limit", 7) == 0
    r = json.loads((world / "out/mmlu-unpruned.json").read_text())
    lines = samples(world, "mmlu-unpruned")
    assert set(r) == {"results", "n-shot", "n-samples", "config", "git_hash", "date"}
    assert set(r["results"]) == set(r["n-shot"]) == {"mmlu", "mmlu_world_religions", "mmlu_astronomy"}
    right = [line["acc"] for line in lines]
    p, n = sum(right) / 14, 14
    whole = r["results"]["mmlu"]
    assert len(right) == n and whole["acc,none"] == pytest.approx(p) and r["n-shot"]["mmlu"] == 5
    assert whole["acc_stderr,none"] == pytest.approx(math.sqrt(p * (1 - p) / (n - 1)))
    parts = [r["results"][f"mmlu_{name}"]["acc,none"] for name in ("world_religions", "astronomy")]
    assert whole["acc_subjects,none"] == pytest.approx(sum(parts) / 2)
    assert r["n-samples"]["mmlu"] == {"effective": 14}
    assert r["config"]["limit"] == 7 and r["config"]["task"] == "mmlu"
    keys = {"where", "subject", "loglikelihoods", "choice", "answer", "acc", "acc_norm", "shots", "module"}
    assert set(lines[0]) == keys
    out = capsys.readouterr().out
    assert f"{p:.4f}" in out and f"{whole['acc_stderr,none']:.4f}" in out and "acc_subjects" in out
    assert command(world, "arc") == 0
    assert {"acc,none", "acc_norm,none", "acc_norm_stderr,none"} <= set(
        json.loads((world / "out/arc-unpruned.json").read_text())["results"]["arc"]
    )


def test_a_crash_at_row_90_of_100_loses_no_finished_row_and_changes_no_result(world, monkeypatch, capsys):
    rng = np.random.default_rng(1)
    write(world / "rows/mmlu_test.jsonl", [mmlu(rng, "astronomy", 12) for _ in range(100)])
    assert command(world, "mmlu", "--shots", 1) == 0
    whole, results = samples(world, "mmlu-unpruned"), json.loads((world / "out/mmlu-unpruned.json").read_text())
    log_likelihoods, asked = scoring.log_likelihoods, []

    def failing(*args):
        asked.append(1)
        if len(asked) > 90:
            raise Killed
        return log_likelihoods(*args)

    shutil.rmtree(world / "out")
    monkeypatch.setattr(scoring, "log_likelihoods", failing)
    with pytest.raises(Killed):
        command(world, "mmlu", "--shots", 1)
    path = world / "out/mmlu-unpruned.jsonl"
    assert len(samples(world, "mmlu-unpruned")) == 90 and not path.with_suffix(".json").exists()
    path.write_bytes(path.read_bytes()[:-40])  # the last line was cut as well
    asked.clear()
    assert command(world, "mmlu", "--shots", 1) == 0
    assert len(asked) == 100 - 89
    assert samples(world, "mmlu-unpruned") == whole  # bit for bit
    again = json.loads(path.with_suffix(".json").read_text())
    assert again["results"] == results["results"]
    asked.clear()
    assert command(world, "mmlu", "--shots", 1) == 0 and not asked  # finished: the table again
    assert command(world, "mmlu", "--shots", 2) == 2
    assert "holds other settings, questions or weights; say --fresh" in capsys.readouterr().err
    assert command(world, "mmlu", "--shots", 2, "--limit", 5, "--fresh") == 0
    assert len(samples(world, "mmlu-unpruned")) == 5


def test_a_run_is_measured_with_all_its_parts_and_routed_by_the_question_alone(world, monkeypatch, capsys):
    data = world / "data"
    data.mkdir()
    for name in ("german", "french"):
        lines = (ROOT / f"data/handbook/{name}.txt").read_text(encoding="utf-8").splitlines()
        (data / f"{name}.txt").write_text("\n".join(lines[:120]) + "\n", encoding="utf-8")
    given = dict(model=world / "base", data=data, out=world / "run", blocks=2, sparsity=0.05, steps=4, batch=2, seq_len=16,
                 eval_len=16, rank=2, alpha=2.0, kv_tokens=3, top=20, fisher_sequences=4, dtype="float32",
                 eval_windows=2)  # fmt: skip
    assert train.main([x for k, v in given.items() for x in (f"--{k.replace('_', '-')}", str(v))]) == 0
    seen = []

    def route(self, ids):
        seen.append(ids[0].tolist())
        return [("french", "german", None)[len(seen) % 3]]

    monkeypatch.setattr(router.Router, "route", route)
    assert command(world, "mmlu", "--on", "unpruned", "backbone", "routed", "german", run="run") == 0
    found = {name: samples(world, f"mmlu-{name}") for name in ("unpruned", "backbone", "routed", "german")}
    prompts, tokenizer = prompts_of(world, "mmlu")
    assert seen == [tokenizer.encode(item.question) for item in prompts]
    by_key = {name: {x["where"]: x for x in lines} for name, lines in found.items()}
    assert {x["module"] for x in found["routed"]} == {"french", "german", None}
    for key, line in by_key["routed"].items():
        if line["module"] != "french":
            same = by_key[line["module"] or "backbone"][key]["loglikelihoods"]
            assert np.allclose(line["loglikelihoods"], same, atol=1e-4)
    ours = [by_key["german"][key]["loglikelihoods"] for key in by_key["unpruned"]]
    assert not np.allclose(ours, [x["loglikelihoods"] for x in by_key["unpruned"].values()], atol=1e-3)
    assert command(world, "bbl", "--on", "klingon", run="run") == 2
    assert "--on cannot be 'klingon'" in capsys.readouterr().err
    assert evaluation.main(["bench", str(world / "run"), "arc", "--rows", str(world / "rows"), "--limit", "2"]) == 0
    (world / "run/modules/german.safetensors").write_bytes((world / "run/modules/french.safetensors").read_bytes())
    assert command(world, "mmlu", "--on", "backbone", run="run") == 0
    capsys.readouterr()
    assert command(world, "mmlu", "--on", "german", run="run") == 2  # these samples are of the module that was there
    assert "other settings, questions or weights; say --fresh" in capsys.readouterr().err
    assert {p.name for p in (world / "run/bench").iterdir()} == {
        f"arc-{v}.{end}" for v in ("unpruned", "backbone", "routed") for end in ("json", "jsonl")
    }
    base = load_file(world / "base/model.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in base.items()}, world / "base/model.safetensors")
    for more in ([], ["--fresh"]):
        assert command(world, "mmlu", "--on", "unpruned", *more, run="run") == 2  # what it holds is of another model


# Bad input ----------------------------------------------------------------------------------------------------------


def change(name, **more):
    def work(world):
        path = world / "rows" / name
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        rows[1] = {k: v for k, v in {**rows[1], **more}.items() if v is not None}
        write(path, rows)

    return work


def remove(name):
    return lambda world: (world / "rows" / name).unlink()


BAD = {
    "missing column": ("mmlu", [], change("mmlu_test.jsonl", choices=None), "mmlu_test.jsonl:2 is no row of mmlu (KeyError('choices'))"),
    "answer outside": ("mmlu", [], change("mmlu_test.jsonl", answer=4), "mmlu_test.jsonl:2: its answer is not among"),
    "bad shot": ("mmlu", [], change("mmlu_dev.jsonl", answer="B"), "mmlu_dev.jsonl:2: its answer is not among"),
    "answer key": ("arc", [], change("arc_challenge_test.jsonl", answerKey="E"), "arc_challenge_test.jsonl:2: its answer"),
    "choices that are none": ("mmlu", [], change("mmlu_test.jsonl", choices=7), "mmlu_test.jsonl:2 is no row of mmlu"),
    "scores that are none": ("bbl", [], lambda w: write(w / "rows/bbl/winowhy.json", [dict(input="x", target_scores={"a": "b"})]),
                             "winowhy.json:1 is no row of bbl"),
    "a number that is no place": ("mmlu", [], change("mmlu_dev.jsonl", answer=1.0), "mmlu_dev.jsonl:2: its answer is not"),
    "too many examples": ("mmlu", ["--shots", "1200"], None, "--shots of 0 to 100"),
    "no right choice": ("bbl", [], lambda w: write(w / "rows/bbl/winowhy.json", [dict(input="x", target_scores={"a": 0})]),
                        "winowhy.json:1: its answer"),
    "empty choice": ("bbl", [], lambda w: write(w / "rows/bbl/winowhy.json", [dict(input="x", target_scores={"": 1})]),
                     "winowhy.json:1: one of its choices is empty"),
    "too long": ("mmlu", [], change("mmlu_test.jsonl", question="and then " * 3000), "mmlu_test.jsonl:2 takes"),
    "not JSON": ("arc", [], lambda w: (w / "rows/arc_challenge_test.jsonl").write_text("{}x\n"), ":1 is not JSON"),
    "not a row": ("bbl", [], lambda w: (w / "rows/bbl/winowhy.json").write_text("[3]"), "winowhy.json:1 is no row of bbl"),
    "no list": ("bbl", [], lambda w: (w / "rows/bbl/winowhy.json").write_text("{}"), "winowhy.json has no list of rows"),
    "unknown subject": ("mmlu", ["--subjects", "alchemy"], None, "no subject 'alchemy'"),
    "few examples": ("mmlu", ["--shots", "6"], None, "has 5 examples for world_religions, not 6"),
    "all examples": ("bbl", ["--shots", "7"], None, "no question of bbl besides 7 examples"),
    "no rows": ("mmlu", [], remove("mmlu_test.jsonl"), "get it: python data/prepare.py benchmarks"),
    "no shots": ("mmlu", [], remove("mmlu_dev.jsonl"), "has no mmlu_dev*.json*"),
    "limit": ("mmlu", ["--limit", "0"], None, "--limit of at least 1"),
    "variant": ("mmlu", ["--on", "backbone"], None, "--on cannot be 'backbone'"),
    "no model": ("mmlu", [], lambda w: (w / "base/config.json").unlink(), "settings.json does not exist"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_status_2(world, case, capsys):
    task, more, damage, message = BAD[case]
    if damage:
        damage(world)
    assert command(world, task, *more) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and not (world / "out").exists()


def test_damaged_samples_are_refused_and_ctrl_c_says_that_it_continues(world, capsys, monkeypatch):
    (world / "out").mkdir()
    (world / "out/arc-unpruned.jsonl").write_text("{}\n3\n")
    assert command(world, "arc") == 2 and "say --fresh" in capsys.readouterr().err
    assert command(world, "arc", "--fresh") == 0
    path = world / "out/arc-unpruned.jsonl"
    config, *lines = path.read_text().splitlines()
    changed = json.loads(lines[0])
    changed["acc_norm"] = not changed["acc_norm"]
    for damaged in (["{}"], ["3"], ['{"subject": "x"}'], [json.dumps(changed)], [*lines, *lines], lines[1:]):
        path.write_text("\n".join([config, *damaged, ""]))
        assert command(world, "arc") == 2 and "say --fresh" in capsys.readouterr().err

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(scoring, "log_likelihoods", stopped)
    assert command(world, "arc", "--fresh") == 130 and "the same command continues" in capsys.readouterr().err


# The real rows ------------------------------------------------------------------------------------------------------


def test_the_published_rows_are_read_to_the_last():
    if not REAL.exists():
        pytest.skip(f"{REAL} does not exist")
    counts = {task: len(load_items(task, REAL)) for task in TASKS if task != "bbl"}
    assert counts == {"mmlu": 1156, "arc": 1172}
    assert len(load_items("mmlu", REAL / "mmlu_test_8_subjects.jsonl", ["astronomy"])) == 152


def test_a_real_model_answers_as_transformers_does():
    folder = os.environ.get("KOFF_SMOLLM2")
    if not folder or not REAL.exists():
        pytest.skip("KOFF_SMOLLM2 does not name the folder of a SmolLM2 checkpoint, or there are no rows")
    transformers = pytest.importorskip("transformers")
    peer = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model, tokenizer = load(folder), Tokenizer.from_folder(folder)
    items = [encode(item, tokenizer, 2048) for item in load_items("mmlu", REAL, ["astronomy"], limit=4)]
    assert [len(ids) for item in items for ids in item.continuations] == [1] * 16
    for item, scores in zip(items, scores_of(model, items), strict=True):
        with torch.no_grad():
            theirs = peer(torch.tensor([item.shared + item.context])).logits[0, -1].log_softmax(-1)
        assert np.allclose(scores, theirs[[ids[0] for ids in item.continuations]], atol=1e-3)
