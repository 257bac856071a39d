"""data/tokenizer.py against the `tokenizers` library, on real text in six languages and on text meant to hurt."""

import functools
import json
import os
import random
import string
from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, processors, trainers

from data import BadInput
from data.tokenizer import Tokenizer, to_bytes

ROOT = Path(__file__).parent.parent
LANGUAGES = ["english", "spanish", "french", "german", "italian", "portuguese"]
STYLES = ["smollm2", "llama3", "qwen", "gpt2", "shuffled", "unreached", "whole"]

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = LLAMA3.replace("{1,3}", "")

NASTY = [
    "", " ", "\n", "\t", "  \n\n  \t \r\n \r x", "a  b   c    d", "   lead", "trail   ", "1 2  3   4\n5\t6",
    "x \n 7", "1234567890", "12 345.678,90 0x1F", "٣٤٥ ½ Ⅷ ² ① 一二三 १२३", "a1b22c333d4444", "a" * 23,
    "=" * 77, " " * 300 + "x", "I'm you're he'll we've it's can't she'd",
    "I'M YOU'RE HE'LL WE'VE IT'S CAN'T SHE'D", "x'This y'Debian 'There z'Server",
    "'S'T'rE'Ve x'ſ y'K 's ''s ' s",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f44d\U0001f3fd \U0001f1e9\U0001f1ea \u2764\ufe0f",
    "\U0001f3f4\U000e0067\U000e0062\U000e007f", "e\u0301 \u00e9 n\u0303 \u00f1 A\u030a \u212b \u0301alone",
    "\u1e9b\u0323 ﬁ Ω", "한국어 \u1112\u1161\u11ab", "汉字和かな、カタカナ。", "مَرْحَبًا بِالعَالَم ١٢٣",
    "שָׁלוֹם", "नमस्ते दुनिया", "Привет, мир!", "ภาษาไทย", "Zażółć gęślą jaźń",
    "\x00\x01\x02\x03\x04\x05\x06\x07\x08\x0b\x0c\x0e\x13\x14\x16\x1b\x7f", "a\x04b", "(\x04)", ".\x04.\x06.",
    " \x04\x04..", "x\x1dy \x1d z\x1d\x1d\n", "\x1c\x1c a \x1e\x1f", "the\x04 \x04the", "1\x041", "'\x04s",
    "\n\x04\n", " \x04 ", "\x04", "\u2028\n\x85\r\n\xa0x",
    "\x85 \xa0 \xad\u1680\u180e\u2000\u200a\u200b\u200d\u2028\u2029\u202f\u205f\u2060\u3000\ufeff a",
    "\U00040000 \U000f0000x \U0010ffff", "\ufffd\ufffe\uffff\ue000", "𝕳𝖊𝖑𝖑𝖔 𝟙𝟚 𐍈 𒀀", "ǅ ʰ ª º ǃ",
    "\u0378\u0e3f\u20bf", "def f(x):\n\treturn x**2  # hi\n\n\n    pass\r\n", "https://a.b/c?d=e&f=%20#g",
    "<|im_start|>user\nhi<|im_end|>\n", "<|endoftext|>", "a <|im_start|> b<|im_start|><|im_start|>",
    "<|im_start", "<|begin_of_text|>x<|eot|>", "<|eot|>er <|eot|>er<|eot|>", "<tool_call> {}</tool_call>",
    " <|endoftext|>  \n<|endoftext|> 's", "e<|im_end|>\u0301", "zqj zqj  zqj azqj zqjb zqjjq", "  zqj\nzqj",
]  # fmt: skip


@functools.cache
def paragraphs(per_language=900):
    """The first paragraphs of each language; 5,000 at least."""
    texts = []
    for language in LANGUAGES:
        lines = (ROOT / f"data/handbook/{language}.txt").read_text(encoding="utf-8").splitlines()
        texts += [line for line in lines if line.strip()][:per_language]
    assert len(texts) >= 5000
    return texts


