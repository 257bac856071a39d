"""Read a Hugging Face `tokenizer.json` (byte-level BPE) into tiktoken. The ids equal those of the `tokenizers` library.

Text passes six stages: added tokens are cut out; NFC (Qwen); added tokens of the normalised text are cut out; a regex
cuts the rest into pieces; BPE on the bytes of each piece; ids. A file that needs any other stage is refused when it is
read. Truncation and padding, which some files request, are left to the caller, as in transformers.
"""

import functools
import hashlib
import itertools
import json
import unicodedata
from array import array
from copy import copy
from pathlib import Path

import regex
import tiktoken

from data import BadInput
from data.special_tokens import FLAGS, TOKENIZER, check_special_tokens

try:  # tiktoken's BPE, which takes bytes; its place is private
    from tiktoken._tiktoken import CoreBPE
except ImportError:
    CoreBPE = type(tiktoken.Encoding("", pat_str=".", mergeable_ranks={b"a": 0}, special_tokens={})._core_bpe)

# A plain ByteLevel has GPT-2's pattern. SmolLM2 isolates every digit first; DIGITS does both in one regex.
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGITS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"

# Constructs that `regex` and the regex library of `tokenizers` read differently: \h, \w, \b, ^, $, a class in a class,
# x{2}+, flags, \p after (?i:.
DIALECT = r"\\[^\WpPsSdDrnt]|(?<!\[)\^|\$|&&|\[[^\]]*\[|\d\}\+|\(\?(?!i:)[\w^~-]|\(\?i:[^)]*\\"

# A byte-level vocabulary writes each byte as one visible character: as itself if it has a shape, otherwise as one from
# U+0100 on.
SHAPELESS = [*range(33), *range(127, 161), 173]
BYTE_OF = {chr(byte): byte for byte in range(256) if byte not in SHAPELESS}
for number, byte in enumerate(SHAPELESS):
    BYTE_OF[chr(256 + number)] = byte

LONGEST = 1024  # characters of a token; real models need a few hundred, and much longer tokens would take hours

# Finds the characters of a text that do not exist in tiktoken's version of Unicode, which is also that of `tokenizers`.
UNASSIGNED = CoreBPE({bytes([byte]): byte for byte in range(256)}, {}, r"\p{Cn}")


