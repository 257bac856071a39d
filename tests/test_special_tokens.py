"""The files beside a tokenizer.json (data/special_tokens.py), against AutoTokenizer of transformers.

KOFF_TRANSFORMERS_4 may name a folder that `pip install --target` filled with transformers 4.57: an older generation.
"""

import contextlib
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from tokenizers import normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer

from conftest import random_model
from data import BadInput
from data.chat_template import ChatTemplate
from data.checkpoint import save_backbone
from data.corpus import load_text
from data.export import name_tokenizer_class
from data.special_tokens import FILES
from data.tokenizer import Tokenizer
from test_tokenizer import NASTY, QWEN, split, train

ROOT = Path(__file__).parent.parent
FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
TEXTS = [
    *NASTY, "<|user|>Guten Tag<|stop|>", "a <|im_end|> b", "the cat   sat 2024 the", "<s>hi</s> <|endoftext|>x", "a<|begin|>b",
    "# Title\n\n\n  code(x)\t\t12.5%\n\n- a  b", "<|a|><|b|><|c|><|d|><|e|> <|a|>", "x<|caf\u00e9|> <|cafe\u0301|>y",
]  # fmt: skip


def token(content, **flags):
    return {"content": content, "lstrip": False, "rstrip": False, "single_word": False, "normalized": False,
            "special": True, **flags}  # fmt: skip


