"""A Hugging Face `tokenizer.json` (byte-level BPE) read into tiktoken: the ids of the `tokenizers` library without it.

Text passes six stages: added tokens are cut out -> NFC (Qwen) -> added tokens of the normalised text are cut out -> a
regex cuts the rest into pieces -> BPE on the bytes of each piece -> ids. What would need another stage is refused when
the file is read. Truncation and padding, which some files ask for, are left to the caller, as in transformers.
"""

import functools
import hashlib
import itertools
import json
import unicodedata
from array import array
from pathlib import Path

import regex
from tiktoken._tiktoken import CoreBPE

from data import BadInput

# The pattern of a plain ByteLevel is GPT-2's. SmolLM2 isolates every digit before it; as one regex, that is DIGITS.
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGITS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"

# What `regex` reads otherwise than the library that `tokenizers` has: \h, \w, \b, ^, $, a class in a class, x{2}+,
# flags, \p after (?i:.
DIALECT = r"\\[^\WpPsSdDrnt]|(?<!\[)\^|\$|&&|\[[^\]]*\[|\d\}\+|\(\?(?!i:)[\w^~-]|\(\?i:[^)]*\\"

# A byte-level vocabulary writes each byte as one visible character: itself where it has a shape, else from U+0100 on.
SHAPELESS = [*range(33), *range(127, 161), 173]
LONGEST = 1024  # characters of a token: those of models have a few hundred at most, and much longer ones take hours
BYTE_OF = {chr(byte): byte for byte in range(256) if byte not in SHAPELESS}
for number, byte in enumerate(SHAPELESS):
    BYTE_OF[chr(256 + number)] = byte

# Finds in a text the characters that the Unicode of tiktoken, which is that of `tokenizers`, does not have.
UNASSIGNED = CoreBPE({bytes([byte]): byte for byte in range(256)}, {}, r"\p{Cn}")