class Tokenizer:
    """Text to ids and back.

    vocab_size: the highest id + 1, added tokens included, but at most the rows of the model. bos: the ids that
    `encode(bos=True)` prepends, often []. ids {token: id}. added: the file's added tokens {content: token}.
    fingerprint: a hash of the file, for the keys of token caches.
    """

    @classmethod
    def from_folder(cls, folder, rows=None):
        """Read `<folder>/tokenizer.json`.

        rows: of the model's embedding; `encode` refuses ids without a row, which some files have. BadInput if the file
        is missing, damaged or not supported, or if a file beside it says otherwise.
        """
        path = Path(folder, TOKENIZER)
        try:
            tokenizer = copy(cls.from_bytes(path.read_bytes()))
        except OSError as error:
            raise BadInput(f"{path} cannot be read ({error.strerror}); name a folder with a tokenizer.json.") from None
        except BadInput as error:
            raise BadInput(f"{path}: {error}") from None
        except Exception as error:  # a damaged file can fail in any way
            raise BadInput(f"{path} is not a valid tokenizer.json ({error!r:.200}); download it again.") from None
        check_special_tokens(folder, tokenizer.added)
        if rows and rows < tokenizer.vocab_size:
            tokenizer.vocab_size = rows
            tokenizer.fingerprint += f"-{rows}"  # a cache may hold ids that this model lacks
        return tokenizer

    @classmethod
    @functools.lru_cache(2)  # reading takes a second, and a run has the same file as its model
    def from_bytes(cls, raw):
        """Read the bytes of a tokenizer.json."""
        return cls(json.loads(raw), hashlib.sha256(raw).hexdigest()[:16])

    def __init__(self, file, fingerprint):
        """`file` is the parsed tokenizer.json."""
        model = file["model"]
        vocab = model["vocab"]
        # If two added tokens have the same content, the later one counts. Empty ones are ignored.
        self.added = {token["content"]: token for token in file.get("added_tokens") or [] if token["content"]}
        normalizer = file.get("normalizer")  # NFC or None
        check_supported(model, normalizer, self.added.values())
        self.fingerprint = fingerprint
        self.bos = bos_of(file.get("post_processor"))

        # Added tokens: we search for some in the raw text, and for the others in the normalised text between them. A
        # token in the vocabulary keeps its id. All others get the next free ids, whatever the file says.
        self._normalize = functools.partial(unicodedata.normalize, "NFC") if normalizer else str
        self.ids = ids = dict(vocab)
        self._raw = {}
        self._normalized = {}
        for content, token in self.added.items():
            id = ids.setdefault(content, len(ids))
            if token.get("normalized"):
                self._normalized[self._normalize(content)] = id
            else:
                self._raw[content] = id

        # BPE. tiktoken numbers the entries by rank; `_ids` maps a rank to the file's id.
        entries = merge_order(model["merges"], vocab)
        ranks = {to_bytes(entry): rank for rank, entry in enumerate(entries)}
        self._ids = [vocab[entry] for entry in entries]
        self._bpe = CoreBPE(ranks, {}, "")
        self._missing = bytes(BYTE_OF[char] for char in BYTE_OF.keys() - vocab)
        # In Llama-3, a piece that is itself an entry of the vocabulary is not split.
        whole = filter(is_byte_level, vocab) if model.get("ignore_merges") else ()
        self._whole = {to_bytes(token): vocab[token] for token in whole}

        # Pieces. `tokenizers` also makes a piece of text that the pattern does not match: the second half does this.
        given = pattern_of(file.get("pre_tokenizer"))
        self._pattern = regex.compile(rf"{given}|(?:(?!{given})(?s:.))+")
        self._cut("")  # refuses most bad regexes now, before a text comes

        # Decoding: the bytes of each id.
        self._bytes = {id: to_bytes(text) if text in vocab else text.encode() for text, id in ids.items()}
        if len(self._bytes) < len(ids):
            raise BadInput("two entries of the vocabulary have one id; download the file again.")
        self.vocab_size = max(array("I", self._bytes)) + 1  # raises an error for an id that is no whole number
        self.decode(self.bos)  # ValueError if the post-processor names an unknown id

    def encode(self, text, bos=False):
        """Ids of `text`, in which added tokens are recognised. bos: prepend `self.bos` unless it is there already.

        A lone surrogate counts as U+FFFD. A byte that is missing in the vocabulary is dropped.
        """
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        ids = []
        for outer in cut_out(self._raw, text):
            if outer in self._raw:
                ids.append(self._raw[outer])
                continue
            for part in cut_out(self._normalized, self._normalize(outer)):
                if part in self._normalized:
                    ids.append(self._normalized[part])
                    continue
                for piece in self._cut(part):
                    ids += self._encode_piece(piece)
        if bos and ids[: len(self.bos)] != self.bos:
            ids = self.bos + ids
        if max(ids, default=0) >= self.vocab_size:
            token = self._bytes[max(ids)].decode(errors="replace")
            raise BadInput(f"the model has no row for the token {token!r} of the text; remove it from the text.")
        return ids

    def _cut(self, text):
        """The pieces of `text`. BadInput if the regex matches an empty text: libraries differ in how they continue."""
        # `regex` knows a newer Unicode, in which an unassigned character may be a letter. It is replaced by one that is
        # never assigned.
        newer = bytes(UNASSIGNED.encode_ordinary(text)).decode()
        known = text.translate(dict.fromkeys(map(ord, newer), "\ufdd0")) if newer else text
        pieces = [text[slice(*match.span())] for match in self._pattern.finditer(known)]
        if "" in pieces:
            refuse("a pre-tokenizer whose regex matches an empty text")
        return pieces

    @functools.lru_cache(2**16)  # noqa: B019 (texts repeat words, and a tokenizer lives as long as the program)
    def _encode_piece(self, piece):
        """Ids of one piece. `tokenizers` drops missing bytes after the regex and before BPE: "(\\x04)" becomes "()"."""
        piece = piece.encode()
        if piece in self._whole:
            return [self._whole[piece]]
        known = piece.translate(None, self._missing)
        if not known:
            return []
        return [self._ids[rank] for rank in self._bpe.encode_single_piece(known)]

    def decode(self, ids):
        """Text of `ids`, added tokens included. Invalid UTF-8 becomes U+FFFD. ValueError for an unknown id."""
        return self.decode_bytes(ids).decode(errors="replace")

    def decode_bytes(self, ids):
        """Bytes of `ids`, for streaming: a token may end inside a character. Unused ids below `vocab_size` have none.
        ValueError for an id outside."""
        for id in ids:
            if not 0 <= id < self.vocab_size:
                raise ValueError(f"token id {id} is not in the vocabulary of {self.vocab_size}")
        return b"".join([self._bytes.get(id, b"") for id in ids])


def cut_out(added, text):
    """`text` cut into `added` tokens and the parts between them. Of tokens that begin at one place the longest wins."""
    # An empty list would match everywhere. A lone surrogate matches nowhere.
    return regex.split(r"(\L<added>)", text, added=added or ["\ud800"])


def is_byte_level(token):
    """Whether every character of `token` stands for a byte."""
    return BYTE_OF.keys() >= set(token)


