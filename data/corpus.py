"""Domain text on disk to token ids. A folder has one file or sub-folder per domain; the last 5% are held out.

`<domain>.txt` is one stream, and its tail is held out. Translations of one book then hold out the same chapters.
`<domain>.jsonl` and the files of a sub-folder `<domain>/` are documents, and the last ones are held out, or the tail of
one that is long. A line of a .jsonl is {"text": ...}, or {"messages": [...]}, a conversation.

A stream and a document begin with the tokenizer's BOS, if it has one. A document ends with the model's first EOS. A
conversation is the text of the chat template, which writes its own beginning and end; nothing is added.

    find_domains -> {domain: path};  load_text -> `Split` of token ids;  windows and batch -> [n, length] of them
"""

import contextlib
import hashlib
import json
import sys
import unicodedata
import zlib
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np

from data import BadInput, atomic

FORMATS = (".txt", ".jsonl")
VISIBLE = "[!.]*"  # matches the names of files that are not hidden
HELDOUT = 0.05  # share of each domain's text that is held out


# Text ----------------------------------------------------------------------------------------------------------------


class Conversation(str):
    """A conversation as text of a chat template."""


def format_of(path):
    """The suffix of a file in lower case: some systems write .TXT."""
    return path.suffix.lower()


def read_text(path):
    """The text of a file; BadInput if it is not UTF-8."""
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig").replace("\r\n", "\n")  # lines of a file from Windows
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not UTF-8 at byte {error.start}; convert it, for example with iconv.") from None


def text_if_any(path):
    """The text of a file; None, with a line on the screen, if it has none, like a picture."""
    with contextlib.suppress(BadInput):
        text = read_text(path) if path.is_file() else "\0"
        if "\0" not in text:  # otherwise it only looks like text
            return text
    print(f"{path} is left out: it is no UTF-8 text", file=sys.stderr)


def lines_of(path):
    """Yield ("file:line", text) for every line of a file that is not blank."""
    # splitlines() would also cut at separators that JSON allows within a text.
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            yield f"{path}:{number}", line


def read_documents(path, template=None):
    """(texts of a file or folder, whether they are one stream). Only a .txt is a stream.

    In a folder, any file of UTF-8 text is a document (.md, .py); the others are named on the screen and left out.
    template: the model's `ChatTemplate`, which turns a conversation into text; None if the model has none.
    """
    if path.is_dir():
        documents = []
        for file in sorted(path.glob(VISIBLE)):
            if file.is_dir():
                raise BadInput(f"{file} is a folder in that of a domain, where files are read; move them one up.")
            if format_of(file) in FORMATS:
                documents += read_documents(file, template)[0]
                continue
            text = text_if_any(file)
            if text is not None:
                documents.append(text)
        return documents, False
    if format_of(path) not in FORMATS:
        raise BadInput(f"{path} is neither a .txt nor a .jsonl; rename it or give a folder of them.")
    if not path.is_file():
        raise BadInput(f"{path} is no file that can be read to its end; give a .txt, a .jsonl or a folder of them.")
    if format_of(path) == ".txt":
        return [read_text(path)], True
    return [text_of(line, where, template) for where, line in lines_of(path)], False


# A chat template may write today's date into a conversation. Training text always gets this date (the default of
# Llama's templates): otherwise a run that is continued or evaluated tomorrow would read another text.
SOME_DAY = datetime(2024, 7, 26)


def text_of(line, where, template):
    """The text in one line of a .jsonl. BadInput, which names the place `where`, if the line has none."""
    try:
        row = json.loads(line)
        text = row.get("text")
        if isinstance(text, str) and (text or "messages" not in row):
            return text
        # We only require a message, and a role in each: templates silently skip a message without a role that they
        # know. The template checks the rest. For example, content may be null beside a tool call, or a list.
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
    """Token ids of one domain, 1-D. Ids from the cache stay on the disk until they are used."""

    train: np.ndarray
    heldout: np.ndarray
    key: str  # a hash of the text and the tokenizer
    cached: Path  # the file of these ids in the cache

    def store(self):
        """Write the ids into the cache, for the next run. (Reading does not: all checks come before any writing.)"""
        if not self.cached.exists():
            ids = np.concatenate([[len(self.train)], self.train, self.heldout]).astype(np.int32)
            checksum = np.array([zlib.crc32(ids)], np.uint32).view(np.int32)
            # A run also works without a cache, in a place where it cannot write.
            with contextlib.suppress(OSError), atomic(self.cached) as partial:
                np.save(partial, np.concatenate([checksum, ids]))

    @classmethod
    def read(cls, path, key):
        """Read a file that `store` wrote: int32, a checksum, the number of training ids, these, the held-out ids.

        Returns None for a damaged file, and removes it.
        """
        with contextlib.suppress(Exception):  # damage shows in many ways
            saved = np.load(path, mmap_mode="r")
            if saved.dtype == np.int32 and zlib.crc32(saved[1:]) == saved[:1].view(np.uint32)[0]:
                cut = 2 + saved[1]
                return cls(saved[2:cut], saved[cut:], key, path)
        with contextlib.suppress(OSError):  # we may lack the right to remove it
            path.unlink()


