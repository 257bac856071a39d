"""Questions of a benchmark: MMLU, ARC-Challenge and the multiple choice of BIG-bench Lite.

    items = load_items("mmlu", "rows")            questions as text, each with its examples
    item = encode(items[0], tokenizer, 2048)      one of them with its ids, and with as many examples as fit

Rows have the columns that the data sets have on the Hugging Face Hub; `data/prepare.py benchmarks` gets them.
`data/scoring.py` puts the questions to a model. For every other task there is `data/harness.py`.
"""

import glob
import json
import string
from dataclasses import dataclass, replace
from pathlib import Path

from data import BadInput
from data.corpus import lines_of, read_text

# The tasks of BIG-bench Lite that are multiple choice.
LITE = """bbq_lite_json code_line_description conceptual_combinations emoji_movie formal_fallacies_syllogisms_negation
hindu_knowledge known_unknowns language_identification logic_grid_puzzle logical_deduction misconceptions_russian
novel_concepts play_dialog_same_or_different strange_stories strategyqa symbol_interpretation
vitaminc_fact_verification winowhy""".split()  # noqa: SIM905


@dataclass(frozen=True)
class Item:
    """A question. The model reads head + shots + question; how likely is each option behind that?

    `encode` fills in the last three, which are the same in ids.
    """

    where: str  # file:line of its row
    subject: str
    head: str  # stands before the examples
    question: str
    options: list[str]
    right: list[int]  # which options are right: one, or several that are equally good
    shots: list[str] = ()  # the examples
    shared: list[int] = ()  # what the questions of the subject begin with
    context: list[int] = ()  # what follows it, up to the option
    continuations: list[list[int]] = ()  # the options


def encode(item, tokenizer, room):
    """The item with its ids, and as many examples as fit into `room` tokens; BadInput if it is longer without."""
    start = item.head + "".join(item.shots)
    text = start + item.question
    # As in lm-evaluation-harness: context and option are encoded together and then split, because a token may reach
    # across the border, and a space at the border belongs to the option.
    context = tokenizer.encode(text.rstrip(" "), bos=True)
    continuations = []
    for option in item.options:
        ids = tokenizer.encode(text + option, bos=True)[len(context) :]
        if not ids or not option.strip():
            raise BadInput(f"{item.where}: one of its choices is empty; mend or remove the row.")
        continuations.append(ids)
    length = len(context) + max(map(len, continuations))
    if length > room and item.shots:
        return encode(replace(item, shots=item.shots[:-1]), tokenizer, room)
    if length > room:
        raise BadInput(f"{item.where} takes {length} tokens without examples, the model has {room}; remove the row.")
    # Where the question begins, a token may reach across as well: only ids that are the same are shared.
    shared = 0
    for one, other in zip(tokenizer.encode(start, bos=True), context[:-1], strict=False):
        if one != other:
            break
        shared += 1
    return replace(item, shared=context[:shared], context=context[shared:], continuations=continuations)


# A row becomes an item: one function for each benchmark --------------------------------------------------------------


def mmlu(row, where):
    """As in github.com/hendrycks/test, with one space before the subject. The options are the letters."""
    name = row["subject"].replace("_", " ")
    head = f"The following are multiple choice questions (with answers) about {name}.\n\n"
    question = row["question"] + "\n"
    options = []
    for letter, choice in zip(string.ascii_uppercase, row["choices"], strict=False):
        question += f"{letter}. {choice}\n"
        options.append(f" {letter}")
    return Item(where, row["subject"], head, question + "Answer:", options, [row["answer"]])


def arc(row, where):
    """As in lm-evaluation-harness. The options are the choices themselves."""
    question = "Question: " + row["question"] + "\nAnswer:"
    options = [" " + choice for choice in row["choices"]["text"]]
    right = [i for i, label in enumerate(row["choices"]["label"]) if label == row["answerKey"]]
    return Item(where, "challenge", "", question, options, right)


def bbl(row, where):
    """The usual prompt of BIG-bench, without the words that some tasks have in its place. The options are the choices
    themselves, in the order of the alphabet: in the files the right one may come first. Those with the best score are
    right."""
    scores = row["target_scores"]
    best = max(scores.values())
    question = "Q: " + row["input"]
    options = sorted(scores)
    right = []
    for i, choice in enumerate(options):
        question += "\n  choice: " + choice
        if scores[choice] == best > 0:
            right.append(i)
    return Item(where, lite_task(Path(where)), "\n", question + "\nA: ", options, right)