def hostile(count=3000):
    """Short random strings over characters that meet badly."""
    rng = random.Random(0)
    alphabet = (
        " " * 6 + "\n\n\r\t''sStlLeEvdm019.,(!=<|>\x04\x1d\x1c\x85\xa0\u3000\u0301ſéñ½²ßΩя汉가ع👍\u200d\ufe0f\U000f0000"
    )
    return ["".join(rng.choices(alphabet, k=rng.randint(1, 14))) for _ in range(count)]


def split(regex):
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(regex), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def train(pre_tokenizer, alphabet, normalizer=None, special=(), size=3000, texts=None):
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    if normalizer:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, special_tokens=list(special), show_progress=False
    )
    tokenizer.train_from_iterator(texts or paragraphs()[::12], trainer)
    return tokenizer


def all_splits(vocab):
    """Merges as Llama-3's file has them: every pair of entries that spells an entry, in the order of its id."""
    by_id = sorted(vocab, key=vocab.__getitem__)
    return [[t[:i], t[i:]] for t in by_id for i in range(1, len(t)) if t[:i] in vocab and t[i:] in vocab]


def with_bos(file):
    """Llama-3's added tokens and template."""
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(file))
    tokenizer.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>", "<|eot|>", "<|eot|>er"])
    bos = ("<|begin_of_text|>", tokenizer.token_to_id("<|begin_of_text|>"))
    template = processors.TemplateProcessing(single="<|begin_of_text|> $A", pair=None, special_tokens=[bos])
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    # The library writes merges as pairs; Llama-3's file has strings.
    return json.loads(tokenizer.to_str()) | {"model": file["model"]}


def add_unreached(file):
    """The file with three more entries, which no merge spells."""
    vocab = file["model"]["vocab"]
    more = {token: len(vocab) + i for i, token in enumerate(["zqj", "Ġzqj", "Ġzqjjq"])}
    return file | {"model": file["model"] | {"vocab": vocab | more}}


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """{style: folder with a tokenizer.json}: the three real styles, GPT-2's, and three with awkward numbering."""
    every_byte = pre_tokenizers.ByteLevel.alphabet()
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    files = {}

    digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain])
    smollm2 = train(digits, [], special=["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    files["smollm2"] = json.loads(smollm2.to_str())

    llama3 = json.loads(train(split(LLAMA3), every_byte).to_str())
    llama3["model"]["ignore_merges"] = True
    llama3["model"]["merges"] = [" ".join(merge) for merge in all_splits(llama3["model"]["vocab"])]
    files["llama3"] = with_bos(llama3)

    qwen = train(split(QWEN), every_byte, normalizers.NFC())
    qwen.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    qwen.add_tokens([AddedToken(text, normalized=False) for text in ("<tool_call>", "</tool_call>")])
    qwen.post_processor = processors.ByteLevel(trim_offsets=False)
    files["qwen"] = json.loads(qwen.to_str())

    gpt2 = train(plain, every_byte, size=2000)
    gpt2.add_special_tokens([AddedToken("<|endoftext|>", normalized=True)])
    files["gpt2"] = json.loads(gpt2.to_str())

    # Ids in no order at all: only the order of the merges says what merges first.
    shuffled = json.loads(gpt2.to_str())
    vocab = shuffled["model"]["vocab"]
    ids = random.Random(1).sample(range(len(vocab)), len(vocab))
    shuffled["model"]["vocab"] = dict(zip(vocab, ids, strict=True))
    files["shuffled"] = shuffled

    # Entries that no merge reaches: with ignore_merges they count as whole pieces, without it not at all.
    files["whole"] = with_bos(add_unreached(llama3))
    files["unreached"] = add_unreached(json.loads(train(plain, every_byte, size=2000).to_str()))

    folders = {}
    for style, file in files.items():
        folders[style] = tmp_path_factory.mktemp(style)
        (folders[style] / "tokenizer.json").write_text(json.dumps(file), encoding="utf-8")
    return folders


def pair(folder):
    return Tokenizer.from_folder(folder), tokenizers.Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))


def assert_same(folder, texts):
    ours, oracle = pair(folder)
    expected = oracle.encode_batch(texts, add_special_tokens=False)
    wrong = [(t, ids, e.ids) for t, e in zip(texts, expected, strict=True) if (ids := ours.encode(t)) != e.ids]
    assert not wrong, f"{len(wrong)} of {len(texts)} differ, the first: {min(wrong, key=lambda w: len(w[0]))}"