def split_text(documents, stream, least=1):
    """(training texts, held-out texts): the last `HELDOUT` of all characters, whole documents if their ends allow it.

    least: how many held-out tokens are needed. With 0 a single document becomes training text.
    """
    if len(documents) == 1 and not stream and not least:
        return documents, []
    ends = np.cumsum(list(map(len, documents)))
    end = int(ends[-1] * (1 - HELDOUT))
    number = int(np.abs(ends - end).argmin())  # the document that ends nearest
    if 0.6 * HELDOUT <= 1 - ends[number] / ends[-1] <= 2 * HELDOUT:
        return documents[: number + 1], documents[number + 1 :]
    number = int(np.searchsorted(ends, end, side="right"))  # the document that has the place within it
    text = documents[number]
    end -= int(ends[number]) - len(text)
    near = max(0, int(end - ends[-1] * HELDOUT / 2))
    cut = text.rfind("\n", near, end) + 1 or end  # the end of a nearby line, if any
    head, tail = [[type(text)(part)] if part else [] for part in (text[:cut], text[cut:])]
    return documents[:number] + head, tail + documents[number + 1 :]


def split_by_number(documents):
    """The split of documents in runs of earlier versions: `HELDOUT` of their number, not of their length."""
    cut = len(documents) - max(1, round(len(documents) * HELDOUT))
    return documents[:cut], documents[cut:]


def load_text(path, tokenizer, cache, separator=None, template=None, need=(0, 0), known=None):
    """The `Split` of one file or folder, from the folder `cache` if the same text was tokenised before.

    separator: an id that ends each document; need: the minimum of (training, held-out) tokens; known: the key of the
    text in a finished run. BadInput for a text that is missing, empty, unreadable or too short.
    """
    path = Path(path)
    if not path.exists():
        raise BadInput(f"{path} does not exist; give a .txt, a .jsonl or a folder of them.")
    documents, stream = read_documents(path, template)
    if not "".join(documents).strip():
        raise BadInput(f"{path} is empty; put text into it or remove it.")
    # The key is a hash of the text itself: reading is quick compared with tokenising, and time stamps can be wrong.
    earlier = [documents, stream, HELDOUT, separator]
    key = key_of(earlier, tokenizer)
    by_number = known == key and len(documents) > 1
    if not stream and not by_number:
        conversations = [isinstance(document, Conversation) for document in documents]
        key = key_of([*earlier, "by length", conversations], tokenizer)
    cached = Path(cache, f"{path.stem[:40]}-{key}.npy")  # file names have at most 255 bytes
    split = Split.read(cached, key) if cached.exists() else None
    if split is None:
        end = [] if stream or separator is None else [separator]
        parts = split_by_number(documents) if by_number else split_text(documents, stream, need[1])
        split = Split(*(encode(texts, tokenizer, end, by_number) for texts in parts), key, cached)
    check_length(path, "training", split.train, need[0], "--seq-len or --batch")
    check_length(path, "held-out", split.heldout, need[1], "--eval-len")
    return split


def key_of(content, tokenizer):
    """A hash of a text and of what decides about its ids."""
    return f"{hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]}-{tokenizer.fingerprint}"


def encode(texts, tokenizer, end, earlier=False):
    """The ids of all texts, int32: each with the tokenizer's bos and with `end`, but not a `Conversation`.

    earlier: a conversation has both, too, as in runs of earlier versions.
    """
    ids = [np.array([], np.int32)]
    for text in texts:
        # One array per text: a single list of all ids would need eight times the memory.
        document = earlier or not isinstance(text, Conversation)
        ids.append(np.array(tokenizer.encode(text, bos=document) + end * document, np.int32))
    return np.concatenate(ids)


def check_length(path, part, ids, least, flags):
    if len(ids) < least:
        raise BadInput(
            f"{path}: its {part} text has {len(ids)} tokens, {least} are needed; add text, or lower {flags}."
        )


# Domains -------------------------------------------------------------------------------------------------------------


def plain_name(path):
    """The name of a domain's file or folder, as a keyboard types it."""
    return unicodedata.normalize("NFC", path.name if path.is_dir() else path.stem)


