"""A Hugging Face `tokenizer.json` (byte-level BPE) read into tiktoken: the ids of the `tokenizers` library without it.

Text passes five stages, each of them one method or table below:
added tokens are cut out -> NFC (Qwen) -> a regex cuts the rest into pieces -> BPE on each piece's bytes -> ids.
"""

import hashlib
import itertools
import json
import re
import unicodedata
from functools import cache, cached_property

import tiktoken

from data import BadInput
from data.download import located

# The pattern of a plain ByteLevel is GPT-2's. SmolLM2 isolates every digit before it; as one regex, that is DIGITS.
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGITS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"

# A byte-level vocabulary writes each byte as one visible character: itself where it has a shape, else from U+0100 on.
VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
HIDDEN = [byte for byte in range(256) if byte not in VISIBLE]
BYTE_OF = {chr(byte): byte for byte in VISIBLE} | {chr(256 + i): byte for i, byte in enumerate(HIDDEN)}


class Tokenizer:
    """Text to ids and back.

    vocab_size: highest id + 1, added tokens included.      bos: ids that `encode(bos=True)` prepends, [] if none.
    fingerprint: hash of the file, a key for token caches.  special: added tokens, {text: id}.
    """

    @classmethod
    def from_folder(cls, folder):
        """Read `<folder>/tokenizer.json`. BadInput if it is missing, damaged or needs what is not implemented."""
        path = located(folder) / "tokenizer.json"
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise BadInput(f"{path} cannot be read ({error.strerror}); name a folder with a tokenizer.json.") from None
        try:
            return cls(json.loads(raw), hashlib.sha256(raw).hexdigest()[:16])
        except BadInput as error:
            raise BadInput(f"{path}: {error}") from None
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise BadInput(f"{path} is not a valid tokenizer.json ({reason}); download it again.") from None

    def __init__(self, file, fingerprint):
        """`file` is the parsed tokenizer.json."""
        model, added = file["model"], file.get("added_tokens") or []
        check_supported(model, file.get("normalizer"), added)
        vocab, self.fingerprint = model["vocab"], fingerprint
        self.special = {token["content"]: token["id"] for token in added if token["content"]}
        longest_first = sorted(self.special, key=len, reverse=True)
        self._added = re.compile("(" + ("|".join(map(re.escape, longest_first)) or "(?!)") + ")")
        self._nfc = file.get("normalizer") is not None
        self.bos = bos_of(file.get("post_processor"))

        # What BPE can produce: single bytes, results of merges and, with ignore_merges, whole pieces that are entries.
        single = [char for char in BYTE_OF if char in vocab]
        merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        merged = list(dict.fromkeys(left + right for left, right in merges))
        known = {*single, *merged, *self.special}
        whole = [token for token in vocab if token not in known] if model.get("ignore_merges") else []
        entries = [*single, *merged, *whole]
        if not BYTE_OF.keys() >= set("".join(entries)):
            refuse("a BPE vocabulary that is not byte-level")
        if all(vocab[a] < vocab[b] for a, b in itertools.pairwise(merged)):
            entries.sort(key=vocab.__getitem__)  # as in every model we know: ids rise in merge order
        self._ids = [vocab[token] for token in entries]  # tiktoken's token is the rank in merge order; this is its id
        ranks = {to_bytes(token): rank for rank, token in enumerate(entries)}

        self._missing = bytes(byte for char, byte in BYTE_OF.items() if char not in vocab)
        pattern = pattern_of(file.get("pre_tokenizer"))
        # tiktoken loses text that no alternative matches; `tokenizers` makes each such run a piece, and so does ours.
        self._pattern = rf"{pattern}|(?:(?!{pattern})(?s:.))+"
        self._bpe = tiktoken.Encoding(fingerprint, pat_str=self._pattern, mergeable_ranks=ranks, special_tokens={})
        self._bytes = {id: to_bytes(token) for token, id in vocab.items()}
        self._bytes |= {id: text.encode() for text, id in self.special.items()}
        self.vocab_size = max(self._bytes) + 1

    def encode(self, text, bos=False):
        """Ids of `text`, added tokens in it recognised. `bos` prepends `self.bos`, unless the ids begin with it.

        A lone surrogate counts as U+FFFD. A byte that the vocabulary lacks leaves no id.
        """
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        ids = []
        for i, part in enumerate(self._added.split(text)):  # ordinary, added, ordinary, ..., ordinary
            ids += [self.special[part]] if i % 2 else self._encode_ordinary(part)
        return self.bos + ids if bos and ids[: len(self.bos)] != self.bos else ids

    def _encode_ordinary(self, text):
        if self._nfc:
            text = unicodedata.normalize("NFC", text)
        raw = text.encode()
        if len(raw.translate(None, self._missing)) == len(raw):
            return [self._ids[rank] for rank in self._bpe.encode_ordinary(text)]
        # tiktoken panics on a missing byte; `tokenizers` drops it after the regex, before BPE: "(\x04)" becomes "()".
        ids = []
        for piece in self._python_pattern.finditer(text):
            if left := piece[0].encode().translate(None, self._missing):
                ids += [self._ids[rank] for rank in self._bpe._encode_single_piece(left)]
        return ids

    @cached_property
    def _python_pattern(self):
        """The same regex for Python's `re`, which lacks \\p{..} and whose \\s has four control characters too many."""
        inside, out = False, []
        for symbol in re.findall(r"(?s)\\p\{\w+\}|\\.|.", self._pattern):
            inside = symbol == "[" or (inside and symbol != "]")
            if symbol == r"\S" and not inside:
                symbol = f"[^{ranges_of('s')}]"
            elif symbol == r"\s" or symbol.startswith(r"\p"):
                name = symbol.strip("\\p{}")
                symbol = ranges_of(name) if inside else f"[{ranges_of(name)}]"
            out.append(symbol)
        try:
            return re.compile("".join(out))
        except re.error as error:
            refuse(f"the pre-tokenizer's regex, for text with bytes that the vocabulary lacks ({error}),")

    def decode(self, ids):
        """Text of `ids`, added tokens included; bytes that are not UTF-8 become U+FFFD. ValueError on an unknown id."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids):
        """Bytes of `ids`, for streaming: one token may end inside a character. ValueError on an unknown id."""
        try:
            return b"".join([self._bytes[id] for id in ids])
        except KeyError as error:
            raise ValueError(f"token id {error} is not in the vocabulary of {self.vocab_size}") from None


def to_bytes(token):
    """Bytes of a vocabulary entry; one with characters outside the byte alphabet stands for itself."""
    return bytes(map(BYTE_OF.get, token)) if BYTE_OF.keys() >= set(token) else token.encode()


@cache
def ranges_of(name):
    """The inside of a character class: Rust's \\s for "s", else the Unicode general category `name`, as in "L"."""
    if name == "s":
        return r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
    member = [False, *(unicodedata.category(chr(code)).startswith(name) for code in range(0x110000)), False]
    edges = [code for code in range(0x110001) if member[code] != member[code + 1]]  # first inside, first outside, ...
    if not edges:
        refuse(f"the regex class {name}, for text with bytes that the vocabulary lacks,")
    return "".join(f"\\U{a:08x}-\\U{b - 1:08x}" for a, b in zip(edges[::2], edges[1::2], strict=True))


