"""A Hugging Face `tokenizer.json` (byte-level BPE) read into tiktoken: the ids of the `tokenizers` library without it.

Text passes five stages: added tokens are cut out -> NFC (Qwen) -> a regex cuts the rest into pieces -> BPE on the bytes
of each piece -> ids. What would need another stage is refused when the file is read.
"""

import hashlib
import json
import unicodedata
from pathlib import Path

import regex
import tiktoken

from data import BadInput

# The pattern of a plain ByteLevel is GPT-2's. SmolLM2 isolates every digit before it; as one regex, that is DIGITS.
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGITS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"

# A byte-level vocabulary writes each byte as one visible character: itself where it has a shape, else from U+0100 on.
VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTE_OF = {chr(byte): byte for byte in VISIBLE}
for byte in range(256):
    if byte not in VISIBLE:
        BYTE_OF[chr(256 + len(BYTE_OF) - len(VISIBLE))] = byte


class Tokenizer:
    """Text to ids and back.

    vocab_size: highest id + 1, added tokens included.      bos: ids that `encode(bos=True)` prepends, [] if none.
    fingerprint: hash of the file, a key for token caches.  special: added tokens, {text: id}.
    """

    @classmethod
    def from_folder(cls, folder):
        """Read `<folder>/tokenizer.json`. BadInput if it is missing, damaged or needs what is not implemented."""
        path = Path(folder, "tokenizer.json")
        try:
            raw = path.read_bytes()
            return cls(json.loads(raw), hashlib.sha256(raw).hexdigest()[:16])
        except OSError as error:
            raise BadInput(f"{path} cannot be read ({error.strerror}); name a folder with a tokenizer.json.") from None
        except BadInput as error:
            raise BadInput(f"{path}: {error}") from None
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError, regex.error) as error:
            raise BadInput(f"{path} is not a valid tokenizer.json ({error!r}); download it again.") from None

    def __init__(self, file, fingerprint):
        """`file` is the parsed tokenizer.json."""
        model = file["model"]
        vocab = model["vocab"]
        added = file.get("added_tokens") or []
        self._normalizer = file.get("normalizer")  # NFC or None
        check_supported(model, self._normalizer, added)
        self.fingerprint = fingerprint
        self.bos = bos_of(file.get("post_processor"))

        # Added tokens: the regex finds the longest of those that begin at one place.
        self.special = {token["content"]: token["id"] for token in added if token["content"]}
        self._added = regex.compile(r"(\L<added>)", added=list(self.special))

        # BPE. tiktoken numbers the entries by rank: of two possible merges, that with the lower result comes first.
        # `_ids` has the file's own number of each.
        ranks = {}
        self._ids = []
        for token in merge_order(model, self.special):
            ranks[to_bytes(token)] = len(self._ids)
            self._ids.append(vocab[token])
        self._missing = bytes(byte for char, byte in BYTE_OF.items() if char not in vocab)

        # Pieces. tiktoken loses text that no alternative matches; `tokenizers` makes each such run a piece, and so does
        # the second half of our pattern.
        given = pattern_of(file.get("pre_tokenizer"))
        pattern = rf"{given}|(?:(?!{given})(?s:.))+"
        self._pieces = regex.compile(pattern)
        self._bpe = tiktoken.Encoding(fingerprint, pat_str=pattern, mergeable_ranks=ranks, special_tokens={})

        # And back: what each id stands for.
        self._bytes = {id: to_bytes(token) for token, id in vocab.items()}
        for token, id in self.special.items():
            self._bytes[id] = token.encode()
        self.vocab_size = max(self._bytes) + 1

    def encode(self, text, bos=False):
        """Ids of `text`, added tokens in it recognised. `bos` prepends `self.bos`, unless the ids begin with it.

        A lone surrogate counts as U+FFFD. A byte that the vocabulary lacks leaves no id.
        """
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        ids = []
        parts = self._added.split(text) if self.special else [text]
        for part in parts:
            if part in self.special:
                ids.append(self.special[part])
            else:
                ids += self._encode_ordinary(part)
        if bos and ids[: len(self.bos)] != self.bos:
            return self.bos + ids
        return ids

    def _encode_ordinary(self, text):
        """Ids of a text without added tokens."""
        if self._normalizer:
            text = unicodedata.normalize("NFC", text)
        raw = text.encode()
        if raw == raw.translate(None, self._missing):
            ranks = self._bpe.encode_ordinary(text)
        else:
            # tiktoken panics on a missing byte; `tokenizers` drops it after the regex, before BPE: "(\x04)" is "()".
            ranks = []
            for piece in self._pieces.finditer(text):
                known = piece[0].encode().translate(None, self._missing)
                if known:
                    ranks += self._bpe._encode_single_piece(known)
        return [self._ids[rank] for rank in ranks]

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
    if BYTE_OF.keys() >= set(token):
        return bytes(map(BYTE_OF.get, token))
    return token.encode()


def merge_order(model, special):
    """The entries of the vocabulary that BPE can produce, {entry: None}; results of merges first, in their order.

    After them the single bytes, and with `ignore_merges` whatever else stands in the vocabulary: pieces as a whole.
    """
    entries = {}  # a set that keeps its order
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge  # older files have "a b", newer ["a", "b"]
        entries[left + right] = None
    for token in model["vocab"]:
        if token in BYTE_OF or (model.get("ignore_merges") and token not in special):
            entries[token] = None
    if not BYTE_OF.keys() >= set("".join(entries)):
        refuse("a BPE vocabulary that is not byte-level")
    return entries


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
    if normalizer is not None and normalizer["type"] != "NFC":
        refuse(f"the normalizer {normalizer['type']}")
    for token in added:
        for flag in ("lstrip", "rstrip", "single_word", "normalized"):
            # A `normalized` token is looked for in the normalised text, which is the text itself without a normalizer.
            if token.get(flag) and not (flag == "normalized" and normalizer is None):
                refuse(f"the flag {flag} of the added token {token['content']!r}")


def pattern_of(pre_tokenizer):
    """The regex whose matches are the pieces that BPE works in."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer]) if pre_tokenizer else []
    names = [step["type"] for step in steps]
    if names[-1:] == ["ByteLevel"] and not steps[-1].get("add_prefix_space", True):
        first = steps[0]
        use_regex = steps[-1].get("use_regex", True)  # GPT-2's, after what the other step does
        if names == ["ByteLevel"] and use_regex:
            return GPT2
        if names == ["Digits", "ByteLevel"] and use_regex and first["individual_digits"]:
            return DIGITS
        isolated = first.get("behavior") == "Isolated" and not first.get("invert")
        if names == ["Split", "ByteLevel"] and not use_regex and isolated and "Regex" in first["pattern"]:
            return first["pattern"]["Regex"]
    refuse(f"the pre-tokenizer {' + '.join(names) or 'null'}, with the settings it has,")


def bos_of(post_processor):
    """Ids that the post-processor prepends to a text, [] if none."""
    ids = []
    steps = post_processor.get("processors", [post_processor]) if post_processor else []
    for step in steps:
        if step["type"] == "ByteLevel":
            continue  # it moves offsets only
        if step["type"] != "TemplateProcessing" or "Sequence" not in step["single"][-1]:
            refuse(f"the post-processor {step['type']}, with the template it has,")
        for piece in step["single"][:-1]:  # the last one stands for the text
            ids += step["special_tokens"][piece["SpecialToken"]["id"]]["ids"]
    return ids
