"""lm-evaluation-harness: our model against our own benchmarks, and against its `hf` model on the exported folder."""

import functools
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import eval as evaluation
import train
from data import BadInput
from data.harness import harness
from test_train import flags, world  # noqa: F401

lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
tasks_of_harness = pytest.importorskip("lm_eval.tasks")
TaskManager = tasks_of_harness.TaskManager

ROOT = Path(__file__).resolve().parent.parent
REAL = Path(os.environ.get("KOFF_ROWS", ROOT / "../shared/data/benchmarks"))
LOCAL = """
dataset_path: json
dataset_kwargs: {data_files: {test: ROWS}}
test_split: test
"""
ARC = """
task: arc_local
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: "{{choices.label.index(answerKey)}}"
doc_to_choice: "{{choices.text}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
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


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """A folder with three tasks over local rows; nothing of it needs the network."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    # The harness's own 10,000 tasks are not read: that takes longer than everything else here.
    monkeypatch.setattr(tasks_of_harness, "TaskManager", functools.partial(TaskManager, include_defaults=False))
    folder = tmp_path / "tasks"
    folder.mkdir()
    german = (ROOT / "data/handbook/german.txt").read_text(encoding="utf-8").splitlines()
    lines = [line for line in german if len(line) > 40][:40]
    rows = {
        "text": [dict(question=" ".join(line.split()[:8]), answer="x") for line in lines[:10]],
        "rolling": [dict(text="\n".join(lines[i : i + 8])) for i in range(0, 40, 8)],
    }
    if REAL.exists():
        arc = (REAL / "arc_challenge_test.jsonl").read_text(encoding="utf-8").splitlines()[:60]
        rows["arc"] = [json.loads(line) for line in arc]
    for name, task in (("arc", ARC), ("text", TEXT), ("rolling", ROLLING)):
        if name in rows:
            path = tmp_path / "rows" / f"{'arc_challenge_test' if name == 'arc' else name}.jsonl"
            path.parent.mkdir(exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows[name]), encoding="utf-8")
            (folder / f"{name}.yaml").write_text(task + LOCAL.replace("ROWS", str(path)))
    return folder


def run_of(world, **more):  # noqa: F811
    """The folder of a tiny run."""
    assert train.main(flags(world, **more)) == 0
    return world / "runs/one"


def command(run, task, tasks, *variants, **more):
    """eval.py bench RUN TASK --harness --on VARIANTS"""
    given = dict(run=run, task=task, include=tasks, on=variants, limit=None, shots=None, device="cpu", out=None)
    harness(SimpleNamespace(**given | more))


def results(run, name):
    return json.loads((run / f"bench/{name}.json").read_text())


def samples(found, task, metric):
    """[(log-likelihoods or text, the metric)] of a task's samples in their order."""
    rows = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
    return [(row["filtered_resps"], row[metric]) for row in rows]


def test_sixty_arc_questions_have_the_same_accuracy_as_natively(world, tasks, capsys):  # noqa: F811
    if not REAL.exists():
        pytest.skip(f"{REAL} does not exist")
    run = run_of(world)
    names = ("unpruned", "routed", "german")
    command(run, "arc_local", tasks, *names)
    assert "acc_norm" in capsys.readouterr().out
    native = ["bench", str(run), "arc", "--rows", str(tasks.parent / "rows"), "--on", *names, "--device", "cpu"]
    assert evaluation.main(native) == 0
    for name in names:
        ours = results(run, f"arc-{name}")["results"]["arc"]
        theirs = results(run, f"arc_local-{name}-harness")
        assert theirs["n-samples"]["arc_local"]["effective"] == 60
        for metric in ("acc,none", "acc_norm,none"):
            assert theirs["results"]["arc_local"][metric] == ours[metric]
        lines = (run / f"bench/arc-{name}.jsonl").read_text().splitlines()[1:]
        scores = [json.loads(line)["loglikelihoods"] for line in lines]
        for native_scores, (answers, _) in zip(scores, samples(theirs, "arc_local", "acc"), strict=True):
            if name != "routed":  # natively the router reads the question alone
                assert [float(log_p) for log_p, _ in answers] == pytest.approx(native_scores, abs=1e-3)


def test_the_answers_are_those_of_hf_on_the_exported_model(world, tasks):  # noqa: F811
    run = run_of(world, kv_tokens=0)
    assert evaluation.main(["export", str(run), "hf", "--module", "german"]) == 0
    from lm_eval.models.huggingface import HFLM

    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(world / "base/tokenizer.json"))
    tokenizer.eos_token = tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    folder = run / "export/hf-german"
    tokenizer.save_pretrained(folder)
    peer = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=8, max_length=256)
    metrics = dict(text_local="exact_match", rolling_local="word_perplexity")
    if REAL.exists():
        metrics["arc_local"] = "acc"
    for task, metric in metrics.items():
        command(run, task, tasks, "german")
        ours = results(run, f"{task}-german-harness")
        manager = TaskManager(include_path=str(tasks), include_defaults=False)
        theirs = lm_eval.simple_evaluate(peer, tasks=[task], task_manager=manager)
        pairs = zip(samples(ours, task, metric), samples(theirs, task, metric), strict=True)
        for (own, own_metric), (other, other_metric) in pairs:
            assert own_metric == pytest.approx(other_metric, rel=1e-3)
            if task == "arc_local":
                for (log_p, greedy), (their_log_p, their_greedy) in zip(own, other, strict=True):
                    assert float(log_p) == pytest.approx(float(their_log_p), abs=1e-3)
                    assert str(greedy) == str(their_greedy)
            elif task == "text_local":
                assert own == other


def test_a_task_that_is_not_there_and_a_harness_that_is_not_are_one_sentence(world, tasks, monkeypatch):  # noqa: F811
    run = run_of(world, steps=0)
    with pytest.raises(BadInput, match="the harness has no task 'arc_lokal'"):
        command(run, "arc_lokal", tasks)
    command(run, "text_local", tasks, limit=2, out=world / "elsewhere")
    names = {f"text_local-{name}-harness.json" for name in ("unpruned", "backbone", "routed")}
    assert {path.name for path in (world / "elsewhere").iterdir()} == names
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(BadInput, match="pip install lm_eval"):
        command(run, "text_local", tasks)
