"""Fetch the paper's text and evaluation sets from the Hub into files for train.py and eval.py.

    python data/prepare.py topics --out text/topics            Wikipedia-Topics: six topics, 30,000 articles each
    python data/prepare.py languages --out text/languages      Wikisource: six languages, 20,000 pages each
    python data/prepare.py retention --out text                C4, GSM8K and ARC-Challenge: general text for --retention
    python data/prepare.py benchmarks --out rows               MMLU and ARC-Challenge for `eval.py bench --rows`

Rows are streamed in an order that follows from --seed, and written as they come. A second call keeps finished files and
restarts the unfinished one, because a stream can only be read from its beginning. Needs: pip install datasets.
"""

import argparse
import contextlib
import hashlib
import json
import random
import sys
from itertools import islice
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import MALFORMED, BadInput, atomic, run_script

TOPICS = ("Mathematics", "Science", "Technology", "History", "Culture", "Geography")
LANGUAGES = {"english": "en", "spanish": "es", "french": "fr", "german": "de", "italian": "it", "portuguese": "pt"}
SHUFFLED = 10_000  # rows in the shuffle buffer


def digest(text):
    """A hash of the text in hexadecimal, the same on every machine."""
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]


# Rows ----------------------------------------------------------------------------------------------------------------


def stream(source, files, hub, seed=None):
    """The rows of `files` in a data set on the Hub, or in its copy in the folder `hub`. A seed shuffles them.

    We shuffle: for one seed, datasets 5 gives another order than datasets 4.
    """
    try:
        from datasets import load_dataset
    except ImportError:
        raise BadInput("data/prepare.py needs a package: pip install datasets.") from None
    name = str(Path(hub or "", source))
    try:
        rows = load_dataset(name, data_files={"train": files}, split="train", streaming=True)
        yield from rows if seed is None else shuffled(rows, random.Random(seed))
    except Exception as error:  # `datasets` and the libraries that it uses have their own exceptions
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise BadInput(f"{name} cannot be read: {reason}") from None


def shuffled(rows, rng):
    """Yield the rows of a streamed data set: its files in random order, the rows through a buffer of `SHUFFLED`."""
    buffer = []
    for index in rng.sample(range(rows.num_shards), rows.num_shards):
        for row in rows.shard(rows.num_shards, index):
            if len(buffer) < SHUFFLED:
                buffer.append(row)
            else:
                place = rng.randrange(SHUFFLED)
                yield buffer[place]
                buffer[place] = row
    rng.shuffle(buffer)
    yield from buffer


def topic_of(row):
    """The topic of an article, or None if it has none of ours. If it has several, a hash of the text chooses one."""
    topics = [name for name in TOPICS if name in row["categories"]]
    if not topics:
        return None
    return topics[int(digest(row["text"]), 16) % len(topics)].lower()


def text_of(row):
    """The text of a row. A question is followed by its answer."""
    if "question" not in row:
        return row["text"]
    answer = row.get("answer")
    if "choices" in row:
        choices = row["choices"]
        answer = choices["text"][choices["label"].index(row["answerKey"])]
    return f"Question: {row['question']}\nAnswer: {answer}"


# Files ---------------------------------------------------------------------------------------------------------------


def write_texts(rows, out, names, wanted):
    """Write `wanted` different texts for each name into out/<name>.jsonl, from the stream `rows`.

    Several names are topics, and each row goes to its own topic.
    """
    paths = {name: out / f"{name}.jsonl" for name in names}
    if all(path.exists() for path in paths.values()):
        for path in paths.values():
            texts = path.read_bytes().count(b"\n")
            print(f"{path}: already there, with {texts:,} texts")
        return
    seen = set()  # digests of the written texts: some data sets repeat texts
    count = dict.fromkeys(names, 0)
    files = {}
    with contextlib.ExitStack() as stack:  # at the end each file is closed, then renamed
        for name, path in paths.items():
            partial = stack.enter_context(atomic(path))
            files[name] = stack.enter_context(open(partial, "w", encoding="utf-8"))
        for row in tqdm(rows, desc=", ".join(names), unit=" rows", disable=None):
            # If a data set has changed its columns, the first row fails here.
            try:
                name = names[0] if len(names) == 1 else topic_of(row)
                text = text_of(row)
                key = digest(text)
            except MALFORMED as error:
                raise BadInput(f"{', '.join(names)}: a row is not laid out as expected ({error!r}).") from None
            if name is None or count[name] == wanted or key in seen or not text.strip():
                continue
            seen.add(key)
            count[name] += 1
            files[name].write(json.dumps({"text": text}) + "\n")
            if min(count.values()) == wanted:
                break  # the rest of the stream is not downloaded
    for name, path in paths.items():
        print(f"{path}: {count[name]:,} texts" + ", all that there are" * (count[name] < wanted))


def write_rows(rows, path):
    """Write rows with all of their columns, for `eval.py bench`."""
    if not path.exists():
        with atomic(path) as partial, open(partial, "w", encoding="utf-8") as file:
            for row in tqdm(rows, desc=path.stem, disable=None):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    print(path)


# Recipes -------------------------------------------------------------------------------------------------------------

# {recipe: [(data set, its files, names of the new files, number of texts in each)]}
RECIPES = {
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
    """Write the missing files of a recipe."""
    if args.limit is not None and args.limit < 1:
        raise BadInput(f"--limit is {args.limit}; give at least 1.")
    out = args.out
    if args.recipe == "retention":  # its three files together are one text, in a folder for --retention
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
    parser.add_argument("--limit", type=int, help="rows of each file, if fewer than usual are enough")
    parser.add_argument("--seed", type=int, default=0, help="seed for the order of the rows [0]")
    parser.add_argument("--hub", type=Path, help="folder with copies of the data sets, instead of the Hub")
    args = parser.parse_args(argv)
    return run_script("data/prepare.py", lambda: prepare(args), "the same command continues")


if __name__ == "__main__":
    sys.exit(main())
