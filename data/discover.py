"""Find the domains of mixed documents, and write each into a file for train.py (ours; the paper's domains are given).

    python data/discover.py MIX --domains 6 --out text/found              without --domains it decides how many
    python train.py --preset solved --data text/found --out out/found
    python data/discover.py MIX --by out/found --out text/moved           move each document to the module that suits it

A document is a line of a .jsonl, any other file of a folder or, if MIX is one text file, a paragraph of it (a line, if
none is blank). Equal documents count once. A domain is named after two words that many of its documents have, and few
others.

Without --domains it takes the largest number of domains, up to 15, for which two halves of the documents agree
(`prediction_strength`). It needs about a hundred documents a domain. One domain is a possible answer.

Alternate --by and train.py until few documents move. A module that no document suits gets no file. Modules that learned
the text (--objective next-token) decide better than those that imitate the unpruned model: data/RESULTS.md compares
them.
"""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import regex
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import BadInput, atomic, fast, run_script
from data.chat_template import ChatTemplate
from data.corpus import format_of, lines_of, read_text, text_if_any, text_of
from data.families import read_config
from data.harness import BATCH, log_likelihoods
from data.hub import model_folder
from data.router import HALF, Router
from data.run import Run, paths_of
from data.settings import Settings
from data.tables import table
from data.tokenizer import Tokenizer

DIMENSIONS = 64  # of a document's vector (measured)
STARTS = 20  # of k-means
MOST = 15  # domains that are tried, where we decide how many
STRENGTH = 0.8  # of the prediction: Tibshirani and Walther's bound
READ = 1024  # at most so many tokens of a document are compared
MARGIN = 0.1  # nats a token by which another module has to be better (measured)
FAR = 0.3  # a document that is less like its domain than this share of the median fits none (measured)

# Documents -----------------------------------------------------------------------------------------------------------


def paragraphs(text):
    """The paragraphs of a text; its lines if none is blank."""
    parts = regex.split(r"\n\s*\n", text.strip())
    return parts if len(parts) > 1 else text.split("\n")


def documents_in(mix, template):
    """{text: its line in a .jsonl} of all documents in a file, or in a folder and its sub-folders."""
    if not mix.exists():
        raise BadInput(f"{mix} does not exist; give a folder of documents, a .jsonl or a text file.")
    files = sorted(path for path in mix.rglob("*") if path.is_file()) if mix.is_dir() else [mix]
    documents = {}
    for file in tqdm(files, desc="reading", disable=None):
        if any(part.startswith(".") for part in file.relative_to(mix).parts):  # hidden, such as .git
            continue
        if format_of(file) == ".jsonl":
            rows = {text_of(line, where, template): line for where, line in lines_of(file)}
        else:
            parts = [text_if_any(file) or ""] if mix.is_dir() else paragraphs(read_text(file))
            rows = {part: json.dumps({"text": part}, ensure_ascii=False) for part in parts}
        documents |= {text: line for text, line in rows.items() if text.strip()}
    if not documents:
        raise BadInput(f"{mix} has no document; give a folder of documents, a .jsonl or a text file.")
    return documents


# Vectors -------------------------------------------------------------------------------------------------------------


def tf_idf(ids):
    """The router's n-grams of documents [ids], weighted by log(1 + count) * log(n / documents that have the n-gram).

    Returns a sparse tensor [n, 2 HALF] with rows of length 1, or 0 where no n-gram is shared with some others.
    """
    n = len(ids)
    numbered = [i * 2 * HALF + Router.buckets(document[None])[0] for i, document in enumerate(ids)]
    found, count = np.unique(np.concatenate(numbered), return_counts=True)
    row, column = np.divmod(found, 2 * HALF)
    having = np.bincount(column)[column]  # documents
    weight = np.log1p(count) * np.log(n / having) * (having > 1)
    length = np.sqrt(np.bincount(row, weight**2, n))
    weight /= np.maximum(length, 1e-9)[row]
    where = np.stack([row, column])
    return torch.sparse_coo_tensor(where, weight, (n, 2 * HALF), dtype=torch.float32, check_invariants=False)


