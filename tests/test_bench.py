"""Benchmarks: prompts, log-likelihoods, shared prefixes, resume, results, and every kind of bad input."""

import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import eval as evaluation
import model as decoder
import train
from data import BadInput, router, scoring
from data.benchmarks import LITE, TASKS, encode, load_items, number
from data.checkpoint import checkpoint_name, load, parse_config
from data.tokenizer import Tokenizer
from model import Model

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
    for name, n in ("gsm8k_train", 6), ("gsm8k_test", 4):
        write(rows / f"{name}.jsonl", [dict(question=sentence(rng, 4), answer=f"So.\n#### 1,00{i}") for i in range(n)])
    listed = [
        dict(input=f"{sentence(rng, 4)}\nOptions:\n(A) {sentence(rng, 1)}\n(B) no", target="(B)") for _ in range(7)
    ]
    write(rows / "bbh/snarks.json", listed)
    write(rows / "bbh/navigate.json", [dict(input=sentence(rng, 4), target="Yes") for _ in range(5)])
    scores = [{"target_scores": {"yes": 1, "not at all": 0}, "input": sentence(rng, 4)} for _ in range(5)]
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
    assert item.options == (" A", " B", " C", " D") and item.right == (2,) and item.subject == "abstract_algebra"

    arc = dict(id="x", question="Why?", choices=dict(text=["so", "not so"], label=["1", "2"]), answerKey="2")
    write(tmp_path / "arc_challenge_test.jsonl", [arc])
    (item,) = load_items("arc", tmp_path)
    assert (item.question, item.options, item.right) == ("Question: Why?\nAnswer:", (" so", " not so"), (1,))

    for name in ("train", "test"):
        write(tmp_path / f"gsm8k_{name}.jsonl", [dict(question="How many?", answer="1,000 + 18\n#### 1,018")])
    (item,) = load_items("gsm8k", tmp_path, shots=1)
    assert item.shots == ("Question: How many?\nAnswer: 1,000 + 18\n#### 1,018\n\n",) and item.right == ("1018",)
    said = ["so\n#### $1,018.\n", "#### 1018", "it is 1018"]
    assert [item.judged(text)["choice"] for text in said] == ["1018", "1018", None] and number("#### -3.50") == "-3.50"

    text = "Which?\nOptions:\n(A) x\n(B) y"
    write(tmp_path / "bbh/snarks.json", [dict(input=text, target="(A)"), dict(input=text, target="(B)")])
    write(tmp_path / "bbh/ruin_names.json", [dict(input=text, target="z, w"), dict(input="1 + 1 =", target="2")])
    lost, listed = load_items("bbh", tmp_path, shots=1)
    assert listed.shots == (f"Q: {text}\nA: (A)\n\n",) and listed.question == f"Q: {text}\nA:"
    assert (listed.options, listed.right, listed.id) == ((" (A)", " (B)"), (1,), 1)
    assert (lost.options, lost.right, lost.shots) == ((), ("2",), (f"Q: {text}\nA: z, w\n\n",))

    row = dict(input="Is it?", target_scores={"yes": 0, "no": 1})
    write(tmp_path / "bbl/winowhy.json", [row])
    write(tmp_path / "lite/strategyqa/task.json", [row, {**row, "target_scores": {"a": 1, "b": 1, "c": 0}}])
    (item,) = load_items("bbl", tmp_path)
    assert item.question == "\nQ: Is it?\n  choice: yes\n  choice: no\nA: " and item.options == ("yes", "no")
    one, two = load_items("bbl", tmp_path / "lite")
    assert (one.subject, one.right, two.right) == ("strategyqa", (1,), (0, 1))
    assert len(LITE) == 18


def test_context_and_option_are_encoded_together_and_shots_are_dropped_until_they_fit(world):
    (p, *_), tokenizer = prompts_of(world, "bbl")
    assert p.item.question.endswith("A: ")  # the space goes to the option
    for option, ids in zip(p.item.options, p.options, strict=True):
        assert tokenizer.decode(ids) == f" {option}" and p.ids + list(ids) == tokenizer.encode(p.item.question + option)
    whole, _ = prompts_of(world, "mmlu")
    item, longest = whole[0].item, len(whole[0].ids) + 1
    assert encode(item, tokenizer, longest) == whole[0] and whole[0].shots == 5
    less = encode(item, tokenizer, longest - 1)
    assert less.shots == 4 and tokenizer.decode(less.ids) == item.head + "".join(item.shots[:4]) + item.question
    with pytest.raises(BadInput, match=r"mmlu_test.jsonl:1 takes \d+ tokens without examples, the model has 10"):
        encode(item, tokenizer, 10)


