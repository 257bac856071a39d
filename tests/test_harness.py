"""lm-evaluation-harness: log-likelihoods against plain passes, our tasks against numbers by hand and a literal prompt,
our model against the harness's `hf` model on the exported folder, and every kind of bad input."""

import json
import os
import random
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import eval as evaluation
import train
from data import BadInput, harness, router
from data.checkpoint import load
from data.harness import RunModel, log_likelihoods, remember, variants_on
from data.run import Run
from data.tokenizer import Tokenizer
from test_damage import BYTES, nested, other_kind, other_line_ends
from test_modules import beside
from test_train import flags, make_world

lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not installed")
tasks_of_harness = pytest.importorskip("lm_eval.tasks")
TaskManager = tasks_of_harness.TaskManager
from data.tasks import rows as ours  # it needs lm_eval

ROOT = Path(__file__).resolve().parent.parent
REAL = Path(os.environ.get("KOFF_ROWS", ROOT / "../shared/data/benchmarks"))
WORDS = "the kernel boots a shell and then waits for what people may type into it while disks and drivers come up"
TEXT = """
task: text_local
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n\\n", "er"], max_gen_toks: 24, do_sample: false}
metric_list: [{metric: exact_match}]
"""
ROLLING = """
task: rolling_local
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}]
"""


def sentence(rng, n):
    return " ".join(rng.choice(WORDS.split(), n))


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def mmlu_row(rng, subject):
    choices = [sentence(rng, 1) for _ in range(4)]
    return dict(question=sentence(rng, 2), subject=subject, choices=choices, answer=int(rng.integers(4)))