def real_smollm2():
    folder = os.environ.get("KOFF_SMOLLM2")
    return folder or pytest.skip("KOFF_SMOLLM2 does not name a folder with the real SmolLM2")


def base_model():
    folder = ROOT / "data/base"
    return (
        folder if (folder / "tokenizer.json").exists() else pytest.skip(f"{folder}/tokenizer.json does not exist yet")
    )


@pytest.mark.parametrize("style", STYLES)
def test_ids_equal_tokenizers(trained, style):
    real = paragraphs() if style in ("smollm2", "llama3", "qwen") else paragraphs()[::5]
    assert_same(trained[style], real + NASTY + hostile())


@pytest.mark.parametrize("folder", [real_smollm2, base_model])
def test_ids_equal_tokenizers_on_a_real_file(folder):
    assert_same(folder(), paragraphs() + NASTY + hostile())


def test_transformers_reads_the_tokenizer_of_the_base_model_as_we_do():
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(base_model())
    ours = Tokenizer.from_folder(base_model())
    rows = json.loads((base_model() / "config.json").read_text())["vocab_size"]
    assert len(theirs) == ours.vocab_size == rows  # no id beyond the embedding
    assert [theirs.eos_token_id] == ours.encode("<|endoftext|>")
    for text in [*paragraphs()[::20], "a , b . c <|endoftext|> don 't", "<s></s><unk><pad>"]:
        ids = ours.encode(text)
        assert theirs.encode(text) == ids and theirs.decode(ids) == text


@pytest.mark.parametrize("style", ["smollm2", "llama3", "qwen"])
def test_one_long_text(trained, style):
    assert_same(
        trained[style], ["\n\n".join(paragraphs())[:1_500_000], "\n\n".join([*paragraphs(), "(\x04)"])[-200_000:]]
    )


def test_the_fixtures_have_what_they_are_for(trained):
    files = {style: json.loads((folder / "tokenizer.json").read_text()) for style, folder in trained.items()}
    missing = Tokenizer.from_folder(trained["smollm2"])._missing
    assert b"\x04" in missing and "汉".encode()[0] in missing
    merged = {
        s: [f["model"]["vocab"]["".join(m).replace(" ", "")] for m in f["model"]["merges"]] for s, f in files.items()
    }
    assert all((merged[style] == sorted(merged[style])) == (style != "shuffled") for style in STYLES)
    assert len(merged["llama3"]) > len(set(merged["llama3"]))  # several merges per entry, as in the real file
    assert isinstance(files["llama3"]["model"]["merges"][0], str) and isinstance(
        files["qwen"]["model"]["merges"][0], list
    )
    assert len(Tokenizer.from_folder(trained["whole"]).encode(" zqj")) == 1
    assert len(Tokenizer.from_folder(trained["unreached"]).encode(" zqj")) > 1


def test_a_missing_byte_is_dropped_before_bpe(trained):
    ours = Tokenizer.from_folder(trained["smollm2"])
    vocab = json.loads((trained["smollm2"] / "tokenizer.json").read_text())["model"]["vocab"]
    a, b = next(token for token in vocab if len(token) == 2 and set(token) <= set(string.punctuation))
    assert ours.encode(f"{a}\x04{b}") == [vocab[a + b]]
    letter = next(
        c for c in map(chr, range(0x10000, 0x30000)) if c.isalpha() and not c.encode().translate(None, ours._missing)
    )
    assert ours.encode(f" t{letter}he") == ours.encode(" the") != ours.encode(" t") + ours.encode("he")
    assert ours.encode("th\x04e") == ours.encode("th") + ours.encode("e") != ours.encode("the")


