"""Domain text on disk to token ids: a folder with one file or sub-folder per domain, its last 5% held out.

`<domain>.txt` is one stream, whose tail is held out: translations of one book then hold out the same chapters.
`<domain>.jsonl` (one {"text": ...} a line, or {"messages": [...]}, a conversation) and the files of a sub-folder
`<domain>/` are documents; whole documents are held out.

    find_domains -> {domain: path};  load_text -> Split of token ids;  windows and batch -> [n, length] of them
"""

import contextlib
import hashlib
import json
import re
import zlib
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np

from data import BadInput, atomic

FORMATS = (".txt", ".jsonl")
VISIBLE = "[!.]*"  # names of files that are not hidden
HELDOUT = 0.05  # share of each domain's text that is not trained on
JUDGED = 256  # tokens of each text by which the passages are judged that a KV memory may start from


# Text ----------------------------------------------------------------------------------------------------------------


def format_of(path):
    """How its name ends, in small letters: some systems write .TXT."""
    return path.suffix.lower()


def read_text(path):
    """The text of a file; BadInput if it is not UTF-8."""
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not UTF-8 at byte {error.start}; convert it, for example with iconv.") from None


def lines_of(path):
    """Yield (file:line, text) of every line of a file that is not blank."""
    # Not splitlines(): it also cuts at separators that JSON allows within a text.
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            yield f"{path}:{number}", line.removesuffix("\r")  # of a file from Windows


def read_documents(path, template=None):
    """(documents, stream): the texts of a file or folder, and whether they are one stream (a single .txt).

    template: the model's `ChatTemplate`, which makes a text of a conversation; None if it has none.
    """
    if path.is_dir():
        documents = []
        for file in sorted(path.glob(VISIBLE)):
            if file.is_dir():
                raise BadInput(f"{file} is a folder in that of a domain, where files are read; move them one up.")
            if format_of(file) in FORMATS:
                documents += read_documents(file, template)[0]
        return documents, False
    if format_of(path) in FORMATS and not path.is_file():
        raise BadInput(f"{path} is no file that can be read to its end; give a .txt, a .jsonl or a folder of them.")
    if format_of(path) == ".txt":
        return [read_text(path)], True
    if format_of(path) != ".jsonl":
        raise BadInput(f"{path} is neither a .txt nor a .jsonl; rename it or give a folder of them.")
    documents = []
    for where, line in lines_of(path):
        documents.append(text_of(line, where, template))
    return documents, False


# A template may write the date into a conversation. In text it is always this one: else a run that goes on tomorrow, or
# is evaluated then, would see other text. (It is the default of Llama's own templates.)
SOME_DAY = datetime(2024, 7, 26)


def text_of(line, where, template):
    """The text of one line of a .jsonl, which stands at `where`; BadInput if it has none."""
    try:
        row = json.loads(line)
        text = row.get("text")
        if isinstance(text, str) and (text or "messages" not in row):
            return text
        # One message at least, and each has a role, a text: templates skip a role that they do not know. What else it
        # may hold is for the template to say: content can be null beside a tool call, or a list.
        if {type(message["role"]) for message in row["messages"]} != {str}:
            raise ValueError
    except Exception:  # a line may hold anything
        raise BadInput(
            f'{where} is not a JSON object with "text", or "messages" with a "role" each; mend or remove it.'
        ) from None
    if template is None:
        raise BadInput(f"{where} is a conversation, but the model has no chat template; give text.")
    try:
        return template(row["messages"], tools=row.get("tools"), now=SOME_DAY)
    except BadInput as error:
        raise BadInput(f"{where}: {error}") from None