def write_rows(folder):
    """Tiny rows of every task of ours."""
    rng = np.random.default_rng(0)
    subjects = ("world_religions", "astronomy")
    write(folder / "mmlu_dev.jsonl", [mmlu_row(rng, name) for name in subjects for _ in range(5)])
    write(folder / "mmlu_test.jsonl", [mmlu_row(rng, name) for name in subjects for _ in range(6)])
    arc = []
    for _ in range(12):
        choices = dict(text=[sentence(rng, n) for n in (1, 4, 2)], label=["1", "2", "3"])
        arc.append(dict(question=sentence(rng, 5), choices=choices, answerKey=str(rng.integers(1, 4))))
    write(folder / "arc_challenge_test.jsonl", arc)
    scores = [{"yes": 1, "not at all": 0}, {"up": 0, "down it goes": 1, "boots": 1, "a": 0}] * 5
    examples = [dict(input=sentence(rng, 4), target_scores=score) for score in scores]
    (folder / "bbl").mkdir()
    (folder / "bbl/strategyqa.json").write_text(json.dumps({"canary": "x", "examples": examples}))
    pairs = []
    for i in range(12):
        pairs.append(dict(sentence_good=sentence(rng, 5), sentence_bad=sentence(rng, 5), UID=f"kind {i % 2}"))
    pairs.append(dict(sentence_good="the same", sentence_bad="the same", UID="kind 2"))
    write(folder / "pairs/pairs.jsonl", pairs)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny random checkpoint, a run of it, and tiny rows."""
    folder = tmp_path_factory.mktemp("harness")
    make_world(folder)
    write_rows(folder / "rows")
    assert train.main(flags(folder)) == 0
    return folder


@pytest.fixture
def rows(world, tmp_path):
    """A copy of the rows, for who changes them."""
    return shutil.copytree(world / "rows", tmp_path / "rows")


ROWS = dict(koff_mmlu="rows", koff_arc="rows/arc_challenge_test.jsonl", koff_bbl="rows/bbl", koff_pairs="rows/pairs")


def bench(world, task, *more, run="runs/one", out="out"):
    """Exit status of eval.py bench RUN TASK, of the unpruned model unless `more` has --on."""
    given = ["bench", world / run, task, "--out", world / out, "--device", "cpu", *more]
    if "--on" not in more:
        given += ["--on", "unpruned"]
    if task in ROWS and "--rows" not in more:
        given += ["--rows", world / ROWS[task]]
    return evaluation.main([str(x) for x in given])


def found(world, task, variant="unpruned", out="out"):
    """(the results of a task, its samples in their order)."""
    newest = max((world / out).glob(f"{task}-{variant}*.json"), key=lambda path: path.stat().st_mtime_ns)
    saved = json.loads(newest.read_text())
    return saved["results"][task], sorted(saved["samples"][task], key=lambda sample: sample["doc_id"])


# Log-likelihoods -----------------------------------------------------------------------------------------------------


def plain(model, context, continuation, module=None):
    """log p of the continuation (ids) behind the context (ids), by one pass over both."""
    logits = model(torch.tensor([context + continuation]), memories=module)[0, len(context) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(continuation)[:, None]).sum().item()


def test_log_likelihoods_are_those_of_one_plain_pass_with_and_without_a_module(world):
    model = load(world / "base")
    module = {}  # keys and values in two of three blocks, LoRA in one of them
    for i, memory in remember(model, [5, 6, 7, 8]).items():
        if i:
            module[i] = memory
    module[2].lora = {"k": (torch.randn(2, 24), torch.randn(16, 2) * 0.1)}
    continuations = [[9], [3, 1, 4, 1, 5], [2, 6]]
    for context in ([11, 12, 13, 14], [11]):
        for attached in (None, module):
            scores, _ = log_likelihoods(model, context, continuations, attached)
            assert scores == pytest.approx([plain(model, context, ids, attached) for ids in continuations], abs=2e-4)
        assert not np.allclose(scores, log_likelihoods(model, context, continuations)[0], atol=1e-2)


def test_greedy_says_whether_the_model_would_write_it(world):
    model = load(world / "base")
    context = [5, 6, 7]
    first = model(torch.tensor([context]))[0, -1].argmax().item()
    second = model(torch.tensor([[*context, first]]))[0, -1].argmax().item()
    _, greedy = log_likelihoods(model, context, [[first, second], [first, second + 1], [first], [second + 1]])
    assert greedy == [True, False, True, False]


def test_the_variants_of_a_run(world):
    run = Run(world / "runs/one", "cpu")
    assert variants_on(run) == ["unpruned", "backbone", "routed"]
    assert variants_on(run, ["german"]) == ["german"]
    with pytest.raises(BadInput, match=r"--on cannot be 'klingon'; .* has unpruned, backbone, routed, french, german"):
        variants_on(run, ["klingon"])
    run.names = []  # pruned only
    assert variants_on(run) == ["unpruned", "backbone"]
    with pytest.raises(BadInput, match="--on cannot be 'routed'"):
        variants_on(run, ["routed"])


# Our tasks -----------------------------------------------------------------------------------------------------------


def check(world, task, n, metrics):
    """The log-likelihoods of a task are those of plain passes over its prompts, the metrics what follows from them."""
    assert bench(world, task) == 0
    results, samples = found(world, task)
    model = load(world / "base")
    tokenizer = Tokenizer.from_folder(world / "base")
    right = {metric: [] for metric in metrics}
    for sample in samples:
        scores = []
        normed = []
        for (prompt, choice), option in zip(sample["arguments"], sample["doc"]["choices"], strict=True):
            context = tokenizer.encode(prompt.rstrip(" "), bos=True)
            whole = tokenizer.encode(prompt + choice, bos=True)
            if not prompt:
                context = [0]  # the model's end of text
                whole = context + tokenizer.encode(choice)
            assert whole[: len(context)] == context
            scores.append(plain(model, context, whole[len(context) :]))
            normed.append(scores[-1] / len(option))
        assert [float(score) for score, _ in sample["filtered_resps"]] == pytest.approx(scores, abs=1e-3)
        for metric, values in (("acc", scores), ("acc_norm", normed)):
            if metric in metrics:
                right[metric].append(np.argmax(values) in sample["doc"]["answer"])
                assert sample[metric] == right[metric][-1]
    assert len(samples) == n
    for metric, values in right.items():
        assert results[f"{metric},none"] == pytest.approx(np.mean(values)) and 0 < np.mean(values) < 1
    return samples


def test_mmlu_with_five_examples_of_the_same_subject(world, rows):
    samples = check(world, "koff_mmlu", 12, ["acc"])
    # The subjects take turns: --limit has both.
    assert [sample["doc"]["subject"] for sample in samples[:4]] == ["world religions", "astronomy"] * 2
    dev = [json.loads(line) for line in (world / "rows/mmlu_dev.jsonl").read_text().splitlines()]
    for sample in samples[:2]:
        subject = sample["doc"]["subject"]
        examples = [row for row in dev if row["subject"].replace("_", " ") == subject]
        before, *shown = sample["arguments"][0][0].split("\n\n")
        assert before == f"The following are multiple choice questions (with answers) about {subject}."
        assert [text.split("\n")[0] for text in shown[:5]] == [row["question"] for row in examples]
        assert [text[-1] for text in shown[:5]] == ["ABCD"[row["answer"]] for row in examples] and len(shown) == 6

    row = dict(question=" What is 1+1?", subject="abstract_algebra", choices=["1", "2", "3", "4"], answer=1)
    write(rows / "mmlu_dev.jsonl", [row, {**row, "question": "And 2+2?", "answer": 3}])
    write(rows / "mmlu_test.jsonl", [{**row, "question": "And 1+2?", "answer": 2}])
    assert bench(world, "koff_mmlu", "--rows", rows / "mmlu_test.jsonl", "--shots", 2, out="two") == 0
    _, (sample,) = found(world, "koff_mmlu", out="two")
    prompt = (
        "The following are multiple choice questions (with answers) about abstract algebra.\n\n"
        "What is 1+1?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: B\n\n"
        "And 2+2?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: D\n\n"
        "And 1+2?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:"
    )
    assert sample["arguments"] == [[prompt, f" {letter}"] for letter in "ABCD"] and sample["target"] == [2]
    [saved] = (world / "two").iterdir()
    assert json.loads(saved.read_text())["n-shot"] == {"koff_mmlu": 2}


def test_arc(world, rows):
    check(world, "koff_arc", 12, ["acc", "acc_norm"])
    choices = dict(text=["so", "not so"], label=["1", "2"])
    write(rows / "arc_challenge_test.jsonl", [dict(id="x", question="Why?", choices=choices, answerKey="2")])
    assert bench(world, "koff_arc", "--rows", rows, out="one") == 0
    _, (sample,) = found(world, "koff_arc", out="one")
    prompt = "Question: Why?\nAnswer:"
    assert sample["arguments"] == [[prompt, " so"], [prompt, " not so"]] and sample["target"] == [1]


def test_bbl(world, rows):
    samples = check(world, "koff_bbl", 10, ["acc", "acc_norm"])
    assert samples[1]["target"] == [1, 2]  # two that are equally good, in the order of the alphabet
    example = dict(input="Is it?", target_scores={"yes": 0, "no": 1})
    (rows / "bbl/strategyqa.json").unlink()
    (rows / "bbl/winowhy").mkdir()
    (rows / "bbl/winowhy/task.json").write_text(json.dumps({"examples": [example]}))
    assert bench(world, "koff_bbl", "--rows", rows, out="one") == 0
    _, (sample,) = found(world, "koff_bbl", out="one")
    prompt = "\nQ: Is it?\n  choice: no\n  choice: yes\nA: "
    assert sample["arguments"] == [[prompt, "no"], [prompt, "yes"]] and sample["target"] == [0]


def test_pairs(world):
    samples = check(world, "koff_pairs", 13, ["acc"])
    results, _ = found(world, "koff_pairs")
    model = load(world / "base")
    tokenizer = Tokenizer.from_folder(world / "base")
    better = []
    for line in (world / "rows/pairs/pairs.jsonl").read_text().splitlines():
        row = json.loads(line)
        good, bad = [plain(model, [0], tokenizer.encode(row[f"sentence_{name}"])) for name in ("good", "bad")]
        better.append(good > bad)
    assert not better[-1]  # two that are the same
    assert results["acc,none"] == pytest.approx(np.mean(better))
    row = json.loads((world / "rows/pairs/pairs.jsonl").read_text().splitlines()[0])
    assert samples[0]["arguments"] == [["", row["sentence_bad"]], ["", row["sentence_good"]]]
    assert samples[0]["target"] == [1]


def test_the_token_before_an_empty_context_is_that_of_hf(world, monkeypatch):
    model = RunModel(Run(world / "runs/one", "cpu"), "backbone")
    a, b = (model.run.tokenizer.encode(name)[0] for name in "ab")
    cases = ({}, 0), ({"eos_token": "b"}, b), ({"eos_token": "b", "bos_token": "a"}, a), ({"pad_token": "a"}, 0)
    for names, first in cases:
        monkeypatch.setattr(harness, "special_tokens", lambda folder, names=names: (names, []))
        vars(model).pop("eot_token_id", None)
        assert model.eot_token_id == first


@pytest.mark.parametrize("answer", [[], [5] * 300])
def test_an_answer_that_no_context_holds_is_refused(world, answer):
    model = RunModel(Run(world / "runs/one", "cpu"), "backbone")
    with pytest.raises(BadInput, match=rf"an answer of {len(answer)} tokens, and the context has {model.max_length}"):
        model._loglikelihood_tokens([(("", ""), [1, 2], answer)])
    longest = [5] * model.max_length
    [(log_p, _)] = model._loglikelihood_tokens([(("", ""), [1, 2], longest)])
    assert log_p == pytest.approx(plain(model.model, [2], longest), rel=1e-3)


def test_a_run_is_measured_with_all_its_parts(world, monkeypatch, capsys):
    names = ("french", "german", None)
    seen = []

    def route(self, ids):
        seen.append(ids[0].tolist())
        return [names[len(seen) % 3]]

    monkeypatch.setattr(router.Router, "route", route)
    variants = ("unpruned", "backbone", "routed", "german")
    assert bench(world, "koff_arc", "--limit", 6, "--on", *variants) == 0
    assert capsys.readouterr().out.count("acc_norm") == 4
    of = {}
    for name in variants:
        _, samples = found(world, "koff_arc", name)
        of[name] = [[float(score) for score, _ in sample["filtered_resps"]] for sample in samples]
    run = Run(world / "runs/one", "cpu")
    tokenizer = run.tokenizer
    contexts = [tokenizer.encode(sample["arguments"][0][0], bos=True) for sample in samples]
    assert seen == contexts  # once for a question
    for i, sample in enumerate(samples):
        routed = names[(i + 1) % 3]
        for name, module in ("backbone", None), ("german", "german"), ("routed", routed):
            scores = []
            for prompt, choice in sample["arguments"]:
                option = tokenizer.encode(prompt + choice, bos=True)[len(contexts[i]) :]
                scores.append(plain(run.backbone, contexts[i], option, run.memories(module) if module else None))
            assert of[name][i] == pytest.approx(scores, abs=1e-3)
    assert not np.allclose(of["german"], of["backbone"], atol=1e-2)
    assert not np.allclose(of["unpruned"], of["backbone"], atol=1e-2)


def test_a_module_is_in_the_matrices(world, tasks, monkeypatch):
    seen = beside(monkeypatch)
    for task in "koff_arc", "text_local", "rolling_local":
        assert bench(world, task, "--include", tasks, "--limit", 2, "--on", "german") == 0
    assert seen and not any(seen)


def test_the_published_rows_are_read_to_the_last():
    if not REAL.exists():
        pytest.skip(f"{REAL} does not exist")
    assert len(ours.mmlu(REAL, 5)["test"]) == 1156
    assert len(ours.arc(REAL)["test"]) == 1172
    pairs = REAL.parent / "pairs"
    if not pairs.exists():
        pytest.skip(f"{pairs} does not exist")
    assert len(ours.pairs(pairs / "blimp_english.jsonl")["test"]) == 1340


# Other tasks ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def tasks(world, tmp_path, monkeypatch):
    """A folder with two tasks over local rows; nothing of it needs the network."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def manager(include_defaults, **more):
        """The harness's own 10,000 tasks are not read: that takes longer than everything else here."""
        return TaskManager(include_defaults=False, **more)

    monkeypatch.setattr(tasks_of_harness, "TaskManager", manager)
    german = (ROOT / "data/handbook/german.txt").read_text(encoding="utf-8").splitlines()
    lines = [line for line in german if len(line) > 40][:40]
    rows = {
        "text": [dict(question=" ".join(line.split()[:8]), answer="x") for line in lines[:10]],
        "rolling": [dict(text="\n".join(lines[i : i + 8])) for i in range(0, 40, 8)],
    }
    (tmp_path / "tasks").mkdir()
    for name, task in (("text", TEXT), ("rolling", ROLLING)):
        path = tmp_path / "rows" / f"{name}.jsonl"
        write(path, rows[name])
        local = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {path}}}}}\ntest_split: test\n"
        (tmp_path / "tasks" / f"{name}.yaml").write_text(task + local)
    return tmp_path / "tasks"