@pytest.mark.parametrize(
    "regex", [r"\p{Han}|\S+|\s+", r"\P{L}|\S", r"[^\S\n]+|\p{Lu}?\p{Ll}++|(?>\p{M}*)(?i:K|s)|\p{P}"]
)
def test_any_regex_drops_a_missing_byte(trained, tmp_path, regex):
    file = json.loads((trained["smollm2"] / "tokenizer.json").read_text())
    file["pre_tokenizer"] = sequence(SPLIT | {"pattern": {"Regex": regex}}, BYTES | {"trim_offsets": True})
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    assert b"\x04" in Tokenizer.from_folder(tmp_path)._missing
    assert_same(tmp_path, paragraphs()[:300] + NASTY + hostile(500))


def test_a_regex_that_nobody_can_read_is_refused(trained, tmp_path):
    for pattern in (r"\p{Nonsense}|\S", r"(\S|", r"\p{L}{2,1}"):
        file = json.loads((trained["qwen"] / "tokenizer.json").read_text())
        file["pre_tokenizer"] = sequence(SPLIT | {"pattern": {"Regex": pattern}}, BYTES)
        (tmp_path / "tokenizer.json").write_text(json.dumps(file))
        with pytest.raises(BadInput, match=r"is not a valid tokenizer\.json"):
            Tokenizer.from_folder(tmp_path)


def test_the_longest_added_token_counts(trained, tmp_path):
    """Added tokens that begin alike, one within another, and a file without any."""
    for contents in (["<a>", "<a><b>", "<a", "b>", "(?!)", "é<", "<a><b><c>"], ["<q", "<qq", "<qqq"], []):
        file = json.loads((trained["gpt2"] / "tokenizer.json").read_text())
        first = len(file["model"]["vocab"])
        file["added_tokens"] = [
            {"id": first + i, "content": content, "special": True, "normalized": False, "single_word": False,
             "lstrip": False, "rstrip": False} for i, content in enumerate(contents)
        ]  # fmt: skip
        (tmp_path / "tokenizer.json").write_text(json.dumps(file))
        rng = random.Random(0)
        texts = ["".join(rng.choices([*"<>abcq(?!)é ", "<a>", "<b>"], k=rng.randint(0, 20))) for _ in range(500)]
        assert_same(tmp_path, texts)


def test_a_regex_with_gaps_loses_no_text(trained, tmp_path):
    file = json.loads((trained["qwen"] / "tokenizer.json").read_text())
    file["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\p{L}+|\p{N}"
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    assert_same(tmp_path, paragraphs()[:300] + NASTY + hostile(500))


@pytest.mark.parametrize("style", STYLES)
def test_bos_is_what_the_post_processor_says_and_never_twice(trained, style):
    ours, oracle = pair(trained[style])
    assert len(ours.bos) == (style in ("llama3", "whole"))
    for text in ("", "Hello", " 12"):
        assert ours.encode(text, bos=True) == oracle.encode(text).ids == ours.bos + ours.encode(text)
    if ours.bos:
        assert ours.encode("<|begin_of_text|>Hello", bos=True) == ours.encode("Hello", bos=True)


@pytest.mark.parametrize("style", ["llama3", "gpt2", "shuffled", "unreached", "whole"])
def test_decode_is_the_inverse(trained, style):
    ours, oracle = pair(trained[style])
    for text in paragraphs()[::40] + NASTY:
        ids = ours.encode(text)
        assert ours.decode(ids) == text == b"".join(ours.decode_bytes([id]) for id in ids).decode()
        assert ours.decode(ids) == oracle.decode(ids, skip_special_tokens=False)


def test_decode_of_part_of_a_character(trained):
    ours = Tokenizer.from_folder(trained["llama3"])
    ids = ours.encode("汉")
    assert len(ids) > 1 and ours.decode(ids[:1]) == "\ufffd" and ours.decode([]) == ""


@pytest.mark.parametrize("style", STYLES)
def test_sizes_and_unknown_ids(trained, style):
    ours, oracle = pair(trained[style])
    vocab = oracle.get_vocab(with_added_tokens=True)
    assert ours.vocab_size == max(vocab.values()) + 1
    assert ours._raw | ours._normalized == {t.content: id for id, t in oracle.get_added_tokens_decoder().items()}
    for id in (-1, ours.vocab_size, 10**12):
        with pytest.raises(ValueError, match=f"{id} is not in the vocabulary"):
            ours.decode([id])


def test_fingerprint_is_of_the_file(trained):
    prints = {style: Tokenizer.from_folder(folder).fingerprint for style, folder in trained.items()}
    assert len(set(prints.values())) == len(STYLES) and all(int(value, 16) for value in prints.values())
    assert prints["qwen"] == Tokenizer.from_folder(trained["qwen"]).fingerprint


def test_a_lone_surrogate_is_the_replacement_character(trained):
    for style in ("smollm2", "qwen"):
        ours = Tokenizer.from_folder(trained[style])
        assert ours.encode("a\ud83d b\x04") == ours.encode("a\ufffd b\x04")


SPLIT = {"type": "Split", "pattern": {"Regex": r"\s"}, "behavior": "Isolated", "invert": False}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
FLAGGED = {"id": 9, "content": "<x>", "special": True}
EOS = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}