# Tokens --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """Token ids of one domain, 1-D; read from the cache, they stay on the disk until they are used."""

    train: np.ndarray
    heldout: np.ndarray
    key: str  # changes with the text and with how it became ids
    cached: Path

    def store(self):
        """Write the cache, so that the next run need not tokenise. (Not done on reading: first comes every check.)"""
        if not self.cached.exists():
            ids = np.concatenate([self.train, self.heldout])
            counted = np.concatenate([[len(self.train)], ids]).astype(np.int32)
            checksum = np.array([zlib.crc32(counted)], np.uint32).view(np.int32)
            # Where nothing can be written the run does without.
            with contextlib.suppress(OSError), atomic(self.cached) as partial, open(partial, "wb") as file:
                np.save(file, np.concatenate([checksum, counted]))

    @classmethod
    def read(cls, path, key):
        """What `store` wrote, int32: a checksum of the rest, the number of training ids, these, and the held-out ids.
        None if it is damaged: then it is made anew."""
        with contextlib.suppress(Exception):  # a torn file fails in many ways
            saved = np.load(path, mmap_mode="r")
            if saved.dtype == np.int32 and zlib.crc32(saved[1:]) == saved[:1].view(np.uint32)[0]:
                cut = 2 + saved[1]
                return cls(saved[2:cut], saved[cut:], key, path)
        with contextlib.suppress(OSError):  # where nothing can be written
            path.unlink()


def split_text(documents, stream, path, least=1):
    """(training texts, held-out texts): the last `HELDOUT` of the documents, or of the stream from `path`. Where at
    `least` 0 tokens are held out, a single document is trained on."""
    if stream:
        text = documents[0]
        end = int(len(text) * (1 - HELDOUT))
        near = int(end - len(text) * HELDOUT / 2)
        cut = text.rfind("\n", near, end) + 1 or end  # where a line ends, if one does near there; else anywhere
        return [text[:cut]], [text[cut:]]
    if len(documents) == 1 and not least:
        return documents, []
    if len(documents) == 1:
        raise BadInput(f"{path} has one document only, so that none can be held out; add documents or make it a .txt.")
    cut = len(documents) - max(1, round(len(documents) * HELDOUT))
    return documents[:cut], documents[cut:]


def load_text(path, tokenizer, cache, separator=None, template=None, need=(0, 0)):
    """Tokens of one file or folder as a `Split`, from the folder `cache` if the same text was tokenised before.

    separator: an id that ends each document; need: the least tokens (training, held out). Raises BadInput for text that
    is missing, empty or unreadable, or has fewer.
    """
    path = Path(path)
    if not path.exists():
        raise BadInput(f"{path} does not exist; give a .txt, a .jsonl or a folder of them.")
    documents, stream = read_documents(path, template)
    if not "".join(documents).strip():
        raise BadInput(f"{path} is empty; put text into it or remove it.")
    # Keyed by the text itself: reading it is quick beside tokenising, and time stamps lie after a checkout.
    text = hashlib.sha256(json.dumps([documents, stream, HELDOUT, separator]).encode()).hexdigest()[:16]
    key = f"{text}-{tokenizer.fingerprint}"
    cached = Path(cache, f"{path.stem[:40]}-{key}.npy")  # 255 bytes are the most that a disk takes
    split = Split.read(cached, key) if cached.exists() else None
    if split is None:
        end = [] if stream or separator is None else [separator]
        parts = [encode(texts, tokenizer, end) for texts in split_text(documents, stream, path, need[1])]
        split = Split(*parts, key, cached)
    check_length(path, "training", split.train, need[0], "--seq-len or --batch")
    check_length(path, "held-out", split.heldout, need[1], "--eval-len")
    return split


def encode(texts, tokenizer, end):
    """int32 ids of texts in a row, each between the tokenizer's bos and `end`."""
    ids = [np.array([], np.int32)]
    for text in texts:
        # An array for each text: a list of all ids would need eight times the memory.
        ids.append(np.array(tokenizer.encode(text, bos=True) + end, np.int32))
    return np.concatenate(ids)


def check_length(path, part, ids, least, flags):
    if len(ids) < least:
        raise BadInput(
            f"{path}: its {part} text has {len(ids)} tokens, {least} are needed; add text, or lower {flags}."
        )


# Domains -------------------------------------------------------------------------------------------------------------