def domain_name(path):
    """The domain that a file or folder is named after. BadInput if the files of a run cannot have that name."""
    name = plain_name(path)
    if name.startswith("-") or "," in name or not name.isprintable() or len(name.encode()) > 150:
        rule = "at most 150 bytes that can be shown, without a comma, and no '-' in front"
        raise BadInput(f"{path}: a domain's name becomes a file name and an option; use {rule}.")
    if name in ("unpruned", "backbone", "routed", "auto"):
        raise BadInput(f"{path}: a domain cannot be called {name}, which has a meaning here; rename it.")
    return name


def find_domains(folder, only="", least=1):
    """{domain: path} of the text in a folder, in the order of the names. BadInput for fewer domains than `least`.

    only: comma-separated names, or a number: the first domains; empty: all.
    """
    names = only.split(",") if only and not only.isdecimal() else None
    paths = domains_in(Path(folder), names)
    for name in names or ():
        if name not in paths:
            raise BadInput(f"{folder} has no domain {name!r}; --domains can name {', '.join(paths)}.")
    if names:
        paths = {name: path for name, path in paths.items() if name in names}
    elif only:
        if not 0 < int(only) <= len(paths):
            raise BadInput(f"--domains is {only}, and {folder} holds {len(paths)} domains; give 1 to that many.")
        paths = dict(list(paths.items())[: int(only)])
    if len(paths) < least:
        has = f"only one domain, {next(iter(paths))}" if paths else "no domain"
        raise BadInput(f"{folder} holds {has}; put at least {least} there, each a <domain>.txt, .jsonl or sub-folder.")
    return paths


def domains_in(folder, names=None):
    """{domain: path} of all domains in a folder, or at least of those among `names`."""
    if not folder.is_dir():
        raise BadInput(f"{folder} is not a folder; give one with a <domain>.txt, .jsonl or sub-folder per domain.")
    paths = {}
    for path in sorted(folder.glob(VISIBLE)):
        if not path.is_dir() and format_of(path) not in FORMATS:
            continue  # a README, for example
        if names is not None and plain_name(path) not in names:
            continue  # whatever its name, nobody asked for it
        name = domain_name(path)
        if name in paths:
            raise BadInput(f"{folder} has the domain {name} twice ({paths[name].name}, {path.name}); keep one.")
        paths[name] = path
    return paths


# Training and evaluation ---------------------------------------------------------------------------------------------


def tiles(ids, length):
    """Consecutive windows [n, length] of a text. A view: ids on the disk stay there."""
    n = len(ids) // length
    return np.asarray(ids[: n * length]).reshape(n, length)


def passages(ids, n, length, places, judged):
    """Candidates for the start of a KV memory, and text to compare them on, int64.

    The text is cut into equal parts, `places` or at least n, fewer if it is short. Returns the beginnings of n of them
    [n, length], the candidates, and the middles of all [places, judged].
    """
    places = max(1, min(max(n, places), len(ids) // (2 * max(length, judged))))
    parts = tiles(ids, len(ids) // places)[:places]
    middle = parts.shape[1] // 2
    chosen = np.linspace(0, places - 1, min(n, places)).astype(int)
    return parts[chosen, :length].astype(np.int64), parts[:, middle : middle + judged].astype(np.int64)


def windows(ids, length, limit=None):
    """Consecutive windows [n, length], int64. At most `limit` of them, spread evenly over the text."""
    tiled = tiles(ids, length)
    if limit is not None and limit < len(tiled):
        tiled = tiled[np.linspace(0, len(tiled) - 1, limit).astype(int)]
    return tiled.astype(np.int64)


PIECE = 32  # tokens: so many in a row do not stand in two texts by chance


def trained_on(ids, x):
    """bool [n]: whether most of a window of x [n, T] also stands in the training text `ids` (repeated paragraphs)."""
    length = min(PIECE, x.shape[1], len(ids))
    factors = np.random.default_rng(0).integers(2**62, size=length)  # a hash: sums may leave 64 bits
    known = np.lib.stride_tricks.sliding_window_view(ids.astype(np.int64), length) @ factors
    pieces = x[:, : x.shape[1] // length * length].reshape(len(x), -1, length) @ factors
    return np.isin(pieces, known).mean(1) > 0.5


def batch(ids, index, size, length, seed):
    """Training batch number `index`, [size, length] int64. A pure function: resuming needs no saved state.

    Each epoch cuts the text into windows from a random offset, and visits them in a random order.
    """
    per_epoch = max(1, (len(ids) // length - 1) // size)  # the offset may cost one window
    epoch, step = divmod(index, per_epoch)
    rng = np.random.default_rng([seed, epoch])
    # The offset leaves room for at least one batch, even in the shortest text.
    offset = rng.integers(min(length, len(ids) - size * length + 1))
    tiled = tiles(ids[offset:], length)
    chosen = rng.permutation(len(tiled))[step * size : (step + 1) * size]
    return tiled[chosen].astype(np.int64)