def sequence(*parts):
    return {"type": "Sequence", "pretokenizers": list(parts)}


REFUSED = [
    ("byte_fallback", {"model": {"byte_fallback": True}}),
    ("Unigram", {"model": {"type": "Unigram"}}),
    ("WordPiece", {"model": {"type": "WordPiece"}}),
    ("unk_token='<unk>'", {"model": {"unk_token": "<unk>"}}),
    ("dropout=0.1", {"model": {"dropout": 0.1}}),
    ("end_of_word_suffix", {"model": {"end_of_word_suffix": "</w>"}}),
    ("normalizer NFKC", {"normalizer": {"type": "NFKC"}}),
    ("normalizer Sequence", {"normalizer": {"type": "Sequence", "normalizers": []}}),
    ("pre-tokenizer null", {"pre_tokenizer": None}),
    ("Metaspace", {"pre_tokenizer": {"type": "Metaspace"}}),
    ("Split + Split + ByteLevel", {"pre_tokenizer": sequence(SPLIT, SPLIT, BYTES)}),
    ("Split + ByteLevel", {"pre_tokenizer": sequence(SPLIT | {"invert": True}, BYTES)}),
    ("Split + ByteLevel", {"pre_tokenizer": sequence(SPLIT | {"behavior": "Removed"}, BYTES)}),
    ("Split + ByteLevel", {"pre_tokenizer": sequence(SPLIT, BYTES | {"use_regex": True})}),
    ("pre-tokenizer ByteLevel", {"pre_tokenizer": BYTES | {"use_regex": True, "add_prefix_space": True}}),
    ("RobertaProcessing", {"post_processor": {"type": "RobertaProcessing"}}),
    ("TemplateProcessing", {"post_processor": {"type": "TemplateProcessing", "single": [EOS]}}),
    ("lstrip of the added token '<x>'", {"added_tokens": [FLAGGED | {"lstrip": True}]}),
    ("rstrip", {"added_tokens": [FLAGGED | {"rstrip": True}]}),
    ("single_word", {"added_tokens": [FLAGGED | {"single_word": True}]}),
    ("an empty text", {"pre_tokenizer": sequence(SPLIT | {"pattern": {"Regex": r"\s*|x"}}, BYTES)}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change"), REFUSED, ids=[f"{i}-{name}" for i, (name, _) in enumerate(REFUSED)])
def test_what_is_not_implemented_is_refused_by_name(trained, tmp_path, name, change):
    file = json.loads((trained["qwen"] / "tokenizer.json").read_text())
    file |= change | {"model": file["model"] | change.get("model", {})}
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    with pytest.raises(BadInput) as error:
        Tokenizer.from_folder(tmp_path)
    message = str(error.value)
    assert name in message and str(tmp_path / "tokenizer.json") in message and "use a model with" in message


EDITS = ["plain", "extended", "shuffled", "removed", "whole", "splits"]


def extended(model, other):
    """`model` with the entries and merges that `other` has more: a vocabulary edited for a second language."""
    vocab, merges = dict(model["vocab"]), [tuple(merge) for merge in model["merges"]]
    for left, right in other["merges"]:
        for token in (left, right, left + right):
            vocab.setdefault(token, len(vocab))
        merges.append((left, right))  # many twice, and of these the second counts
    return model | {"vocab": vocab, "merges": merges}


def edited(model, other, edit, rng):
    if edit == "plain":
        return model
    model = extended(model, other)
    merges = model["merges"]
    if edit == "shuffled":
        merges = rng.sample(merges, len(merges))
    if edit in ("removed", "whole"):
        merges = rng.sample(merges, len(merges) * 2 // 3)
    if edit == "splits":
        merges = [" ".join(merge) for merge in all_splits(model["vocab"])]
    # With `ignore_merges`, what is no longer reached is still an entry: "whole" has many that end in two tokens.
    return model | {"merges": merges, "ignore_merges": edit in ("whole", "splits")}


def add_tokens(file, nfc):
    """Added tokens that hold each other, that the vocabulary has, that NFC changes, for the raw text and the other."""
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(file))
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_special_tokens(["<|end|>", "<|end|>er", "é", "Ġde"])
    tokenizer.add_tokens([AddedToken(t) for t in ("<new>", "e\u0301<", "the<|end|>", "ion", "n\u0303o", "\u0301!")])
    return json.loads(tokenizer.to_str()) | {"model": file["model"]}


@pytest.fixture(scope="session")
def thirty():
    """{name: tokenizer.json}: six edits for each of four regexes, and six that are to be refused."""
    every_byte = pre_tokenizers.ByteLevel.alphabet()
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain])
    cutters = {"gpt2": plain, "llama3": split(LLAMA3), "qwen": split(QWEN), "smollm2": digits}
    rng = random.Random(0)
    files = {}
    for number, (name, cutter) in enumerate(cutters.items()):
        alphabet = [] if name == "smollm2" else every_byte
        models = []
        for first in (number, number + 2):
            language = paragraphs()[900 * first : 900 * first + 300]
            models.append(json.loads(train(cutter, alphabet, size=1500, texts=language).to_str()))
        file, other = models
        for edit in EDITS:
            model = edited(file["model"], other["model"], edit, rng)
            files[f"{name} {edit}"] = add_tokens(file | {"model": model}, nfc=len(files) % 2)
    file = files["qwen plain"]
    token = file["added_tokens"][-1]
    for flag in ("lstrip", "rstrip", "single_word"):
        files[f"refused {flag}"] = file | {"added_tokens": [*file["added_tokens"][:-1], token | {flag: True}]}
    for regex in (r"\s*|x", r"^\p{L}+|\s"):
        files[f"refused {regex}"] = file | {"pre_tokenizer": sequence(SPLIT | {"pattern": {"Regex": regex}}, BYTES)}
    vocab = file["model"]["vocab"] | {"twice": 7}
    files["refused id"] = file | {"model": file["model"] | {"vocab": vocab}}
    return files


