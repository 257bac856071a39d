"""Benchmarks: rows in the columns of the Hugging Face Hub, which `prepare.py` gets, to prompts with their answers."""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

from data import BadInput
from data.corpus import read_text

# task: (examples before a question, patterns of its files, those of the examples if they have some, where to get them)
PREPARED = "python data/prepare.py benchmarks"
TASKS = {
    "mmlu": (5, ("mmlu_test*.json*",), "mmlu_dev*.json*", PREPARED),
    "arc": (0, ("arc_challenge_test*.json*",), None, PREPARED),
    "gsm8k": (5, ("gsm8k_test*.json*",), "gsm8k_train*.json*", PREPARED),
    "bbh": (3, ("bbh/*.json", "*.json"), None, "github.com/suzgunm/BIG-Bench-Hard"),
    "bbl": (0, ("bbl/*.json", "*.json", "*/task.json", "*/*/task.json"), None, "github.com/google/BIG-bench"),
}
LITE = """bbq_lite_json code_line_description conceptual_combinations emoji_movie formal_fallacies_syllogisms_negation
hindu_knowledge known_unknowns language_identification logic_grid_puzzle logical_deduction misconceptions_russian
novel_concepts play_dialog_same_or_different strange_stories strategyqa symbol_interpretation
vitaminc_fact_verification winowhy""".split()  # noqa: SIM905, the multiple-choice tasks of BIG-bench Lite


@dataclass(frozen=True)
class Item:
    """A question. `options`: what may follow it, () where text is generated; `right`: indices of options, or texts."""

    where: str  # file:line
    subject: str
    head: str
    question: str
    options: tuple[str, ...]
    right: tuple
    shown: str  # with its answer, as the example of another question
    steps: int  # tokens to generate at most
    id: int = 0  # its number within the subject
    shots: tuple[str, ...] = ()

    def judged(self, given):
        """A sample, less what it is of: `given` are the log-likelihoods of its options, or the generated text."""
        if not self.options:
            choice = number(given) if self.subject == "gsm8k" else given
            return dict(text=given, choice=choice, answer=self.right, correct=choice in self.right)
        choice = given.index(max(given))
        line = dict(loglikelihoods=given, choice=choice, answer=self.right, correct=choice in self.right)
        if self.subject == "arc":  # per character of the choice, less the space before it
            norm = [x / (len(option) - 1) for x, option in zip(given, self.options, strict=True)]
            line["correct_norm"] = norm.index(max(norm)) in self.right
        return line


@dataclass(frozen=True)
class Prompt:
    """An `Item` in ids, with as many shots as fit: the context, each option, and the question by itself."""

    item: Item
    ids: list[int]
    options: list[tuple[int, ...]]
    own: list[int]
    shots: int

    @property
    def key(self):
        return self.item.subject, self.item.id


def encode(item, tokenizer, room):
    """The `Prompt` of an item in at most `room` tokens, what follows included; BadInput where no shots are too many.

    Context and option are encoded together and then split, as lm-evaluation-harness does; a space between goes there.
    """
    for shots in range(len(item.shots), -1, -1):
        text = item.head + "".join(item.shots[:shots]) + item.question
        ids = tokenizer.encode(text.rstrip(" "), bos=True)
        options = [tuple(tokenizer.encode(text + option, bos=True)[len(ids) :]) for option in item.options]
        if not all(option.strip() and own for option, own in zip(item.options, options, strict=True)):
            raise BadInput(f"{item.where}: one of its choices is empty; mend or remove the row.")
        length = len(ids) + max(map(len, options), default=item.steps)
        if length <= room:
            return Prompt(item, ids, options, tokenizer.encode(item.question), shots)
    raise BadInput(f"{item.where} takes {length} tokens without examples, the model has {room}; remove the row.")


def number(text):
    """What follows "####", without what people write into numbers, or None."""
    found = re.search(r"#### *\$?(-?[\d.,]*\d)", text)
    return found and found[1].replace(",", "")


def columns(row, where, **kinds):
    """The values of a row's columns, each checked for its kind."""
    for name, kind in kinds.items():
        if not isinstance(row, dict) or type(row.get(name)) is not kind:
            raise BadInput(f"{where} has no column {name} that is a {kind.__name__}; mend or remove the row.")
    return [row[name] for name in kinds]