def vectors(x):
    """Unit vectors [n, d] of the rows of x: latent semantic analysis, U sqrt(S) of x = U S V^T.

    The square root of S keeps the strongest dimensions, such as the language, from hiding others, such as the topic.
    """
    u, s, _ = torch.svd_lowrank(x, q=min(DIMENSIONS, *x.shape), niter=4)
    return torch.nn.functional.normalize(u * s.sqrt(), dim=1).numpy()


# Clusters ------------------------------------------------------------------------------------------------------------


def kmeans(x, k, rng):
    """(the domain of each row [n], centres [k, d]) of unit vectors x [n, d], from the best of `STARTS` starts.

    Spherical k-means (Dhillon and Modha, 2001). Its first centres lie far apart (k-means++, Arthur and Vassilvitskii,
    2007).
    """
    best = -np.inf
    for _ in range(STARTS):
        centres = x[[rng.integers(len(x))]]
        for _ in range(k - 1):
            far = np.maximum(1 - (x @ centres.T).max(1), 0) + 1e-9
            centres = np.vstack([centres, x[rng.choice(len(x), p=far / far.sum())]])
        before = None
        for _ in range(100):
            domain = (x @ centres.T).argmax(1)
            if np.array_equal(domain, before):
                break
            before = domain
            for j in set(domain):
                total = x[domain == j].sum(0)
                centres[j] = total / max(np.linalg.norm(total), 1e-9)  # documents alike to none have no direction
        score = (x @ centres.T).max(1).sum()
        if score > best:
            best, found = score, (domain, centres)
    return found


def prediction_strength(x, k, rng):
    """How well the centres of one half of the documents x predict the domains of the other, in the worst domain: the
    share of its pairs of documents that get one domain (Tibshirani and Walther, 2005)."""
    x = rng.permutation(x)
    _, centres = kmeans(x[::2], k, rng)
    domain, _ = kmeans(x[1::2], k, rng)
    predicted = (x[1::2] @ centres.T).argmax(1)
    worst = 1.0
    for j in set(domain):
        count = np.bincount(predicted[domain == j])
        pairs = count.sum() * (count.sum() - 1)
        worst = min(worst, (count * (count - 1)).sum() / max(1, pairs))
    return worst


def how_many(x, rng):
    """The largest number of domains that one half of the documents finds in the other, in most of five halvings."""
    found = 1
    for k in range(2, MOST + 1):
        strength = np.median([prediction_strength(x, k, rng) for _ in range(5)])
        print(f"{k} domains: prediction strength {strength:.2f}")
        if strength >= STRENGTH:
            found = k
    return found


def fitting(x, domain):
    """Whether each row of x [n, any] is like the others of its domain: bool [n]."""
    member = torch.from_numpy(np.eye(domain.max() + 1, dtype=np.float32)[domain])  # [n, domains]
    products = (x @ (x.T @ member)).numpy()[np.arange(len(domain)), domain]
    likeness = products - 1  # a document is not compared with itself
    usual = {j: max(1e-5, np.median(likeness[domain == j])) for j in set(domain)}  # above 0, in spite of rounding
    return likeness > [FAR * usual[j] for j in domain]


def clusters(texts, ids, k, seed):
    """{name: [numbers of its documents]}. k: "auto", or how many domains."""
    seed %= 2**63
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    x = tf_idf(ids)
    points = vectors(x)
    domain, _ = kmeans(points, how_many(points, rng) if k == "auto" else k, rng)
    domain[~fitting(x, domain)] = -1
    return names_of(texts, [np.flatnonzero(domain == j) for j in set(domain) - {-1}])


def names_of(texts, members):
    """{name: [numbers of its documents]}: two words whose share of the documents most exceeds any other domain's."""
    shares = []  # of the documents in each domain that have a word
    for numbers in members:
        words = Counter()
        for i in numbers:
            words.update(set(regex.findall(r"\p{L}{3,18}", texts[i].lower())))
        shares.append({word: count / len(numbers) for word, count in words.items()})
    named = {}
    for j, numbers in enumerate(members):
        others = shares[:j] + shares[j + 1 :]
        lead = {word: share - max([0, *(s.get(word, 0) for s in others)]) for word, share in shares[j].items()}
        name = "-".join(sorted(lead, key=lead.get, reverse=True)[:2]) or "domain"
        named[f"{name}-{j}" if name in named else name] = numbers
    return named


# Modules decide ------------------------------------------------------------------------------------------------------