def to_bytes(token):
    """Bytes of a vocabulary entry. An entry with a character outside the byte alphabet stands for itself."""
    if is_byte_level(token):
        return bytes(map(BYTE_OF.get, token))
    return token.encode()


def merge_order(merges, vocab):
    """The entries of the vocabulary that BPE can produce, in the order of their merges; then the single bytes.

    `tokenizers` merges the pairs in the file's list. tiktoken merges any neighbours that spell an entry. To get equal
    results, tiktoken receives only the entries that BPE, applied to the entry alone, merges into one token. Each is
    ranked by the last pair of that merge.

    Proof: look at the place of an entry in a text. As long as no token crosses its ends, the merges inside are those of
    the entry alone. So an entry that BPE does not complete alone is never produced. And if BPE completes it alone, its
    last pair are the only neighbours that ever spell it.
    """
    ranks = {}  # of two equal pairs the later counts, as in `tokenizers`
    for rank, merge in enumerate(merges):
        left, right = merge.split(" ") if isinstance(merge, str) else merge  # older files have "a b", newer ["a", "b"]
        if not {left, right, left + right} <= vocab.keys():
            raise BadInput(f"the merge {left!r} + {right!r} is not in the vocabulary; download the file again.")
        if len(left + right) > LONGEST:
            raise BadInput(f"a merge makes a token of more than {LONGEST} characters; do not trust the file.")
        ranks[left, right] = rank
    entries = set(map("".join, ranks))
    last = {last_parts(entry, ranks) for entry in entries if is_byte_level(entry)}
    produced = ["".join(pair) for pair in sorted(last & ranks.keys(), key=ranks.get)]
    return produced + sorted(vocab.keys() & BYTE_OF)


def last_parts(entry, ranks):
    """The last two parts, as strings, when BPE merges `entry` alone; more parts if it gets stuck.

    By definition, BPE repeatedly merges the pair of the lowest rank, the leftmost of equal ones. ranks: {(left, right):
    rank}.
    """
    parts = list(entry)
    while len(parts) > 2:
        pairs = list(itertools.pairwise(parts))
        listed = [pair for pair in pairs if pair in ranks]
        if not listed:
            break
        at = pairs.index(min(listed, key=ranks.get))
        parts[at : at + 2] = ["".join(pairs[at])]
    return tuple(parts)


def refuse(feature):
    """BadInput: without this feature the ids would differ from those of `tokenizers`."""
    raise BadInput(
        f"{feature} is not implemented; use a model with byte-level BPE, such as Llama-3, Qwen, SmolLM2 or GPT-2."
    )


def check_supported(model, normalizer, added):
    """Refuse by name every feature that would change ids and is not implemented."""
    if model.get("byte_fallback"):
        refuse("a SentencePiece tokenizer (byte_fallback, as in Llama-2 and TinyLlama)")
    if model.get("type", "BPE") != "BPE":
        refuse(f"the model type {model['type']}")
    for setting in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(setting):
            refuse(f"the model setting {setting}={model[setting]!r}")
    if normalizer and normalizer["type"] != "NFC":
        refuse(f"the normalizer {normalizer['type']}")
    for token in added:
        for flag in FLAGS[:3]:
            if token.get(flag):
                refuse(f"the flag {flag} of the added token {token['content']!r}")


def pattern_of(pre_tokenizer):
    """The regex that cuts text into pieces for BPE."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer]) if pre_tokenizer else []
    names = [step["type"] for step in steps]
    if steps and not steps[-1].get("add_prefix_space", True):
        first = steps[0]
        use_regex = steps[-1].get("use_regex", True)  # GPT-2's, after the other step
        if names == ["ByteLevel"] and use_regex:
            return GPT2
        if names == ["Digits", "ByteLevel"] and use_regex and first["individual_digits"]:
            return DIGITS
        if names == ["Split", "ByteLevel"] and not use_regex and "Regex" in first["pattern"]:
            given = first["pattern"]["Regex"]
            if first["behavior"] == "Isolated" and not first["invert"] and not regex.search(DIALECT, given):
                return given
    refuse(f"the pre-tokenizer {' + '.join(names) or 'null'}, with the settings it has,")


def bos_of(post_processor):
    """The ids that the post-processor prepends to a text."""
    ids = []
    steps = post_processor.get("processors", [post_processor]) if post_processor else []
    for step in steps:
        if step["type"] == "TemplateProcessing" and "Sequence" in step["single"][-1]:
            for piece in step["single"][:-1]:  # the last piece is the text
                ids += step["special_tokens"][piece["SpecialToken"]["id"]]["ids"]
        elif step["type"] != "ByteLevel":  # ByteLevel only changes offsets
            refuse(f"the post-processor {step['type']}, with the template it has,")
    return ids