def item_of(task, where, subject, row):
    """The `Item` of a row, so far without number and shots."""
    head, answer, steps = "", None, 0
    if task == "mmlu":  # github.com/hendrycks/test, with one space before the subject
        text, subject, choices, key = columns(row, where, question=str, subject=str, choices=list, answer=int)
        head = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
        letters = [chr(ord("A") + i) for i in range(len(choices))]
        question = "\n".join([text, *(f"{x}. {c}" for x, c in zip(letters, choices, strict=True)), "Answer:"])
        options, right = [f" {x}" for x in letters], [key] if 0 <= key < len(choices) else []
    elif task == "arc":
        text, choices, key = columns(row, where, question=str, choices=dict, answerKey=str)
        texts, labels = columns(choices, where, text=list, label=list)
        question, options = f"Question: {text}\nAnswer:", [f" {x}" for x in texts]
        right = [i for i, label in enumerate(labels) if label == key and i < len(texts)]
    elif task == "gsm8k":
        text, answer = columns(row, where, question=str, answer=str)
        question, options, steps = f"Question: {text}\nAnswer:", [], 512
        right = [x] if (x := number(answer)) else []
    elif task == "bbh":
        text, answer = columns(row, where, input=str, target=str)
        question, options = f"Q: {text}\nA:", [f" {x}" for x in re.findall(r"^\([A-Z]\)", text, re.MULTILINE)]
        if f" {answer}" in options:
            right = [options.index(f" {answer}")]
        else:  # also three published rows whose option fell apart at its comma
            options, right, steps = [], [answer.strip()], 128
    else:
        text, scores = columns(row, where, input=str, target_scores=dict)
        question, options = "".join([f"\nQ: {text}", *(f"\n  choice: {x}" for x in scores), "\nA: "]), list(scores)
        values = [x if isinstance(x, int | float) else 0 for x in scores.values()]
        right = [i for i, x in enumerate(values) if x == max(values) > 0]
    if not right:
        raise BadInput(f"{where}: its answer is not among its choices; mend or remove the row.")
    shown = question + (options[right[0]] if options else f" {answer}") + ("\n" if task == "bbl" else "\n\n")
    return Item(where, subject, head, question, tuple(options), tuple(right), shown, steps)


def rows_of(path):
    """(file:line, row) of a .jsonl, of a .json list (its line is the row's number), or of "examples" in a .json."""
    whole = path.suffix != ".jsonl"
    for line, text in enumerate([read_text(path)] if whole else read_text(path).split("\n"), 1):
        try:
            found = json.loads(text) if text.strip() else []
        except ValueError:
            raise BadInput(f"{path}:{line} is not JSON; mend or remove it.") from None
        found = found.get("examples") if whole and isinstance(found, dict) else found
        for n, row in enumerate(found if isinstance(found, list) else [found], 1):
            yield f"{path}:{n if whole else line}", row


def subject_of(path):
    """The task in a file of BIG-bench: strategyqa.json, or strategyqa/task.json."""
    return next((part for part in (path.stem, *reversed(path.parts)) if part in LITE), path.stem)


def read(task, rows, patterns, examples=False):
    """Every `Item` in the files of `rows` that meet the first pattern that any does; `rows` may be a file."""
    at, files = Path(rows), []
    if at.is_file():
        at, files = at.parent, [] if examples else [at]
    for pattern in () if files else patterns:
        files = files or [path for path in sorted(at.glob(pattern)) if task != "bbl" or subject_of(path) in LITE]
    if not files:
        raise BadInput(f"{at} has no {' or '.join(patterns)}; name the folder that has, or get it: {TASKS[task][3]}.")
    items = []
    for path in files:
        name = {"bbl": subject_of(path), "bbh": path.stem}.get(task, task)
        items += [item_of(task, where, name, row) for where, row in rows_of(path)]
    return items


def by_subject(items):
    """{subject: [Item]}, both in their order."""
    groups = {}
    for item in items:
        groups.setdefault(item.subject, []).append(item)
    return groups


def load_items(task, rows, subjects=(), shots=None):
    """[Item] of a task, or of some of its subjects, with its usual number of shots or another.

    Shots are the first rows of the subject; without rows of their own, these are not asked.
    """
    usual, patterns, own, _ = TASKS[task]
    shots, items, asked = usual if shots is None else shots, [], by_subject(read(task, rows, patterns))
    if unknown := set(subjects) - set(asked):
        have = ", ".join(sorted(asked))
        raise BadInput(f"{task} has no subject {min(unknown)!r} in {rows}; --subjects can name {have}.")
    examples = by_subject(read(task, rows, [own], examples=True)) if own and shots else asked
    for subject, found in asked.items():
        given = tuple(item.shown for item in examples.get(subject, [])[:shots])
        first = 0 if own else shots
        if found[first:] and (not subjects or subject in subjects):
            if len(given) < shots:
                raise BadInput(f"{rows} has {len(given)} examples for {subject}, not {shots}; lower --shots.")
            items += [replace(item, id=n, shots=given) for n, item in enumerate(found[first:], first)]
    if not items:
        raise BadInput(f"{rows} has no question of {task} besides {shots} examples; add rows or lower --shots.")
    return items
