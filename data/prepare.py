"""The paper's text and evaluation sets, from the Hub into the files that train.py and eval.py read.

    python data/prepare.py topics --out text/topics            Wikipedia-Topics: six topics, 30,000 articles each
    python data/prepare.py languages --out text/languages      Wikisource: six languages, 20,000 pages each
    python data/prepare.py retention --out text                C4, GSM8K and ARC-Challenge: general text for --retention
    python data/prepare.py benchmarks --out rows               MMLU and ARC-Challenge for `eval.py bench --rows`

Rows are streamed in an order that --seed decides and written as they come. A second call takes the files that the first
one finished; what it was at comes again, since a stream begins at its beginning. Held out are the last 5% of each file,
as in training (data/corpus.py). Needs: pip install datasets.
"""

import argparse
import contextlib
import hashlib
import json
import sys
from itertools import islice
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import BadInput, atomic, run_script

TOPICS = ("Mathematics", "Science", "Technology", "History", "Culture", "Geography")
LANGUAGES = {"english": "en", "spanish": "es", "french": "fr", "german": "de", "italian": "it", "portuguese": "pt"}
SHUFFLED = 10_000  # rows that are mixed at a time


def digest(text):
    """A number of the text, in hexadecimal: equal texts have the same, on every machine."""
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]


# Rows ----------------------------------------------------------------------------------------------------------------


def stream(source, files, hub, seed=None):
    """The rows of some files of a data set on the Hub, or of one with the same layout under the folder `hub`.

    In the files' own order without a seed.
    """
    try:
        from datasets import load_dataset
    except ImportError:
        raise BadInput("data/prepare.py needs a package: pip install datasets.") from None
    name = str(Path(hub or "", source))
    try:
        rows = load_dataset(name, data_files={"train": files}, split="train", streaming=True)
        if seed is not None:
            rows = rows.shuffle(seed=seed, buffer_size=SHUFFLED)
        yield from rows
    except Exception as error:  # `datasets` and what it reads with raise kinds of their own
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise BadInput(f"{name} cannot be read: {reason}") from None


def topic_of(row):
    """The topic of an article, None if it has none of ours; of several always the same one, by a number of its text."""
    topics = [name for name in TOPICS if name in row["categories"]]
    if not topics:
        return None
    return topics[int(digest(row["text"]), 16) % len(topics)].lower()


def text_of(row):
    """A row's text; of a question the text with its answer."""
    if "question" not in row:
        return row["text"]
    answer = row.get("answer")
    if "choices" in row:
        choices = row["choices"]
        answer = choices["text"][choices["label"].index(row["answerKey"])]
    return f"Question: {row['question']}\nAnswer: {answer}"


# Files ---------------------------------------------------------------------------------------------------------------


def write_texts(rows, out, names, wanted):
    """Write `wanted` different texts for each name into out/<name>.jsonl, as the stream `rows` brings them.

    With several names these are topics, and a row goes to its own.
    """
    there = [out / f"{name}.jsonl" for name in names]
    if all(path.exists() for path in there):
        for path in there:
            texts = path.read_bytes().count(b"\n")
            print(f"{path}: already there, with {texts:,} texts")
        return
    seen = set()  # digests of what was written: data sets hold some texts twice
    count = dict.fromkeys(names, 0)
    files = {}
    with contextlib.ExitStack() as stack:  # at the end each file is closed, then gets its name
        for name in names:
            partial = stack.enter_context(atomic(out / f"{name}.jsonl"))
            files[name] = stack.enter_context(open(partial, "w", encoding="utf-8"))
        for row in tqdm(rows, desc=", ".join(names), unit=" rows", disable=None):
            # A data set that changed its columns shows it here, at its first row.
            try:
                name = names[0] if len(names) == 1 else topic_of(row)
                text = text_of(row)
                key = digest(text)
            except (LookupError, TypeError, AttributeError, ValueError) as error:
                raise BadInput(f"{', '.join(names)}: a row is not laid out as expected ({error!r}).") from None
            if name is None or count[name] == wanted or key in seen or not text.strip():
                continue
            seen.add(key)
            count[name] += 1
            files[name].write(json.dumps({"text": text}) + "\n")
            if min(count.values()) == wanted:
                break  # the rest of the stream is not downloaded
    for name, n in count.items():
        print(f"{out / name}.jsonl: {n:,} texts" + ", all that there are" * (n < wanted))


def write_rows(rows, path):
    """Write rows with all of their columns, as `eval.py bench` reads them."""
    if not path.exists():
        with atomic(path) as partial, open(partial, "w", encoding="utf-8") as file:
            for row in tqdm(rows, desc=path.stem, disable=None):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    print(path)


# Recipes -------------------------------------------------------------------------------------------------------------

RECIPES = {  # recipe: [(data set, its files, names of the files that are written, texts of each)]
    "topics": [("tarekziade/wikipedia-topics", "data/train-*.parquet", [name.lower() for name in TOPICS], 30_000)],
    "languages": [
        ("wikimedia/wikisource", f"20231201.{code}/train-*.parquet", [name], 20_000) for name, code in LANGUAGES.items()
    ],
    "retention": [
        ("allenai/c4", "en/c4-train.00000-of-01024.json.gz", ["c4"], 16_000),
        ("openai/gsm8k", "main/train-*.parquet", ["gsm8k"], 7_473),
        ("allenai/ai2_arc", "ARC-Challenge/train-*.parquet", ["arc"], 1_119),
    ],
    "benchmarks": [
        ("cais/mmlu", "all/test-*.parquet", ["mmlu_test"], None),
        ("cais/mmlu", "all/dev-*.parquet", ["mmlu_dev"], None),
        ("allenai/ai2_arc", "ARC-Challenge/test-*.parquet", ["arc_challenge_test"], None),
    ],
}


def prepare(args):
    """Write the files of a recipe that are not there yet."""
    if args.limit is not None and args.limit < 1:
        raise BadInput(f"--limit is {args.limit}; give at least 1.")
    out = args.out
    if args.recipe == "retention":  # its three files are one text: a folder of its own for --retention
        out = args.out / "retention"
    for source, files, names, usual in RECIPES[args.recipe]:
        if args.recipe == "benchmarks":
            rows = islice(stream(source, files, args.hub), args.limit)
            write_rows(rows, out / f"{names[0]}.jsonl")
        else:
            rows = stream(source, files, args.hub, args.seed)
            write_texts(rows, out, names, min(usual, args.limit or usual))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=RECIPES)
    parser.add_argument("--out", type=Path, required=True, help="folder for the files")
    parser.add_argument("--limit", type=int, help="rows of each file, where fewer than usual are enough")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the rows [0]")
    parser.add_argument("--hub", type=Path, help="folder that holds the data sets, instead of the Hub")
    args = parser.parse_args(argv)
    return run_script("data/prepare.py", lambda: prepare(args), "the same command continues") or 0


if __name__ == "__main__":
    sys.exit(main())