def refuse(what):
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
    if normalizer is not None and normalizer["type"] != "NFC":
        refuse(f"the normalizer {normalizer['type']}")
    for token in added:
        for flag in ("lstrip", "rstrip", "single_word", "normalized"):
            if token.get(flag) and not (flag == "normalized" and normalizer is None):
                refuse(f"the flag {flag} of the added token {token['content']!r}")


def pattern_of(pre_tokenizer):
    """The regex whose matches are the pieces that BPE works in."""
    parts = pre_tokenizer.get("pretokenizers", [pre_tokenizer]) if pre_tokenizer else []
    names = [part["type"] for part in parts]
    if names[-1:] == ["ByteLevel"] and not parts[-1].get("add_prefix_space", True):
        first, regex = parts[0], parts[-1].get("use_regex", True)
        if names == ["ByteLevel"] and regex:
            return GPT2
        if names == ["Digits", "ByteLevel"] and regex and first["individual_digits"]:
            return DIGITS
        isolated = first.get("behavior") == "Isolated" and not first.get("invert")
        if names == ["Split", "ByteLevel"] and not regex and isolated and "Regex" in first["pattern"]:
            return first["pattern"]["Regex"]
    refuse(f"the pre-tokenizer {' + '.join(names) or 'null'}, with the settings it has,")


def bos_of(post_processor):
    """Ids that the post-processor prepends to a text, [] if none."""
    ids = []
    for step in post_processor.get("processors", [post_processor]) if post_processor else []:
        if step["type"] == "ByteLevel":
            continue  # ByteLevel moves offsets only
        if step["type"] != "TemplateProcessing" or "Sequence" not in step["single"][-1]:
            refuse(f"the post-processor {step['type']}, with the template it has,")
        for piece in step["single"][:-1]:
            ids += step["special_tokens"][piece["SpecialToken"]["id"]]["ids"]
    return ids