def test_the_answers_are_those_of_hf_on_the_exported_model(world, tasks):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from lm_eval.models.huggingface import HFLM

    run = world / "runs/hf"
    assert train.main(flags(world, kv_tokens=0, out=run, steps=4)) == 0
    assert evaluation.main(["export", str(run), "hf", "--module", "german"]) == 0
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(world / "base/tokenizer.json"))
    tokenizer.eos_token = tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    tokenizer.save_pretrained(run / "export/hf-german")
    folder = str(run / "export/hf-german")
    peer = HFLM(pretrained=folder, device="cpu", dtype="float32", batch_size=8, max_length=256)
    folders = [str(tasks), str(ROOT / "data/tasks")]
    for task, metric in (
        ("text_local", "exact_match"),
        ("rolling_local", "word_perplexity"),
        ("koff_arc", "acc"),
        ("koff_pairs", "acc"),
    ):
        assert bench(world, task, "--include", tasks, "--on", "german", run="runs/hf") == 0
        rows = {"rows": str(world / ROWS[task])} if task in ROWS else None
        manager = TaskManager(include_path=folders, include_defaults=False, metadata=rows)
        theirs = lm_eval.simple_evaluate(peer, tasks=[task], task_manager=manager)["samples"][task]
        theirs.sort(key=lambda sample: sample["doc_id"])
        _, samples = found(world, task, "german")
        for own, other in zip(samples, theirs, strict=True):
            assert own[metric] == pytest.approx(other[metric], rel=1e-3)
            if task == "text_local":
                assert own["filtered_resps"] == other["filtered_resps"]
            elif task in ROWS:
                for (log_p, greedy), (their_log_p, their_greedy) in zip(
                    own["filtered_resps"], other["filtered_resps"], strict=True
                ):
                    assert float(log_p) == pytest.approx(float(their_log_p), abs=1e-3)
                    assert str(greedy) == str(their_greedy)


