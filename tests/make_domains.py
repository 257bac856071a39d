"""Found domains against given ones.

    python tests/make_domains.py mix MIX [--topics TOPICS]        mixed documents, and the same by their given domains
    python tests/make_domains.py score MIX/topics FOUND ...       purity, normalised mutual information, the confusion
    python tests/make_domains.py picture FILE MIX/topics FOUND MIX/both FOUND ...

TOPICS has a <topic>.txt for each of six English handbooks, and imaging-german.txt and imaging-french.txt, one paragraph
a line. Each mix is a folder MIX/<mix> with mix.jsonl and given/<domain>.jsonl:

    languages   300 documents of 400 characters from each of the six books in data/handbook
    rare        the same, with Spanish as a fiftieth of all
    topics      300 documents of 1,500 characters from each topic
    both        the same from two topics (this handbook, imaging) in three languages
    halves      the German book, as documents of 1,500 characters, cut into halves at random
    N domains   languages and topics together: the first N of both lists, for `--domains auto`

`score` prints each found folder's purity and NMI, and how many documents of each given domain are in each found one.
`picture` draws the latter, a panel for each pair.
"""

import argparse
import json
import random
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data.tables import table

LANGUAGES = ("english", "french", "german", "italian", "portuguese", "spanish")
TOPICS = ("databases", "imaging", "mathematics", "music", "programming")  # and administration, our own book


def documents(path, size):
    """Paragraphs of a text, joined to documents of at least `size` characters."""
    found, document = [], ""
    for line in path.read_text(encoding="utf-8").splitlines():
        document += line + "\n"
        if len(document) >= size:
            found.append(document)
            document = ""
    return found


def write(folder, domains, count=300):
    """Write documents {domain: [text]}, at most `count` (or {domain: count}) of each, drawn at random."""
    rng = random.Random(0)
    rows = []
    for name, texts in domains.items():
        most = count[name] if isinstance(count, dict) else count
        rows += [(name, text) for text in rng.sample(texts, min(most, len(texts)))]
    rng.shuffle(rows)
    (folder / "given").mkdir(parents=True)
    for name in [None, *domains]:
        lines = [json.dumps({"text": text}) + "\n" for domain, text in rows if name in (None, domain)]
        (folder / (f"given/{name}.jsonl" if name else "mix.jsonl")).write_text("".join(lines), encoding="utf-8")
    print(f"{folder}: {len(rows)} documents of {len(domains)} domains")


def mix(out, topics):
    books = {name: documents(ROOT / f"data/handbook/{name}.txt", 400) for name in LANGUAGES}
    write(out / "languages", books)
    write(out / "all-languages", books, 10**6)
    write(out / "rare", books, dict.fromkeys(LANGUAGES, 300) | {"spanish": 31})
    halves = documents(ROOT / "data/handbook/german.txt", 1500)
    random.Random(1).shuffle(halves)
    write(out / "halves", {"one": halves[::2], "two": halves[1::2]}, 10**6)
    if topics is None:
        return
    found = {name: documents(topics / f"{name}.txt", 1500) for name in ("administration", *TOPICS)}
    write(out / "topics", found)
    both = {}
    for language in ("english", "french", "german"):
        imaging = topics / f"imaging{'' if language == 'english' else '-' + language}.txt"
        both[f"administration-{language}"] = documents(ROOT / f"data/handbook/{language}.txt", 1500)
        both[f"imaging-{language}"] = documents(imaging, 1500)
    write(out / "both", both)
    every = books | {name: found[name] for name in TOPICS} | {"imaging-german": both["imaging-german"]}
    for number in range(2, 13):
        write(out / f"{number}-domains", dict(list(every.items())[:number]))
    for number in range(2, 6):
        write(out / f"{number}-topics", dict(list(found.items())[:number]))


def counts(given, found):
    """(names of the given domains, of the found ones, documents of each given in each found one [given, found])."""
    texts = {}  # {text: given domain}
    for path in sorted((given / "given").iterdir()):
        texts |= {json.loads(line)["text"]: path.stem for line in path.read_text(encoding="utf-8").splitlines()}
    names = sorted(set(texts.values()))
    files = sorted(found.glob("*.jsonl"))
    matrix = np.zeros((len(names), len(files)), int)
    for j, path in enumerate(files):
        for line in path.read_text(encoding="utf-8").splitlines():
            matrix[names.index(texts[json.loads(line)["text"]]), j] += 1
    return names, [path.stem for path in files], matrix


def purity(matrix):
    """The share of the documents that are in a found domain where their given one is the largest."""
    return matrix.max(0).sum() / matrix.sum()


def mutual_information(matrix):
    """2 I(given; found) / (H(given) + H(found)); 0 if both are one domain."""
    p = matrix / matrix.sum()
    expected = np.outer(p.sum(1), p.sum(0))
    information = (p[p > 0] * np.log(p[p > 0] / expected[p > 0])).sum()
    entropy = [-(q[q > 0] * np.log(q[q > 0])).sum() for q in (p.sum(0), p.sum(1))]
    return 2 * information / sum(entropy) if sum(entropy) else 0.0


def draw(confusions, picture):
    """Save a picture with a panel for each (title, given, found, matrix)."""
    from matplotlib import figure

    page = figure.Figure((12, 3.2 * -(-len(confusions) // 2)), facecolor="white", layout="constrained")
    for place, (title, given, found, matrix) in enumerate(confusions, 1):
        axes = page.add_subplot(-(-len(confusions) // 2), 2, place, title=title)
        order = sorted(range(len(found)), key=lambda j: matrix[:, j].argmax())  # the diagonal
        matrix = matrix[:, order]
        axes.imshow(matrix / matrix.sum(1, keepdims=True), cmap="Greys", aspect="auto", vmax=2)
        for (i, j), number in np.ndenumerate(matrix):
            axes.text(j, i, number or "", ha="center", va="center")
        axes.set_xticks(range(len(found)), [found[j].replace("-", "\n") for j in order])
        axes.set_yticks(range(len(given)), given)
    page.savefig(picture, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("mix", "score", "picture"))
    parser.add_argument("mix", type=Path)
    parser.add_argument("found", type=Path, nargs="*")
    parser.add_argument("--topics", type=Path)
    args = parser.parse_args()
    if args.what == "mix":
        return mix(args.mix, args.topics)
    if args.what == "picture":
        pairs = zip(args.found[::2], args.found[1::2], strict=True)
        return draw([(given.name, *counts(given, found)) for given, found in pairs], args.mix)
    rows = {}
    for found in args.found:
        given_names, found_names, matrix = counts(args.mix, found)
        rows[str(found)] = [str(len(found_names)), f"{purity(matrix):.4f}", f"{mutual_information(matrix):.4f}"]
        print(table(found.name, found_names, dict(zip(given_names, matrix.astype(str), strict=True))) + "\n")
    print(table(args.mix.name, ["domains", "purity", "NMI"], rows))


if __name__ == "__main__":
    main()