# Numbers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["mmlu", "arc", "bbh", "bbl"])
def test_log_likelihoods_are_those_of_one_plain_pass_per_option_ours_and_transformers(world, task):
    transformers = pytest.importorskip("transformers")
    prompts, tokenizer = prompts_of(world, task)
    model = load(world / "base")
    peer = transformers.AutoModelForCausalLM.from_pretrained(world / "base", dtype=torch.float32)
    found = [pair for part in scoring.answers(model, tokenizer, prompts) for pair in part]
    assert {p.key for p, _ in found} == {p.key for p in prompts} and len(found) == len(prompts)
    asked = [(p, line) for p, line in found if p.options]
    assert len(asked) >= 4
    for p, line in asked:
        for option, got in zip(p.options, line["loglikelihoods"], strict=True):
            tokens, at = torch.tensor([p.ids + list(option)]), slice(len(p.ids) - 1, -1)
            for logits in model(tokens), peer(tokens).logits:
                plain = logits[0, at].log_softmax(-1).gather(1, torch.tensor(option)[:, None]).sum().item()
                assert got == pytest.approx(plain, abs=2e-4)
        assert line["choice"] == int(np.argmax(line["loglikelihoods"]))
        assert line["correct"] == (line["choice"] in p.item.right)
        if task == "arc":
            norm = [x / (len(o) - 1) for x, o in zip(line["loglikelihoods"], p.item.options, strict=True)]
            assert line["correct_norm"] == (int(np.argmax(norm)) in p.item.right)


def test_a_shared_prefix_changes_nothing_with_a_module_attached_and_saves_work(world, monkeypatch):
    prompts, tokenizer = prompts_of(world, "mmlu")
    model = load(world / "base")
    ids = prompts[3].own[:5]
    memory = {i: m for i, m in scoring.remember(model, ids).items() if i}  # as a KV memory: not in every block
    memory[2].lora = {"k": (torch.randn(2, 24), torch.randn(16, 2) * 0.1)}
    together = {p.key: x for part in scoring.answers(model, tokenizer, prompts, memory) for p, x in part}
    for p in prompts:
        hidden = model.run(model.embed_tokens(torch.tensor([p.ids])), 0, 3, memory=memory)
        plain = model.logits(hidden[0, -1]).log_softmax(-1)[[o[0] for o in p.options]]
        assert np.allclose(together[p.key]["loglikelihoods"], plain, atol=2e-4)
    seen = []
    monkeypatch.setattr(
        model, "run", lambda x, *a, **k: seen.append(x.shape[:2].numel()) or Model.run(model, x, *a, **k)
    )
    list(scoring.answers(model, tokenizer, prompts))
    assert sum(seen) < sum(len(p.ids) for p in prompts) / 3


def test_generated_text_ends_at_the_next_question_and_equals_generation_alone(world, monkeypatch):
    prompts, tokenizer = prompts_of(world, "gsm8k", shots=2)
    model = load(world / "base")
    long, prompts = prompts, [replace(p, item=replace(p.item, steps=12)) for p in prompts]
    for part in scoring.answers(model, tokenizer, prompts):
        for p, line in part:
            alone = list(decoder.generate(model, torch.tensor([p.ids]), 12, tokenizer.vocab_size, eos=(0,)))
            text = tokenizer.decode([t.item() for t in alone if t.item()])
            assert line["text"] == text.strip() and not line["correct"]
    written = tokenizer.encode(" 5\n#### 1,000\n\nQuestion: and") + [7] * 500

    def scripted(model, tokens, steps, *_, **__):
        yield from (torch.full((len(tokens),), token) for token in written[:steps])

    monkeypatch.setattr(scoring, "generate", scripted)
    lines = {p.item.id: x for part in scoring.answers(model, tokenizer, long) for p, x in part}
    assert all(x["text"] == "5\n#### 1,000" and x["choice"] == "1000" for x in lines.values())
    assert [lines[i]["correct"] for i in range(4)] == [True, False, False, False]


# The command --------------------------------------------------------------------------------------------------------