def test_where_the_results_lie_and_a_task_that_is_not_there(world, tasks, capsys):
    argv = ["bench", world / "runs/one", "text_local", "--include", tasks, "--limit", 2, "--out", world / "elsewhere"]
    assert evaluation.main([str(x) for x in argv]) == 0
    fingerprint = Run(world / "runs/one").config.raw["koff_fingerprint"]
    assert {path.name for path in (world / "elsewhere").iterdir()} == {
        f"text_local-{name}-limit-2-run-{fingerprint}.json" for name in ("unpruned", "backbone", "routed")
    }
    argv = ["bench", str(world / "runs/one"), "koff_pairs", "--rows", str(world / "rows/pairs"), "--on", "backbone"]
    assert evaluation.main(argv) == 0
    assert [path.name for path in (world / "runs/one/bench").iterdir()] == ["koff_pairs-backbone-rows-pairs.json"]
    # Nothing overwrites the result of another setting, other rows or another run in the same folder.
    copy = world / "rows/fewer"
    shutil.copytree(world / "rows/pairs", copy)
    for more in ["--limit", "1"], ["--limit", "2"], ["--rows", str(copy)]:
        assert evaluation.main([*argv, *more]) == 0
    assert len([*(world / "runs/one/bench").iterdir()]) == 4
    assert train.main(flags(world, out=world / "runs/two", seed=1)) == 0
    for run in "runs/one", "runs/two":
        assert bench(world, "koff_pairs", run=run, out="both") == 0
    assert len([*(world / "both").iterdir()]) == 2
    capsys.readouterr()
    assert bench(world, "arc_lokal", "--include", tasks) == 2
    assert "the harness has no task 'arc_lokal'" in capsys.readouterr().err