def by_modules(run, ids, lines):
    """({name: [numbers of its documents]}, how many moved): each goes to the module that predicts its tokens best.

    A document in a .jsonl of the run moves only if another module is better by `MARGIN`.
    """
    first = run.tokenizer.bos or list(run.config.eos_token_ids[:1]) or [0]
    longest = min(READ, run.config.max_position_embeddings - run.settings.kv_tokens)
    ids = [document[:longest].tolist() for document in ids]
    lengths = np.array([len(document) for document in ids])
    order = lengths.argsort(kind="stable")  # little padding
    scores = np.empty((len(ids), len(run.names)))
    home = {}  # {line: the domain in whose text it is}
    for j, (name, path) in enumerate(paths_of(run).items()):
        if format_of(path) == ".jsonl":
            home |= {line: j for _, line in lines_of(path)}
        model, memories = run.attached(name)
        for start in tqdm(range(0, len(ids), BATCH), desc=name, disable=None):
            numbers = order[start : start + BATCH]
            scores[numbers, j], _ = log_likelihoods(model, first, [ids[i] for i in numbers], memories)
    everyone = np.arange(len(ids))
    best = scores.argmax(1)
    before = np.array([home.get(line, j) for line, j in zip(lines, best, strict=True)])
    gain = scores[everyone, best] - scores[everyone, before]
    after = np.where(gain > MARGIN * lengths, best, before)
    return {name: np.flatnonzero(after == j) for j, name in enumerate(run.names)}, int((after != before).sum())


# The command ---------------------------------------------------------------------------------------------------------


def discover(args):
    """Write the found domains into the new folder `args.out`."""
    if args.out.exists():
        raise BadInput(f"{args.out} is there already; remove it or name another --out.")
    run = Run(args.by) if args.by else None
    folder = run.folder / "backbone" if run else model_folder(args.model, weights=False)
    tokenizer = Tokenizer.from_folder(folder, read_config(folder).vocab_size)
    documents = documents_in(args.mix, ChatTemplate.from_folder(folder))
    texts, lines = list(documents), list(documents.values())
    most = len(texts) // 2
    if not run and not 0 < (MOST if args.domains == "auto" else args.domains) <= most:
        found = f"{args.mix} has {len(texts)} documents"
        raise BadInput(f"{found}, which do not suit --domains {args.domains}; give a number from 1 to {most}.")
    ids = [np.array(tokenizer.encode(text)) for text in tqdm(texts, desc="tokens", disable=None)]
    if run:
        members, moved = by_modules(run, ids, lines)
    else:
        members = clusters(texts, ids, args.domains, args.seed)
    if not members:
        raise BadInput(f"{args.mix}: nothing tells which documents belong together; give more of them.")
    rows = {}
    with atomic(args.out) as partial:
        partial.mkdir()
        for name, numbers in members.items():
            if len(numbers):
                text = "".join(f"{lines[i]}\n" for i in numbers)
                (partial / f"{name}.jsonl").write_text(text, encoding="utf-8")
            rows[name] = [f"{len(numbers):,}", f"{sum(len(ids[i]) for i in numbers):,}"]
    print(table(str(args.out), ["documents", "tokens"], rows))
    if run:
        print(f"{moved:,} of {len(texts):,} documents moved")
    for i in sorted(set(range(len(texts))).difference(*members.values())):
        print(f"fits no domain, and is in no file: {texts[i][:80]!r}")


def number(given):
    return given if given == "auto" else int(given)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mix", type=Path, help="folder or file of documents")
    parser.add_argument("--out", type=Path, required=True, help="new folder for a <name>.jsonl per domain")
    way = parser.add_mutually_exclusive_group()
    way.add_argument("--domains", type=number, default="auto", help="how many, or auto: up to 15 [auto]")
    way.add_argument("--by", type=Path, metavar="RUN", help="finished run whose modules decide, instead of clusters")
    parser.add_argument("--model", default=Settings.model, help="whose tokenizer, without --by [data/base]")
    parser.add_argument("--seed", type=int, default=0, help="seed of the clusters, without --by [0]")
    args = parser.parse_args(argv)
    fast.enable()
    return run_script("data/discover.py", lambda: discover(args), "the same command begins again")


if __name__ == "__main__":
    sys.exit(main())
