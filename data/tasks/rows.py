"""Turn rows on the disk into questions for the yamls beside this file and lm-evaluation-harness.

The harness calls `mmlu`, `arc`, `bbl` or `pairs` with the file or folder `rows`, from `eval.py bench --rows`. Every
question has a text, its choices, and the positions of the right ones. Nothing else imports this file, so the harness's
packages are there.
"""

import json
from collections import Counter
from operator import itemgetter
from pathlib import Path

from datasets import Dataset
from lm_eval.api.samplers import ContextSampler

from data import MALFORMED, BadInput
from data.corpus import lines_of, read_text


def mmlu(rows, shots, **_):
    """The questions of mmlu_test*.jsonl, each with the first `shots` examples of its subject in mmlu_dev*.jsonl."""
    folder = Path(rows)
    if folder.is_file():
        folder = folder.parent
    solved = {}
    for example in questions(folder, "mmlu_dev*.jsonl", mmlu_questions) if shots else ():
        letter = example["choices"][example["answer"][0]]
        solved.setdefault(example["subject"], []).append(f"{example['question']} {letter}\n\n")
    asked = questions(rows, "mmlu_test*.jsonl", mmlu_questions)
    for question in asked:
        examples = solved.get(question["subject"], [])
        if len(examples) < shots:
            raise BadInput(f"{folder} has {len(examples)} examples for {question['subject']}; lower --shots.")
        question["examples"] = "".join(examples[:shots])
    return split(asked)


def arc(rows, **_):
    return split(questions(rows, "arc_challenge_test*.jsonl", arc_questions))


def bbl(rows, **_):
    return split(questions(rows, "**/*.json", bbl_questions))


def pairs(rows, **_):
    return split(questions(rows, "*.jsonl", pair_questions))


def split(questions):
    return {"test": Dataset.from_list(questions)}


class InDescription(ContextSampler):
    """Adds no examples, because koff_mmlu has them in its description."""

    def sample(self, *_, **__):
        return []


# JSON -> questions ---------------------------------------------------------------------------------------------------


def mmlu_questions(row):
    text = row["question"].strip()
    for letter, choice in zip("ABCD", row["choices"], strict=True):
        text += f"\n{letter}. {choice}"
    subject = row["subject"].replace("_", " ")
    yield {"subject": subject, "question": f"{text}\nAnswer:", "choices": list("ABCD"), "answer": [int(row["answer"])]}


def arc_questions(row):
    choices = row["choices"]
    right = choices["label"].index(row["answerKey"])
    yield {"question": f"Question: {row['question']}\nAnswer:", "choices": choices["text"], "answer": [right]}


def bbl_questions(file):
    """Choices are sorted alphabetically, because a file may always list the right one first."""
    for row in file["examples"]:
        scores = row["target_scores"]
        choices = sorted(scores)
        best = max(scores.values())
        text = f"\nQ: {row['input']}"
        for choice in choices:
            text += f"\n  choice: {choice}"
        right = [i for i, choice in enumerate(choices) if scores[choice] == best]
        yield {"question": f"{text}\nA: ", "choices": choices, "answer": right}


def pair_questions(row):
    """The bad sentence comes first: the harness takes the first of two equally likely ones."""
    choices = [row["sentence_bad"], row["sentence_good"]]
    yield {"subject": str(row["UID"]), "question": "", "choices": choices, "answer": [1]}


# Files -> questions --------------------------------------------------------------------------------------------------


def questions(rows, pattern, questions_of):
    """[question] of the file `rows` or, if it is a folder, of its files that match `pattern`.

    The first questions of every file and subject come first, then all second ones, and so on: --limit cuts all alike.
    questions_of: parsed line of a .jsonl, or parsed .json -> its questions. BadInput if `questions_of` fails.
    """
    rows = Path(rows)
    files = [rows] if rows.is_file() else sorted(rows.glob(pattern))
    result = []
    count = Counter()
    for path in files:
        texts = lines_of(path)
        if path.suffix == ".json":
            texts = [(path, read_text(path))]
        for where, text in texts:
            try:
                for question in questions_of(json.loads(text)):
                    check(question)
                    group = path, question.get("subject")
                    result.append({"where": str(where), "number": count[group], **question})
                    count[group] += 1
            except MALFORMED as error:
                raise BadInput(f"{where} is no row of this task ({error!r}); mend or remove it.") from None
    if not result:
        source = "data/prepare.py benchmarks gets those of MMLU and ARC"
        raise BadInput(f"{rows} has no rows in {pattern}; name the folder that has ({source}).")
    return sorted(result, key=itemgetter("number"))


def check(question):
    """Raise ValueError, or another error, for a question that cannot be answered."""
    choices = question["choices"]
    if not all(choice.strip() for choice in choices):
        raise ValueError("a choice is empty")
    if not all(i in range(len(choices)) for i in question["answer"]):
        raise ValueError("the answer is not among the choices")