def domain_name(path):
    """The domain that a file or folder is named after; BadInput if the name does not do for files of a run."""
    name = path.name if path.is_dir() else path.stem
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}", name):
        letters = "at most 100 letters, digits, '.', '_' and '-'"
        raise BadInput(f"{path}: a domain's name becomes a file name; use {letters}.")
    if name in ("unpruned", "backbone", "routed", "auto"):
        raise BadInput(f"{path}: a domain cannot be called {name}, which has a meaning here; rename it.")
    return name


def find_domains(folder, only="", least=1):
    """{domain: path} of the text in a folder; BadInput for fewer domains than `least`.

    only: names with commas between, or a number: so many, in the order of their files; empty: all.
    """
    names = only.split(",") if only and not only.isdecimal() else None
    paths = domains_in(Path(folder), names)
    chosen = list(paths)
    if only.isdecimal():
        chosen = chosen[: int(only)]
        if not 0 < int(only) <= len(paths):
            raise BadInput(f"--domains is {only}, and {folder} holds {len(paths)} domains; give 1 to that many.")
    elif names:
        chosen = names
    for name in chosen:
        if name not in paths:
            raise BadInput(f"{folder} has no domain {name!r}; --domains can name {', '.join(paths)}.")
    found = {name: path for name, path in paths.items() if name in chosen}
    if len(found) < least:
        has = f"only one domain, {chosen[0]}" if chosen else "no domain"
        raise BadInput(f"{folder} holds {has}; put at least {least} there, each a <domain>.txt, .jsonl or sub-folder.")
    return found


def domains_in(folder, names=None):
    """{domain: path}, all that a folder holds, or those of the names that it has."""
    if not folder.is_dir():
        raise BadInput(f"{folder} is not a folder; give one with a <domain>.txt, .jsonl or sub-folder per domain.")
    paths = {}
    for path in sorted(folder.glob(VISIBLE)):
        if not path.is_dir() and format_of(path) not in FORMATS:
            continue  # a README, say
        if names is not None and path.name not in names and path.stem not in names:
            continue
        name = domain_name(path)
        if name in paths:
            raise BadInput(f"{folder} has the domain {name} twice ({paths[name].name}, {path.name}); keep one.")
        paths[name] = path
    return paths


# Training and evaluation ---------------------------------------------------------------------------------------------


def tiles(ids, length):
    """[n, length]: the text cut into consecutive windows; a view, so that ids on the disk stay there."""
    n = len(ids) // length
    return np.asarray(ids[: n * length]).reshape(n, length)


def passages(ids, n, length, judged=JUDGED):
    """What a KV memory may start from, and what shows which is the best: of n equal parts of a text the starts
    [n, length] and the middles [n, judged], int64. Of a short text there are fewer, of the shortest its beginning."""
    n = max(1, min(n, len(ids) // (2 * max(length, judged))))
    parts = tiles(ids, len(ids) // n)[:n]
    middle = parts.shape[1] // 2
    return parts[:, :length].astype(np.int64), parts[:, middle : middle + judged].astype(np.int64)


def windows(ids, length, limit=None):
    """Consecutive windows [n, length], int64; at most `limit` of them, spread evenly over the text."""
    tiled = tiles(ids, length)
    if limit is not None and limit < len(tiled):
        tiled = tiled[np.linspace(0, len(tiled) - 1, limit).astype(int)]
    return tiled.astype(np.int64)


def batch(ids, index, size, length, seed):
    """Training batch number `index` [size, length], int64: a pure function, so that resuming needs no saved state.

    Each epoch tiles the text anew from a random offset and visits the windows in a new random order.
    """
    per_epoch = max(1, (len(ids) // length - 1) // size)  # less one window: the offset may cost it
    epoch, step = divmod(index, per_epoch)
    rng = np.random.default_rng([seed, epoch])
    # The offset leaves room for one batch at least, even in a text that holds no more than that.
    offset = rng.integers(min(length, len(ids) - size * length + 1))
    tiled = tiles(ids[offset:], length)
    chosen = rng.permutation(len(tiled))[step * size : (step + 1) * size]
    return tiled[chosen].astype(np.int64)