def test_results_have_the_shape_of_lm_evaluation_harness_and_standard_errors(world, capsys):
    assert command(world, "mmlu", "--limit", 7) == 0
    r = json.loads((world / "out/mmlu-unpruned.json").read_text())
    lines = samples(world, "mmlu-unpruned")
    assert set(r) == {"results", "n-shot", "n-samples", "config", "git_hash", "date"}
    assert set(r["results"]) == set(r["n-shot"]) == {"mmlu", "mmlu_world_religions", "mmlu_astronomy"}
    right = [line["correct"] for line in lines]
    p, n = sum(right) / 14, 14
    whole = r["results"]["mmlu"]
    assert len(right) == n and whole["acc,none"] == pytest.approx(p) and r["n-shot"]["mmlu"] == 5
    assert whole["acc_stderr,none"] == pytest.approx(math.sqrt(p * (1 - p) / (n - 1)))
    parts = [r["results"][f"mmlu_{name}"]["acc,none"] for name in ("world_religions", "astronomy")]
    assert whole["acc_subjects,none"] == pytest.approx(sum(parts) / 2)
    assert r["n-samples"]["mmlu"] == {"original": 18, "effective": 14}
    assert r["config"]["limit"] == 7 and r["config"]["task"] == "mmlu"
    keys = {"id", "subject", "prompt_tokens", "loglikelihoods", "choice", "answer", "correct", "shots", "module"}
    assert set(lines[0]) == keys
    out = capsys.readouterr().out
    assert f"{p:.4f} +/- {whole['acc_stderr,none']:.4f}" in out and "mean of the subjects' acc" in out
    assert command(world, "arc") == 0
    assert {"acc,none", "acc_norm,none", "acc_norm_stderr,none"} <= set(
        json.loads((world / "out/arc-unpruned.json").read_text())["results"]["arc"]
    )


def test_a_crash_at_row_900_of_1000_loses_no_finished_row_and_changes_no_result(world, monkeypatch, capsys):
    rng = np.random.default_rng(1)
    write(world / "rows/mmlu_test.jsonl", [mmlu(rng, "astronomy", 12) for _ in range(1000)])
    assert command(world, "mmlu", "--shots", 1) == 0
    whole, results = samples(world, "mmlu-unpruned"), json.loads((world / "out/mmlu-unpruned.json").read_text())
    scores, done = scoring.scores, []

    def failing(model, part, *rest):
        if sum(done) + len(part) > 900:
            raise MemoryError
        done.append(len(part))
        return scores(model, part, *rest)

    shutil.rmtree(world / "out")
    monkeypatch.setattr(scoring, "scores", failing)
    with pytest.raises(MemoryError):
        command(world, "mmlu", "--shots", 1)
    path = world / "out/mmlu-unpruned.jsonl"
    assert 800 < len(samples(world, "mmlu-unpruned")) == sum(done) <= 900
    assert not path.with_suffix(".json").exists()
    path.write_bytes(path.read_bytes()[:-40])  # the last line was cut as well
    finished, asked = sum(done) - 1, []
    monkeypatch.setattr(scoring, "scores", lambda m, part, *r: asked.append(len(part)) or scores(m, part, *r))
    assert command(world, "mmlu", "--shots", 1) == 0
    assert 1000 - finished <= sum(asked) < 1000 - finished + done[-1]
    assert samples(world, "mmlu-unpruned") == whole
    again = json.loads(path.with_suffix(".json").read_text())
    assert again["results"] == results["results"]
    asked.clear()
    assert command(world, "mmlu", "--shots", 1) == 0 and not asked  # finished: the table again
    assert command(world, "mmlu", "--shots", 2) == 2
    assert "samples that differ in shots; say --fresh" in capsys.readouterr().err
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
    prompts, _ = prompts_of(world, "mmlu")
    assert seen == [p.own for p in prompts]
    by_key = {name: {(x["subject"], x["id"]): x for x in lines} for name, lines in found.items()}
    assert {x["module"] for x in found["routed"]} == {"french", "german", None}
    for key, line in by_key["routed"].items():
        if line["module"] != "french":
            same = by_key[line["module"] or "backbone"][key]["loglikelihoods"]
            assert np.allclose(line["loglikelihoods"], same, atol=1e-4)
    ours = [by_key["german"][key]["loglikelihoods"] for key in by_key["unpruned"]]
    assert not np.allclose(ours, [x["loglikelihoods"] for x in by_key["unpruned"].values()], atol=1e-3)
    assert command(world, "bbh", "--on", "klingon", run="run") == 2
    assert "--on cannot be 'klingon'" in capsys.readouterr().err
    assert evaluation.main(["bench", str(world / "run"), "arc", "--rows", str(world / "rows"), "--limit", "2"]) == 0
    (world / "run/modules/german.safetensors").write_bytes((world / "run/modules/french.safetensors").read_bytes())
    assert command(world, "mmlu", "--on", "backbone", run="run") == 0
    capsys.readouterr()
    assert command(world, "mmlu", "--on", "german", run="run") == 2  # these samples are of the module that was there
    assert "samples that differ in modules; say --fresh" in capsys.readouterr().err
    assert {p.name for p in (world / "run/bench").iterdir()} == {
        f"arc-{v}.{end}" for v in ("unpruned", "backbone", "routed") for end in ("json", "jsonl")
    }


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
    "missing column": ("mmlu", [], change("mmlu_test.jsonl", choices=None), "mmlu_test.jsonl:2 has no column choices"),
    "answer outside": ("mmlu", [], change("mmlu_test.jsonl", answer=4), "mmlu_test.jsonl:2: its answer is not among"),
    "bad shot": ("mmlu", [], change("mmlu_dev.jsonl", answer="B"), "mmlu_dev.jsonl:2 has no column answer"),
    "answer key": ("arc", [], change("arc_challenge_test.jsonl", answerKey="E"), "arc_challenge_test.jsonl:2: its answer"),
    "no number": ("gsm8k", [], change("gsm8k_test.jsonl", answer="four"), "gsm8k_test.jsonl:2: its answer"),
    "no right choice": ("bbl", [], lambda w: write(w / "rows/bbl/winowhy.json", [dict(input="x", target_scores={"a": 0})]),
                        "winowhy.json:1: its answer"),
    "empty choice": ("bbl", [], lambda w: write(w / "rows/bbl/winowhy.json", [dict(input="x", target_scores={"": 1})]),
                     "winowhy.json:1: one of its choices is empty"),
    "too long": ("mmlu", [], change("mmlu_test.jsonl", question="and then " * 3000), "mmlu_test.jsonl:2 takes"),
    "not JSON": ("arc", [], lambda w: (w / "rows/arc_challenge_test.jsonl").write_text("{}x\n"), ":1 is not JSON"),
    "not a row": ("bbh", [], lambda w: (w / "rows/bbh/snarks.json").write_text("[3]"), "snarks.json:1 has no column input"),
    "unknown subject": ("mmlu", ["--subjects", "alchemy"], None, "no subject 'alchemy'"),
    "few examples": ("mmlu", ["--shots", "6"], None, "has 5 examples for world_religions, not 6"),
    "all examples": ("bbh", ["--shots", "7"], None, "no question of bbh besides 7 examples"),
    "no rows": ("gsm8k", [], remove("gsm8k_test.jsonl"), "get it: python data/prepare.py benchmarks"),
    "no shots": ("gsm8k", [], remove("gsm8k_train.jsonl"), "has no gsm8k_train*.json*"),
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
    assert command(world, "arc") == 2 and "is damaged; say --fresh" in capsys.readouterr().err

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(scoring, "scores", stopped)
    assert command(world, "arc", "--fresh") == 130 and "the same command continues" in capsys.readouterr().err