class Tokenizer:
    """Text to ids and back.

    vocab_size: highest id + 1, added tokens included.      bos: ids that `encode(bos=True)` prepends, [] if none.
    fingerprint: hash of the file, a key for token caches.
    """

    @classmethod
    def from_folder(cls, folder):
        """Read `<folder>/tokenizer.json`. BadInput if it is missing, damaged or needs what is not implemented."""
        path = Path(folder, "tokenizer.json")
        try:
            return cls.from_bytes(path.read_bytes())
        except OSError as error:
            raise BadInput(f"{path} cannot be read ({error.strerror}); name a folder with a tokenizer.json.") from None
        except BadInput as error:
            raise BadInput(f"{path}: {error}") from None
        except Exception as error:  # nobody can list the values that a damaged file may have, and what they lead to
            raise BadInput(f"{path} is not a valid tokenizer.json ({error!r:.200}); download it again.") from None

    @classmethod
    @functools.lru_cache(2)  # a run has its model's file, and to read one takes a second
    def from_bytes(cls, raw):
        """Read the bytes of a tokenizer.json."""
        return cls(json.loads(raw), hashlib.sha256(raw).hexdigest()[:16])

    def __init__(self, file, fingerprint):
        """`file` is the parsed tokenizer.json."""
        model = file["model"]
        vocab = model["vocab"]
        # Of two added tokens with one content the later counts, an empty one not at all.
        added = {token["content"]: token for token in file.get("added_tokens") or [] if token["content"]}
        normalizer = file.get("normalizer")  # NFC or None
        check_supported(model, normalizer, added.values())
        self.fingerprint = fingerprint
        self.bos = bos_of(file.get("post_processor"))

        # Added tokens: some are looked for in the text as it is, the others in the normalised text between those. Those
        # that the vocabulary has keep that id, the others are numbered on, whatever the file says.
        self._normalize = functools.partial(unicodedata.normalize, "NFC") if normalizer else str
        ids = dict(vocab)
        self._raw = {}
        self._normalized = {}
        for content, token in added.items():
            id = ids.setdefault(content, len(ids))
            if token.get("normalized"):
                self._normalized[self._normalize(content)] = id
            else:
                self._raw[content] = id

        # BPE. tiktoken numbers the entries by rank; `_ids` has the file's own number of each.
        entries = merge_order(model["merges"], vocab)
        ranks = {to_bytes(entry): rank for rank, entry in enumerate(entries)}
        self._ids = [vocab[entry] for entry in entries]
        self._bpe = CoreBPE(ranks, {}, "")
        self._missing = bytes(BYTE_OF[char] for char in BYTE_OF.keys() - vocab)
        # Llama-3 does not merge a piece that is an entry of the vocabulary.
        whole = filter(is_byte_level, vocab) if model.get("ignore_merges") else ()
        self._whole = {to_bytes(token): vocab[token] for token in whole}

        # Pieces. `tokenizers` makes a piece of each run that no alternative matches, and so does the second half.
        given = pattern_of(file.get("pre_tokenizer"))
        self._pattern = regex.compile(rf"{given}|(?:(?!{given})(?s:.))+")
        self._cut("")  # refuses most of the regexes that _cut refuses, before there is a text

        # And back: what each id stands for.
        self._bytes = {id: to_bytes(text) if text in vocab else text.encode() for text, id in ids.items()}
        if len(self._bytes) < len(ids):
            raise BadInput("two entries of the vocabulary have one id; download the file again.")
        self.vocab_size = max(array("I", self._bytes)) + 1  # OverflowError or TypeError if one is no whole number
        self.decode(self.bos)  # ValueError if the post-processor names an id that there is not

    def encode(self, text, bos=False):
        """Ids of `text`, added tokens in it recognised. `bos` prepends `self.bos`, unless the ids begin with it.

        A lone surrogate counts as U+FFFD. A byte that the vocabulary lacks leaves no id.
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
            return self.bos + ids
        return ids

    def _cut(self, text):
        """The pieces of `text`. BadInput if the regex matches an empty one: after it, each library goes its way."""
        # To `regex` a newer character may be a letter. For the cut it becomes one that is none in any Unicode.
        newer = bytes(UNASSIGNED.encode_ordinary(text)).decode()
        known = text.translate(dict.fromkeys(map(ord, newer), "\ufdd0")) if newer else text
        pieces = [text[slice(*match.span())] for match in self._pattern.finditer(known)]
        if "" in pieces:
            refuse("a pre-tokenizer whose regex matches an empty text")
        return pieces

    @functools.lru_cache(2**16)  # noqa: B019 (a text repeats its words, and a tokenizer lives as long as the program)
    def _encode_piece(self, piece):
        """Ids of one piece. `tokenizers` drops a missing byte between the regex and BPE: "(\\x04)" is "()"."""
        piece = piece.encode()
        if piece in self._whole:
            return [self._whole[piece]]
        known = piece.translate(None, self._missing)
        if not known:
            return []
        return [self._ids[rank] for rank in self._bpe.encode_single_piece(known)]

    def decode(self, ids):
        """Text of `ids`, added tokens included; bytes that are not UTF-8 become U+FFFD. ValueError on an unknown id."""
        return self.decode_bytes(ids).decode(errors="replace")

    def decode_bytes(self, ids):
        """Bytes of `ids`, for streaming: one token may end inside a character. An id between others that stands for
        nothing has none; ValueError on one outside."""
        for id in ids:
            if not 0 <= id < self.vocab_size:
                raise ValueError(f"token id {id} is not in the vocabulary of {self.vocab_size}")
        return b"".join([self._bytes.get(id, b"") for id in ids])


def cut_out(added, text):
    """`text` cut into the `added` tokens, of those that begin at one place the longest, and what is between them."""
    # No text has a lone surrogate; an empty list would be found everywhere.
    return regex.split(r"(\L<added>)", text, added=added or ["\ud800"])


def is_byte_level(token):
    """Is each character of `token` one that stands for a byte?"""
    return BYTE_OF.keys() >= set(token)


def to_bytes(token):
    """Bytes of a vocabulary entry; one with characters outside the byte alphabet stands for itself."""
    if is_byte_level(token):
        return bytes(map(BYTE_OF.get, token))
    return token.encode()


def merge_order(merges, vocab):
    """The entries of the vocabulary that BPE can produce, in the order of their merges; then the single bytes.

    `tokenizers` merges the pairs that the file lists, tiktoken all neighbours that spell an entry. To do the same,
    tiktoken gets only the entries that come out as one token where BPE has nothing else, ranked by their last pair.
    Proof: as long as no token crosses the ends of an entry's place in a text, inside happens what happens to the entry
    alone. So one that alone does not come out is never produced; and of one that does, no neighbours ever spell it but
    its last pair.
    """
    ranks = {}  # of two equal pairs, `tokenizers` takes the later
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
    """What BPE by its definition makes of `entry`, stopped at two parts: a tuple of strings.

    ranks: {(left, right): rank}. The listed pair of the lowest rank is merged, the leftmost of equal ones, and again.
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


def refuse(what):
    """BadInput: a tokenizer that needs `what` would get other ids here than in `tokenizers`."""
    raise BadInput(
        f"{what} is not implemented; use a model with byte-level BPE, such as Llama-3, Qwen, SmolLM2 or GPT-2."
    )


def check_supported(model, normalizer, added):
    """Refuse by name what would change ids and is not implemented."""
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
        for flag in ("lstrip", "rstrip", "single_word"):
            if token.get(flag):
                refuse(f"the flag {flag} of the added token {token['content']!r}")


def pattern_of(pre_tokenizer):
    """The regex whose matches are the pieces that BPE works in."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer]) if pre_tokenizer else []
    names = [step["type"] for step in steps]
    if steps and not steps[-1].get("add_prefix_space", True):
        first = steps[0]
        use_regex = steps[-1].get("use_regex", True)  # GPT-2's, after what the other step does
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
    """Ids that the post-processor prepends to a text, [] if none."""
    ids = []
    steps = post_processor.get("processors", [post_processor]) if post_processor else []
    for step in steps:
        if step["type"] == "TemplateProcessing" and "Sequence" in step["single"][-1]:
            for piece in step["single"][:-1]:  # the last one stands for the text
                ids += step["special_tokens"][piece["SpecialToken"]["id"]]["ids"]
        elif step["type"] != "ByteLevel":  # that one moves offsets only
            refuse(f"the post-processor {step['type']}, with the template it has,")
    return ids