def two_thousand():
    """Short texts: cuts of the handbook, and joints of characters, words and added tokens that meet badly."""
    rng = random.Random(0)
    book = "\n".join(paragraphs())
    planes = [range(0x20, 0x7F), range(0xA0, 0x600), range(0x600, 0xD800), range(0xE000, 0x110000)]
    texts = []
    while len(texts) < 2000:
        start = rng.randrange(len(book))
        cut = book[start : start + rng.randint(1, 60)]
        strange = "".join(chr(rng.choice(rng.choice(planes))) for _ in range(rng.randint(0, 5)))
        added = rng.choice(
            ["<|end|>", "<new>", "<|end|>er", "the<|end|>", "e\u0301<", "é<", "\u0301!", "ion", "n\u0303o", "Ġde"]
        )
        parts = [
            cut,
            strange,
            added,
            rng.choice(NASTY),
            " " * rng.randint(0, 3),
            rng.choice(["e", "n", "\u0301", "12"]),
        ]
        texts.append("".join(rng.sample(parts, rng.randint(1, 6))))
    return texts


def test_thirty_tokenizers_give_the_same_ids_or_are_refused(thirty):
    assert len(thirty) == 30
    texts = two_thousand()
    refused = []
    for name, file in thirty.items():
        try:
            ours = Tokenizer(file, name)
        except BadInput:
            refused.append(name)
            continue
        oracle = tokenizers.Tokenizer.from_str(json.dumps(file))
        for text, expected in zip(texts, oracle.encode_batch(texts, add_special_tokens=False), strict=True):
            assert ours.encode(text) == expected.ids, (name, text)
        for id in oracle.get_vocab().values():
            ours.decode([id])
    assert refused == [name for name in thirty if name.startswith("refused")]


