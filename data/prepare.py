"""The paper's text and evaluation sets, from the Hub into the files that train.py and eval.py read.

    python data/prepare.py topics --out text/topics            Wikipedia-Topics: six topics, 30,000 articles each
    python data/prepare.py languages --out text/languages      Wikisource: six languages, 20,000 pages each
    python data/prepare.py retention --out text                C4, GSM8K and ARC-Challenge: general text for --retention
    python data/prepare.py benchmarks --out rows               MMLU, ARC-Challenge and GSM8K for `eval.py bench --rows`

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
LANGUAGES = dict(english="en", spanish="es", french="fr", german="de", italian="it", portuguese="pt")
SHUFFLED = 10_000  # rows that are mixed at a time


def topic(row):
    """(name, text) of an article; one of several topics goes to one of them, by a number made of its text."""
    found = [name for name in TOPICS if name in row["categories"]]
    return (found[int(digest(row["text"]), 16) % len(found)].lower(), row["text"]) if found else None


def answered(name):
    def text(row):
        options = row.get("choices")
        answer = options["text"][options["label"].index(row["answerKey"])] if options else row["answer"]
        return name, f"Question: {row['question']}\nAnswer: {answer}"

    return text


def plain(name):
    return lambda row: (name, row["text"])


# recipe: [(data set, files, rows of each output, row -> (output, text) or None, the outputs)]
TEXT = {
    "topics": [("tarekziade/wikipedia-topics", "data/train-*.parquet", 30_000, topic, [t.lower() for t in TOPICS])],
    "languages": [
        ("wikimedia/wikisource", f"20231201.{code}/train-*.parquet", 20_000, plain(name), [name])
        for name, code in LANGUAGES.items()
    ],
    "retention": [
        ("allenai/c4", "en/c4-train.00000-of-01024.json.gz", 16_000, plain("c4"), ["c4"]),
        ("openai/gsm8k", "main/train-*.parquet", 7_473, answered("gsm8k"), ["gsm8k"]),
        ("allenai/ai2_arc", "ARC-Challenge/train-*.parquet", 1_119, answered("arc"), ["arc"]),
    ],
}
ROWS = {  # file: (data set, files), all of their columns
    "mmlu_test": ("cais/mmlu", "all/test-*.parquet"), "mmlu_dev": ("cais/mmlu", "all/dev-*.parquet"),
    "arc_challenge_test": ("allenai/ai2_arc", "ARC-Challenge/test-*.parquet"),
    "gsm8k_test": ("openai/gsm8k", "main/test-*.parquet"), "gsm8k_train": ("openai/gsm8k", "main/train-*.parquet"),
}  # fmt: skip


def digest(text):
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]


def stream(source, files, hub, seed=None):
    """The rows of some files of a data set on the Hub, or of one with the same layout under the folder `hub`."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise BadInput("data/prepare.py needs a package: pip install datasets.") from None
    name = str(Path(hub, source)) if hub else source
    try:
        rows = load_dataset(name, data_files={"train": files}, split="train", streaming=True)
        yield from rows if seed is None else rows.shuffle(seed=seed, buffer_size=SHUFFLED)
    except Exception as error:  # `datasets` and what it reads with raise kinds of their own
        raise BadInput(f"{name} cannot be read: {str(error).partition(chr(10))[0]}") from None


def collect(rows, sort, wanted, out, names):
    """Write `wanted` different texts for each name into out/<name>.jsonl, as the stream `rows` brings them."""
    if all((out / f"{name}.jsonl").exists() for name in names):
        return print(f"{', '.join(names)}: already there")
    seen, have, files = set(), dict.fromkeys(names, 0), {}
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(tqdm(total=wanted * len(names), desc=", ".join(names), disable=None))
        for name in names:  # at the end each is closed, then renamed
            partial = stack.enter_context(atomic(out / f"{name}.jsonl"))
            files[name] = stack.enter_context(open(partial, "w", encoding="utf-8"))
        for row in rows:
            if min(have.values()) == wanted:
                break
            try:
                name, text = sort(row) or (None, "")
            except (LookupError, TypeError, AttributeError) as error:
                raise BadInput(f"{', '.join(names)}: a row is not laid out as expected ({error!r}).") from None
            if text.strip() and have[name] < wanted and (key := digest(text)) not in seen:
                seen.add(key)
                have[name] += 1
                files[name].write(json.dumps({"text": text}) + "\n")
                bar.update()
    for name, n in have.items():
        print(f"{out / name}.jsonl: {n:,} texts" + ("" if n == wanted else ", all that there are"))


def prepare(args):
    if args.limit is not None and args.limit < 1:
        raise BadInput(f"--limit is {args.limit}; give at least 1.")
    out = args.out / "retention" if args.recipe == "retention" else args.out
    for source, files, usual, sort, names in TEXT.get(args.recipe, ()):
        wanted = min(usual, args.limit or usual)
        collect(stream(source, files, args.hub, args.seed), sort, wanted, out, names)
    for name, (source, files) in ROWS.items() if args.recipe == "benchmarks" else ():
        if not (path := out / f"{name}.jsonl").exists():
            with atomic(path) as partial, open(partial, "w", encoding="utf-8") as file:
                for row in tqdm(islice(stream(source, files, args.hub), args.limit), desc=name, disable=None):
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
        print(path)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=(*TEXT, "benchmarks"))
    parser.add_argument("--out", type=Path, required=True, help="folder for the files")
    parser.add_argument("--limit", type=int, help="rows of each file, where fewer than usual are enough")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the rows [0]")
    parser.add_argument("--hub", type=Path, help="folder that holds the data sets, instead of the Hub")
    args = parser.parse_args(argv)
    return run_script("data/prepare.py", lambda: prepare(args), "the same command continues") or 0


if __name__ == "__main__":
    sys.exit(main())