# The real rows ------------------------------------------------------------------------------------------------------


def test_the_published_rows_are_read_to_the_last():
    if not REAL.exists():
        pytest.skip(f"{REAL} does not exist")
    counts = {task: len(load_items(task, REAL)) for task in TASKS if task != "bbl"}
    assert counts == {"mmlu": 1156, "arc": 1172, "gsm8k": 1319, "bbh": 6511 - 27 * 3}
    scored = [item for item in load_items("bbh", REAL) if item.options]
    assert len({item.subject for item in scored}) == 17
    assert len(load_items("bbh", REAL / "bbh/snarks.json")) == 175
    assert len(load_items("mmlu", REAL / "mmlu_test_8_subjects.jsonl", ["astronomy"])) == 152


def test_a_real_model_answers_as_transformers_does():
    folder = os.environ.get("KOFF_SMOLLM2")
    if not folder or not REAL.exists():
        pytest.skip("KOFF_SMOLLM2 does not name the folder of a SmolLM2 checkpoint, or there are no rows")
    transformers = pytest.importorskip("transformers")
    peer = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model, tokenizer = load(folder), Tokenizer.from_folder(folder)
    prompts = [encode(item, tokenizer, 2048) for item in load_items("mmlu", REAL, ["astronomy"])[:4]]
    assert [len(option) for p in prompts for option in p.options] == [1] * 16
    for part in scoring.answers(model, tokenizer, prompts):
        for p, line in part:
            with torch.no_grad():
                theirs = peer(torch.tensor([p.ids])).logits[0, -1].log_softmax(-1)
            assert np.allclose(line["loglikelihoods"], theirs[[o[0] for o in p.options]], atol=1e-3)