def test_a_missing_file(tmp_path):
    with pytest.raises(BadInput, match=r"tokenizer.json cannot be read .*name a folder"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    "damaged",
    [b"", b"{", b"\xff\xfe{}", b"[]", b"null", b"{}", b'{"model": {"type": "BPE"}}', b"[" * 100_000,
     b'{"model": {"vocab": {"a": 0}, "merges": [1]}}'],
)  # fmt: skip
def test_a_damaged_file(tmp_path, damaged):
    (tmp_path / "tokenizer.json").write_bytes(damaged)
    with pytest.raises(BadInput, match=r"is not a valid tokenizer.json"):
        Tokenizer.from_folder(tmp_path)


def nodes(value, path=()):
    """The path of everything in a JSON value."""
    yield path
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from nodes(value[key], (*path, key))


def test_absurd_values_end_in_a_sentence(tmp_path):
    """Each node of a small file, each absurd value: BadInput, or a tokenizer that encodes; never another exception."""
    vocab = {char: id for id, char in enumerate(["a", "b", "Ġ", "ab"])}
    template = {"type": "TemplateProcessing", "single": [EOS, {"Sequence": {"id": "A", "type_id": 0}}],
                "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [4], "tokens": ["<|endoftext|>"]}}}  # fmt: skip
    file = {
        "added_tokens": [{"id": 4, "content": "<|endoftext|>", "special": True, "normalized": True}],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": sequence(SPLIT, BYTES),
        "post_processor": template,
        "model": {"type": "BPE", "ignore_merges": True, "vocab": vocab, "merges": [["a", "b"]]},
    }
    deep = functools.reduce(lambda inside, _: [inside], range(400), "x")
    read = 0
    for path in list(nodes(file)):
        for absurd in (
            None,
            True,
            -1,
            1.5,
            10**30,
            float("nan"),
            "",
            "x",
            "\ud800",
            [],
            ["x"],
            [[]],
            {},
            {"x": "x"},
            deep,
        ):
            damaged = json.loads(json.dumps({"file": file}))
            inner = functools.reduce(lambda part, key: part[key], ("file", *path)[:-1], damaged)
            inner[("file", *path)[-1]] = absurd
            (tmp_path / "tokenizer.json").write_text(json.dumps(damaged["file"]))
            try:
                tokenizer = Tokenizer.from_folder(tmp_path)
            except BadInput as error:
                assert len(str(error)) < 1500
                continue
            assert tokenizer.decode(tokenizer.encode("ab a", bos=True)).endswith("ab a"), (path, absurd)
            read += 1
    assert read > 100


def test_what_is_wrong_with_a_vocabulary_is_said():
    for change, message in (
        ({"merges": [["a", "c"]]}, "the merge 'a' \\+ 'c' is not in the vocabulary"),
        ({"vocab": {"a": 0, "b": 0}}, "two entries of the vocabulary have one id"),
    ):
        model = {"vocab": {"a": 0, "b": 1}, "merges": []} | change
        with pytest.raises(BadInput, match=message):
            Tokenizer({"model": model, "pre_tokenizer": sequence(SPLIT, BYTES)}, "x")


def test_a_token_that_takes_hours_to_read_is_refused_and_an_id_that_is_none_writes_nothing():
    sizes = [2**n for n in range(14)]
    vocab = {"a" * size: number for number, size in enumerate(sizes)}
    merges = [["a" * size, "a" * size] for size in sizes[:-1]]
    with pytest.raises(BadInput, match="more than 1024 characters"):
        Tokenizer({"model": {"vocab": vocab, "merges": merges}, "pre_tokenizer": sequence(SPLIT, BYTES)}, "x")
    model = {"vocab": {"a": 0, "b": 5}, "merges": []}
    assert Tokenizer({"model": model, "pre_tokenizer": sequence(SPLIT, BYTES)}, "x").decode([0, 3, 5]) == "ab"


def token(content, id, normalized=False):
    return {"id": id, "content": content, "normalized": normalized, "special": False, "single_word": False,
            "lstrip": False, "rstrip": False}  # fmt: skip


ODD = {
    "wrong id": {"added_tokens": [token("<x>", 77), token("ab", 50)]},
    "empty": {"added_tokens": [token("", 6), token("<x>", 7)]},
    "twice": {"added_tokens": [token("é", 6), token("<x>", 7), token("é", 6, normalized=True)]},
    "no bytes": {"model": {"vocab": {"▁": 6}, "merges": [], "ignore_merges": True}},
    "no byte merged": {"model": {"vocab": {"▁": 6, "âĸģ": 7, "â": 8, "ĸ": 9, "ģ": 10, "âĸ": 11, "a▁": 12},
                                 "merges": [["â", "ĸ"], ["âĸ", "ģ"], ["a", "▁"]]}},
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_odd_files_count_as_in_tokenizers(name):
    model = {
        "type": "BPE",
        "vocab": {char: id for id, char in enumerate(["a", "b", "Ġ", "ab", "Ã", "©"])},
        "merges": [],
    }
    change = ODD[name].get("model", {})
    model |= change | {"vocab": model["vocab"] | change.get("vocab", {})}
    file = {"normalizer": {"type": "NFC"}, "pre_tokenizer": sequence(SPLIT, BYTES | {"trim_offsets": True})}
    file = {"version": "1.0", "added_tokens": []} | file | ODD[name] | {"model": model}
    oracle = tokenizers.Tokenizer.from_str(json.dumps(file))
    rng = random.Random(0)
    texts = ["".join(rng.choices(["a", "b", " ", "<x>", "é", "e\u0301", "▁"], k=rng.randint(1, 5))) for _ in range(300)]
    ours = Tokenizer(file, name)
    for text in texts:
        assert ours.encode(text) == oracle.encode(text).ids, text


def test_an_added_token_is_decoded_as_it_is_written():
    file = {"model": {"vocab": {"a": 0}, "merges": []}, "pre_tokenizer": sequence(SPLIT, BYTES)}
    ours = Tokenizer(file | {"added_tokens": [token("<señor>", 1)]}, "x")
    assert ours.decode(ours.encode("a<señor>a")) == "a<señor>a"


@pytest.mark.parametrize("id", [1.5, -1, 2**32, None, "7"])
def test_an_id_is_a_whole_number(tmp_path, id):
    file = {"model": {"vocab": {"a": 0, "b": id}, "merges": []}, "pre_tokenizer": sequence(SPLIT, BYTES)}
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    with pytest.raises(BadInput, match=r"is not a valid tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("style", ["smollm2", "llama3"])
def test_a_million_of_one_character(trained, style):
    """tiktoken's own regex panics on some of these."""
    assert_same(trained[style], [" " * 10**6, " " * 10**6 + "x", "\n" * 10**6 + "x", "a" * 10**6, "\x04" * 10**6])


def test_a_million_that_no_alternative_matches(trained, tmp_path):
    file = json.loads((trained["qwen"] / "tokenizer.json").read_text())
    file["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\p{L}+|\p{N}"
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    assert_same(tmp_path, [" " * 10**6, "= " * 500_000 + "x"])


def test_characters_that_unicode_has_had_since(trained):
    """`regex` may be newer than the Unicode of `tokenizers`: to one a letter, to the other no character."""
    since = [chr(code) for code in (0x88F, 0xC5C, 0xA7CE, 0x16EA0, 0x1E6C0, 0x323B0, 0x33479)]
    for style in ("smollm2", "llama3", "gpt2"):
        assert_same(trained[style], [before + char + after for char in since for before in "a 1!" for after in "a 1!"])


def test_a_vocabulary_entry_outside_the_byte_alphabet_stands_for_itself():
    assert to_bytes("Ġa") == b" a" and to_bytes("▁a") == "▁a".encode()