@functools.cache
def bases():
    """{style: a parsed tokenizer.json}."""
    every_byte = pre_tokenizers.ByteLevel.alphabet()
    digits = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    smollm2 = train(pre_tokenizers.Sequence(digits), [], special=["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    smollm2.post_processor = processors.ByteLevel(trim_offsets=False)
    qwen = train(split(QWEN), every_byte, normalizers.NFC())
    qwen.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    bare = train(split(QWEN), every_byte)
    bare.add_special_tokens(["<|begin|>"])
    return {"smollm2": json.loads(smollm2.to_str()), "qwen": json.loads(qwen.to_str()),
            "bare": json.loads(bare.to_str())}  # fmt: skip


def cases():
    """{name: (style, model_type, {file: content})}: files present or absent, tokens, classes, flags."""
    found = {}
    file = bases()["smollm2"]
    decoder = {str(one["id"]): {k: v for k, v in one.items() if k != "id"} for one in file["added_tokens"]}
    next_id = len(file["model"]["vocab"])
    user = "<|user|>"

    def case(name, config=None, names=None, ids=None, style="smollm2", kind="llama"):
        files = {"tokenizer_config.json": config, "special_tokens_map.json": names, "added_tokens.json": ids}
        found[name] = style, kind, {path: content for path, content in files.items() if content is not None}

    for style in bases():
        case(f"{style}: alone", style=style)
        case(f"{style}: a class that reads the file", FAST, style=style)
        case(f"{style}: class Llama", {"tokenizer_class": "LlamaTokenizerFast"}, style=style)
        case(f"{style}: an end of its own", FAST | {"eos_token": "<|stop|>"}, style=style)
        case(f"{style}: asks for bos", FAST | {"add_bos_token": True, "bos_token": "<|begin|>"}, style=style)
    for kind in "qwen2", "qwen3", "olmo2", "mistral":
        case(f"no config, {kind}", style="qwen", kind=kind)
        case(f"no class, {kind}", {"model_max_length": 5}, style="qwen", kind=kind)
    for name in "Qwen2Tokenizer", "Qwen2TokenizerFast":
        case(f"class {name}", {"tokenizer_class": name}, style="qwen")
    case("decoder, the same", FAST | {"added_tokens_decoder": decoder})
    case("decoder, one more", FAST | {"added_tokens_decoder": {**decoder, str(next_id): token(user)}})
    case("decoder, only one", FAST | {"added_tokens_decoder": {str(next_id): token(user)}})
    plain = token(user, special=False, normalized=True)
    case("decoder, not special", FAST | {"added_tokens_decoder": {**decoder, str(next_id): plain}})
    several = {next_id + 10 - i: token(f"<|{letter}|>") for i, letter in enumerate("abc")}
    case("decoder, several in another order", FAST | {"added_tokens_decoder": decoder | several})
    accents = FAST | {"added_tokens_decoder": {"9999": token("<|cafe\u0301|>", special=False, normalized=True)}}
    case("decoder, not in NFC", accents, style="qwen")
    case("decoder, lstrip", flagged_decoder(decoder, lstrip=True))
    case("decoder, rstrip", flagged_decoder(decoder, rstrip=True))
    case("decoder, single word", flagged_decoder(decoder, single_word=True))
    case("decoder, normalized", flagged_decoder(decoder, normalized=True))
    case("decoder, no special", flagged_decoder(decoder, special=False))
    case("end, a dictionary", FAST | {"eos_token": {"__type": "AddedToken", **token("<|stop|>")}})
    case("end, known, with a flag", FAST | {"eos_token": {"__type": "AddedToken", **token("<|im_end|>", lstrip=True)}})
    case("end, new, with a flag", FAST | {"eos_token": {"__type": "AddedToken", **token("<|stop|>", rstrip=True)}})
    case("end, an entry of the vocabulary", FAST | {"eos_token": "the"})
    case("end, null", FAST | {"eos_token": None, "pad_token": "<|stop|>"})
    case("many", FAST | {"pad_token": "<|a|>", "eos_token": "<|b|>", "additional_special_tokens": ["<|c|>", "<|d|>"],
                         "mask_token": "<|e|>"})  # fmt: skip
    case("many, with a decoder", FAST | {"added_tokens_decoder": several, "eos_token": "<|e|>", "bos_token": "<|d|>"})
    case("extra, a list", FAST | {"extra_special_tokens": [user]})
    case("extra, a dictionary", FAST | {"extra_special_tokens": {"user_token": user}})
    case("extra, dictionaries", FAST | {"additional_special_tokens": [{"__type": "AddedToken", **token(user)}]})
    case("model-specific", FAST | {"model_specific_special_tokens": {"user_token": user}})
    case("a role of its own", FAST | {"image_token": user})
    case("both lists", FAST | {"extra_special_tokens": ["<|a|>"], "additional_special_tokens": ["<|b|>"]})
    case("added_tokens.json", FAST, ids={user: next_id, "<|a|>": next_id + 7, "<|b|>": next_id + 2})
    case("added_tokens.json alone", ids={user: next_id})
    case("added_tokens.json, special", FAST | {"eos_token": user}, ids={user: next_id})
    case("added_tokens.json, beside a decoder", FAST | {"added_tokens_decoder": decoder}, ids={user: next_id})
    case("special_tokens_map.json", FAST, {"eos_token": "<|stop|>"})
    case("special_tokens_map.json alone", None, {"eos_token": "<|stop|>", "additional_special_tokens": [user]})
    case("special_tokens_map.json, dictionaries", FAST, {"eos_token": token("<|stop|>"), "pad_token": "<|im_end|>"})
    case("special_tokens_map.json, beside a decoder", FAST | {"added_tokens_decoder": decoder}, {"eos_token": user})
    case("both name an end", FAST | {"eos_token": "<|a|>"}, {"eos_token": "<|stop|>"})
    case("split special tokens", FAST | {"split_special_tokens": True})
    case("a space before", FAST | {"add_prefix_space": True})
    return found


def flagged_decoder(decoder, **flags):
    return FAST | {"added_tokens_decoder": {id: one | flags if "im_end" in one["content"] else one
                                            for id, one in decoder.items()}}  # fmt: skip


# Reads every folder below one with AutoTokenizer: {folder: ids of each text and the special tokens, or the error}.
READER = """
import json, logging, pathlib, sys
logging.disable(logging.CRITICAL)
from transformers import AutoTokenizer
texts = json.load(sys.stdin)
found = {}
for folder in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        found[folder.name] = [tokenizer(texts)["input_ids"], tokenizer.special_tokens_map]
    except Exception as error:
        found[folder.name] = repr(error)
print()
print(json.dumps(found))
"""


def auto_tokenizer(folder, path=""):
    environment = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", READER, folder], input=json.dumps(TEXTS), capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{name: folder}. Beside the folder in/N is out/N, its export; without one where we refuse the folder."""
    found = {}
    where = tmp_path_factory.mktemp("tokenizers")
    for number, (name, (style, kind, files)) in enumerate(cases().items()):
        folder, export = where / f"in/{number}", where / f"out/{number}"
        for place in folder, export:
            place.mkdir(parents=True)
            (place / "config.json").write_text(json.dumps({"model_type": kind}))
            (place / "tokenizer.json").write_text(json.dumps(bases()[style]))
            for path, content in files.items():
                (place / path).write_text(json.dumps(content))
        found[name] = folder
        with contextlib.suppress(BadInput):
            name_tokenizer_class(export)
    return found


# transformers 5 builds these by itself and drops the pre-tokenizer of the file; 4.57 takes the file, and so do we.
BUILT = ("no config, qwen2", "no class, qwen2", "no config, qwen3", "no class, qwen3", "class Qwen2Tokenizer",
         "class Qwen2TokenizerFast")  # fmt: skip


def test_ids_equal_those_of_auto_tokenizer_or_are_refused(folders):
    theirs = auto_tokenizer(next(iter(folders.values())).parent)
    refused = []
    for name, folder in folders.items():
        alone = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        alone = [alone.encode(text).ids for text in TEXTS]
        found = theirs[folder.name]
        try:
            ours = Tokenizer.from_folder(folder)
        except BadInput as error:
            refused.append(name)
            assert any(file in str(error) for file in FILES) and ("token '" in str(error) or "split" in str(error))
            assert found[0] != alone or name in UNLIKE, f"{name} is refused for nothing"
            continue
        if name not in BUILT:
            assert [ours.encode(text, bos=True) for text in TEXTS] == alone == found[0], name
            names = ChatTemplate.from_folder(with_template(folder)).special
            assert {key: names[key] for key in found[1]} == found[1], name
    assert len(refused) > 25 and len(folders) - len(refused) > 25


# These the newest version of transformers reads like tokenizer.json alone, on our texts or on all.
UNLIKE = ("decoder, normalized", "decoder, not in NFC")


def with_template(folder):
    (folder / "chat_template.jinja").write_text("x")
    return folder


@pytest.mark.parametrize("generation", ["newest", "4.57"])
def test_exports_are_read_back_equal(folders, generation):
    path = ""
    if generation == "4.57":
        path = os.environ.get("KOFF_TRANSFORMERS_4") or pytest.skip("KOFF_TRANSFORMERS_4 names no transformers 4.57")
    theirs = auto_tokenizer(next(iter(folders.values())).parent.parent / "out", path)
    for name, folder in folders.items():
        with contextlib.suppress(BadInput):
            ours = Tokenizer.from_folder(folder)
            again = Tokenizer.from_folder(folder.parent.parent / "out" / folder.name)
            expected = [ours.encode(text, bos=True) for text in TEXTS]
            assert isinstance(theirs[folder.name], list), f"{name}: {theirs[folder.name]}"
            assert theirs[folder.name][0] == expected, name
            assert [again.encode(text, bos=True) for text in TEXTS] == expected, name


# Conversations -------------------------------------------------------------------------------------------------------

CHAT = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>\n{% endfor %}"
TALKS = [
    [{"role": "user", "content": "Guten Tag"}],
    [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
]


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("template", [CHAT, "{{ bos_token }}" + CHAT])
def test_a_conversation_has_the_ids_of_apply_chat_template_and_nothing_else(tmp_path, template, adds_bos):
    file = bases()["smollm2"]
    if adds_bos:
        bos = {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}
        single = [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        special = {"<|endoftext|>": bos}
        file = file | {"post_processor": {"type": "TemplateProcessing", "single": single, "pair": single,
                                          "special_tokens": special}}  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(FAST | {"bos_token": "<|endoftext|>"}))
    (tmp_path / "chat_template.jinja").write_text(template)
    rows = [{"messages": talk} for talk in TALKS] + [{"text": "Guten Tag"}] * 2
    (tmp_path / "talk.jsonl").write_text("\n".join(map(json.dumps, rows)))
    ours = Tokenizer.from_folder(tmp_path)
    chat_template = ChatTemplate.from_folder(tmp_path)
    split = load_text(tmp_path / "talk.jsonl", ours, tmp_path / "cache", separator=2, template=chat_template)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    expected = []
    for talk in TALKS:
        expected += theirs.apply_chat_template(talk, tokenize=True)["input_ids"]
    for _ in range(2):  # a document has the tokenizer's BOS and the model's EOS
        expected += [*theirs("Guten Tag")["input_ids"], 2]
    assert [*split.train, *split.heldout] == expected


# What goes along -----------------------------------------------------------------------------------------------------


def test_a_backbone_keeps_every_file_that_decides_about_ids_and_templates(tmp_path):
    source = tmp_path / "base"
    (source / "additional_chat_templates").mkdir(parents=True)
    names = [name.replace("*", "rag") for name in FILES]
    for name in (*names, "notes.md", "additional_chat_templates/notes.md"):
        (source / name).write_text(name)
    save_backbone(tmp_path / "backbone", random_model(), source)
    copied = [
        str(path.relative_to(tmp_path / "backbone")) for path in (tmp_path / "backbone").rglob("*") if path.is_file()
    ]
    assert sorted(copied) == sorted([*names, "config.json", "model.safetensors"])
    assert all((tmp_path / "backbone" / name).read_text() == name for name in names)


def test_ids_without_a_row_are_refused_where_they_occur(tmp_path):
    file = bases()["smollm2"]
    rows = len(file["model"]["vocab"])
    pad = {**token("[PAD]"), "id": rows}
    (tmp_path / "tokenizer.json").write_text(json.dumps(file | {"added_tokens": [*file["added_tokens"], pad]}))
    whole, ours = Tokenizer.from_folder(tmp_path), Tokenizer.from_folder(tmp_path, rows)
    assert whole.encode("a[PAD]")[-1] == rows and ours.encode("a [PAD") == whole.encode("a [PAD")
    assert (whole.vocab_size, ours.vocab_size) == (rows + 1, rows) and whole.fingerprint != ours.fingerprint
    with pytest.raises(BadInput, match=r"no row for the token '\[PAD\]'"):
        ours.encode("a[PAD]")
    assert Tokenizer.from_folder(tmp_path, rows + 64).fingerprint == whole.fingerprint