# task: (examples before a question, the function for its rows, pattern of the files of questions, of those of examples)
# Without files of their own, the examples are the first questions of the subject.
TASKS = {
    "mmlu": (5, mmlu, "mmlu_test*.json*", "mmlu_dev*.json*"),
    "arc": (0, arc, "arc_challenge_test*.json*", None),
    "bbl": (0, bbl, "**/*.json", None),
}


# Files become items --------------------------------------------------------------------------------------------------


def lite_task(path):
    """Which task of BIG-bench Lite is in strategyqa.json, or in strategyqa/task.json? None: another file."""
    if path.stem in LITE:
        return path.stem
    if path.stem == "task":  # other files there hold scores of models
        for part in reversed(path.parts):
            if part in LITE:
                return part
    return None


def rows_of(path):
    """Yield (file:line, row) of a .jsonl, and (file:number, row) of the list in a .json, or of its "examples"."""
    if path.suffix == ".jsonl":
        for where, line in lines_of(path):
            yield where, parse(line, where)
        return
    rows = parse(read_text(path), f"{path}:1")
    if isinstance(rows, dict):
        rows = rows.get("examples")
    if not isinstance(rows, list):
        raise BadInput(f"{path} has no list of rows; mend or remove it.")
    for number, row in enumerate(rows, 1):
        yield f"{path}:{number}", row


def parse(text, where):
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise BadInput(f"{where} is not JSON; mend or remove it.") from None


def items_by_subject(task, folder, pattern):
    """{subject: [Item]} of the files in a folder that meet the pattern, everything in its order."""
    _, item_of, _, _ = TASKS[task]
    subjects = {}
    for path in sorted(folder.glob(pattern)):
        if task == "bbl" and not lite_task(path):
            continue  # BIG-bench has 200 more tasks
        for where, row in rows_of(path):
            try:
                item = item_of(row, where)  # it takes the row's columns as they should be
            except (LookupError, TypeError, ValueError, AttributeError) as error:
                raise BadInput(f"{where} is no row of {task} ({error!r}); mend or remove it.") from None
            answer = item.right[0] if item.right else None
            if type(answer) is not int or answer not in range(len(item.options)):
                raise BadInput(f"{where}: its answer is not among its choices; mend or remove the row.")
            subjects.setdefault(item.subject, []).append(item)
    if not subjects:
        source = "python data/prepare.py benchmarks, or for bbl github.com/google/BIG-bench"
        raise BadInput(f"{folder} has no {pattern}; name the folder that has, or get it: {source}.")
    return subjects


def load_items(task, rows, subjects=(), shots=None, limit=None):
    """[Item] of a task: at most `limit` of each subject, or of some `subjects`, with so many examples each.

    `rows`: a folder, or a file; shots: None is the published number. BadInput where rows are missing or malformed.
    """
    usual, _, pattern, examples = TASKS[task]
    shots = usual if shots is None else shots
    folder = Path(rows)
    if folder.is_file():  # the examples lie beside it
        pattern = glob.escape(folder.name)
        folder = folder.parent
    questions = items_by_subject(task, folder, pattern)
    solved = items_by_subject(task, folder, examples) if examples and shots else questions
    first = 0 if examples else shots  # what is an example is not asked as well
    items = []
    for subject in dict.fromkeys(subjects or questions):
        if subject not in questions:
            raise BadInput(f"{task} has no subject {subject!r} in {rows}; --subjects can name {', '.join(questions)}.")
        asked = questions[subject][first:][:limit]
        shown = []
        for item in solved.get(subject, [])[:shots]:
            shown.append(item.question + item.options[item.right[0]] + "\n\n")
        if asked and len(shown) < shots:
            raise BadInput(f"{rows} has {len(shown)} examples for {subject}, not {shots}; lower --shots.")
        items += [replace(item, shots=shown) for item in asked]
    if not items:
        raise BadInput(f"{rows} has no question of {task} besides {shots} examples; add rows or lower --shots.")
    return items
