"""Domain text on disk to token ids: a folder with one file or sub-folder per domain, its last 5% held out.

`<domain>.txt` is one stream, whose tail is held out: translations of one book then hold out the same chapters.
`<domain>.jsonl` (one {"text": ...} a line, or {"messages": [...]}, a conversation) and the files of a sub-folder
`<domain>/` are documents; whole documents are held out.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data import BadInput, atomic


@dataclass(frozen=True)
class Split:
    """Token ids of one domain, 1-D; read from the cache, they stay on the disk until they are used."""

    train: np.ndarray
    heldout: np.ndarray
    cached: Path

    def store(self):
        """Write the cache, so that the next run need not tokenise. (Not done on reading: first comes every check.)"""
        if not self.cached.exists():
            with atomic(self.cached) as partial, open(partial, "wb") as out:
                np.save(out, np.concatenate([[len(self.train)], self.train, self.heldout]).astype(np.int32))

    @classmethod
    def read(cls, path):
        """What `store` wrote: the length of the training ids, these, and the held-out ids."""
        whole = np.load(path, mmap_mode="r")
        return cls(whole[1 : 1 + whole[0]], whole[1 + whole[0] :], path)


def read_text(path):
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not UTF-8 at byte {error.start}; convert it, for example with iconv.") from None


def read_documents(path, template=None):
    """(documents, stream): the texts of a file or folder, and whether they are one stream (a single .txt).

    `template`: the model's `ChatTemplate`, which makes a text of a conversation.
    """
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix in (".txt", ".jsonl") and not p.name.startswith("."))
        return [text for file in files for text in read_documents(file, template)[0]], False
    if path.suffix == ".txt":
        return [read_text(path)], True
    if path.suffix != ".jsonl":
        raise BadInput(f"{path} is neither a .txt nor a .jsonl; rename it or give a folder of them.")
    documents = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            where = f"{path}:{number}"
            try:
                row = json.loads(line)
                text, messages = row.get("text"), row.get("messages")
                if text is None and messages and all(isinstance(m["role"] + m["content"], str) for m in messages):
                    if template is None:
                        raise BadInput(f"{where} is a conversation, but the model has no chat template; give text.")
                    text = template(messages)
            except (ValueError, LookupError, TypeError, AttributeError):
                text = None
            if not isinstance(text, str):
                raise BadInput(f'{where} is not a JSON object with "text" or "messages"; mend or remove the line.')
            documents.append(text)
    return documents, False


def split_text(documents, stream, heldout, path):
    """(train texts, held-out texts): the last `heldout` of the documents, or of a stream up to a line's end."""
    if stream:
        text = documents[0]
        cut = text.rfind("\n", 0, int(len(text) * (1 - heldout))) + 1 or int(len(text) * (1 - heldout))
        return [text[:cut]], [text[cut:]]
    if len(documents) == 1:
        raise BadInput(f"{path} has one document only, so that none can be held out; add documents or make it a .txt.")
    cut = len(documents) - max(1, round(len(documents) * heldout))
    return documents[:cut], documents[cut:]


def load_text(path, tokenizer, cache, heldout=0.05, separator=None, template=None, need=(0, 0)):
    """Tokens of one file or folder as a `Split`, from `cache` if the same text was tokenised before.

    With documents, `separator` (an id) ends each. Raises BadInput for text that is missing, empty or unreadable, or has
    fewer tokens than `need` (training, held out).
    """
    path = Path(path)
    if not path.exists():
        raise BadInput(f"{path} does not exist; give a .txt, a .jsonl or a folder of them.")
    documents, stream = read_documents(path, template)
    if not any(text.strip() for text in documents):
        raise BadInput(f"{path} is empty; put text into it or remove it.")
    # Keyed by the text itself: reading it is quick beside tokenising, and time stamps lie after a checkout.
    key = hashlib.sha256(json.dumps([documents, stream, heldout, separator]).encode()).hexdigest()[:16]
    file = Path(cache, f"{path.stem}-{key}-{tokenizer.fingerprint}.npy")
    if file.exists():
        split = Split.read(file)
    else:
        parts, end = [], [] if separator is None or stream else [separator]
        for texts in split_text(documents, stream, heldout, path):
            ids = [np.array(tokenizer.encode(text, bos=True) + end, np.int32) for text in texts]
            parts.append(np.concatenate(ids))
        split = Split(*parts, file)
    for part, ids, least in ("training", split.train, need[0]), ("held-out", split.heldout, need[1]):
        if len(ids) < least:
            shorter = "--seq-len or --batch" if part == "training" else "--eval-len"
            needed = f"{len(ids)} tokens, {least} are needed"
            raise BadInput(f"{path}: its {part} text has {needed}; add text, or lower {shorter}.")
    return split


def domain_name(path):
    name = path.name if path.is_dir() else path.stem
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
        raise BadInput(f"{path}: a domain's name becomes a file name; use letters, digits, '.', '_' and '-'.")
    return name


def find_domains(folder, only="", least=1):
    """{domain: path}, sorted by name, or `only` those named there, or that many. BadInput for fewer than `least`."""
    folder, found = Path(folder), {}
    if not folder.is_dir():
        raise BadInput(f"{folder} is not a folder; give one with a <domain>.txt, .jsonl or sub-folder per domain.")
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or not (path.is_dir() or path.suffix in (".txt", ".jsonl")):
            continue
        if (name := domain_name(path)) in found:
            raise BadInput(f"{folder} has the domain {name} twice ({found[name].name}, {path.name}); keep one.")
        found[name] = path
    wanted = list(found)[: int(only)] if only.isdigit() else only.split(",") if only else list(found)
    if only.isdigit() and not 0 < int(only) <= len(found):
        raise BadInput(f"--domains is {only}, and {folder} holds {len(found)} domains; give a number from 1 to that.")
    if missing := set(wanted) - set(found):
        raise BadInput(f"{folder} has no domain {min(missing)!r}; --domains can name {', '.join(found)}.")
    found = {name: path for name, path in found.items() if name in wanted}
    if len(found) < least:
        has = f"only one domain, {next(iter(found))}" if found else "no domain"
        raise BadInput(f"{folder} holds {has}; put at least {least} there, each a <domain>.txt, .jsonl or sub-folder.")
    return found


def windows(ids, length, limit=None):
    """Consecutive windows [n, length], int64; at most `limit` of them, spread evenly over the text."""
    n = len(ids) // length
    tiled = np.asarray(ids[: n * length]).reshape(n, length)
    chosen = slice(None) if limit is None or n <= limit else np.linspace(0, n - 1, limit).astype(int)
    return tiled[chosen].astype(np.int64)


def batch(ids, index, size, length, seed):
    """Training batch number `index` [size, length], int64: a pure function, so that resuming needs no saved state.

    Each epoch tiles the text anew from a random offset and visits the windows in a new random order.
    """
    per_epoch = max(1, (len(ids) // length - 1) // size)
    epoch, step = divmod(index, per_epoch)
    rng = np.random.default_rng([seed, epoch])
    offset = rng.integers(min(length, len(ids) - size * length + 1))
    n = (len(ids) - offset) // length
    chosen = rng.permutation(n)[step * size : (step + 1) * size]
    return np.stack([ids[offset + c * length : offset + (c + 1) * length] for c in chosen]).astype(np.int64)