# Bad input -----------------------------------------------------------------------------------------------------------


def change(name, **more):
    def work(rows):
        path = rows / name
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        lines[1] = {key: value for key, value in {**lines[1], **more}.items() if value is not None}
        write(path, lines)

    return work


def bbl(text):
    return lambda rows: (rows / "bbl/winowhy.json").write_text(text)


def choices(**scores):
    return bbl(json.dumps({"examples": [dict(input="x", target_scores=scores)]}))


BAD = {
    "no column": ("koff_mmlu", change("mmlu_test.jsonl", choices=None), "mmlu_test.jsonl:2 is no row of this task (KeyError('choices'))"),
    "no column of an example": ("koff_mmlu", change("mmlu_dev.jsonl", subject=None), "mmlu_dev.jsonl:2 is no row"),
    "no column of a pair": ("koff_pairs", change("pairs/pairs.jsonl", sentence_good=None), "pairs.jsonl:2 is no row of this task (KeyError('sentence_good'))"),
    "answer outside": ("koff_mmlu", change("mmlu_test.jsonl", answer=4), "the answer is not among the choices"),
    "answer that is a letter": ("koff_mmlu", change("mmlu_dev.jsonl", answer="B"), "mmlu_dev.jsonl:2 is no row"),
    "three choices": ("koff_mmlu", change("mmlu_test.jsonl", choices=["a", "b", "c"]), "mmlu_test.jsonl:2 is no row"),
    "choices that are none": ("koff_mmlu", change("mmlu_test.jsonl", choices=7), "mmlu_test.jsonl:2 is no row"),
    "answer key": ("koff_arc", change("arc_challenge_test.jsonl", answerKey="E"), "arc_challenge_test.jsonl:2 is no row"),
    "not JSON": ("koff_arc", lambda rows: (rows / "arc_challenge_test.jsonl").write_text("{}x\n"), ":1 is no row of this task (JSONDecodeError"),
    "scores that are none": ("koff_bbl", choices(a="b", c=1), "winowhy.json is no row"),
    "empty choice": ("koff_bbl", choices(a=1, **{" ": 0}), "a choice is empty"),
    "no scores": ("koff_bbl", choices(), "winowhy.json is no row"),
    "no examples": ("koff_bbl", bbl("{}"), "winowhy.json is no row of this task (KeyError('examples'))"),
    "no file": ("koff_arc", lambda rows: (rows / "arc_challenge_test.jsonl").unlink(), "rows has no rows in arc_challenge_test*.jsonl; name the folder"),
    "no examples file": ("koff_mmlu", lambda rows: (rows / "mmlu_dev.jsonl").unlink(), "rows has no rows in mmlu_dev*.jsonl"),
    "few examples": ("koff_mmlu", lambda rows: write(rows / "mmlu_dev.jsonl", [mmlu_row(np.random.default_rng(0), "astronomy")] * 5), "has 0 examples for world religions; lower --shots"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_rows_are_one_sentence_and_status_2(world, rows, case, capsys):
    task, damage, message = BAD[case]
    damage(rows)
    folder = rows / "pairs" if task == "koff_pairs" else rows
    assert bench(world, task, "--rows", folder, out="bad") == 2
    err = [line for line in capsys.readouterr().err.splitlines() if line]
    assert message in err[-1] and len(err) == 1 and not (world / "bad").exists()


@pytest.mark.parametrize(
    "task,more,message",
    [
        ("koff_arc", [], "--rows is where a koff_ task has its questions"),
        ("arc_challenge", ["--rows", "x"], "--rows is where a koff_ task has its questions"),
        ("koff_arc", ["--rows", "x", "--shots", "3"], "koff_arc has no examples; leave out --shots"),
        ("koff_nothing", ["--rows", "x"], "the harness has no task 'koff_nothing'"),
        ("koff_arc", ["--rows", "x", "--limit", "0"], "--limit of at least 1"),
        ("koff_mmlu", ["--rows", "x", "--shots", "-1"], "--shots of at least 0"),
        ("koff_arc", ["--rows", "x", "--on", "klingon"], "--on cannot be 'klingon'"),
    ],
)
def test_options_that_mean_nothing_are_refused(world, task, more, message, capsys):
    assert evaluation.main(["bench", str(world / "runs/one"), task, "--device", "cpu", *more]) == 2
    assert message in capsys.readouterr().err


def test_without_the_package_and_without_a_run(world, monkeypatch, capsys):
    for name in "nothing", "base":
        assert bench(world, "koff_arc", run=name) == 2
        assert f"{name}/settings.json does not exist; name the folder of a run" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert bench(world, "koff_arc") == 2
    assert "pip install -U lm_eval" in capsys.readouterr().err


def test_damaged_rows_are_read_or_refused(world, tmp_path):
    whole = (world / "rows/arc_challenge_test.jsonl").read_bytes()
    path = tmp_path / "arc_challenge_test.jsonl"
    refused = 0
    for number in range(300):
        rng = random.Random(number)
        path.write_bytes(rng.choice([*BYTES, other_line_ends, nested, other_kind])(whole, rng))
        try:
            assert len(ours.arc(tmp_path)["test"]) > 0
        except BadInput as error:
            assert str(path) in str(error) or str(tmp_path) in str(error)
            refused += 1
    assert 100 < refused < 290
