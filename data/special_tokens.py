"""The files beside a tokenizer.json: names of special tokens, more added tokens, chat templates.

transformers' AutoTokenizer adds every token of these files to the tokenizer. We refuse one that tokenizer.json lacks.
"""

import json
from pathlib import Path

from data import MALFORMED, BadInput
from data.corpus import read_text

TEMPLATE = "chat_template.jinja"
MORE_TEMPLATES = "additional_chat_templates/*.jinja"
TOKENIZER = "tokenizer.json"
CONFIG = "tokenizer_config.json"
NAMES = "special_tokens_map.json"
ADDED = "added_tokens.json"  # {content: id}
FILES = (TOKENIZER, CONFIG, NAMES, ADDED, TEMPLATE, MORE_TEMPLATES)

FLAGS = ("lstrip", "rstrip", "single_word", "normalized")  # of an added token
LISTS = ("extra_special_tokens", "additional_special_tokens", "model_specific_special_tokens")

# The names that classes of transformers give without any file.
END = "<|endoftext|>"
GPT2 = {"bos_token": END, "eos_token": END, "unk_token": END}
BY_CLASS = {"GPT2Tokenizer": GPT2, "GPTNeoXTokenizer": GPT2, "Qwen2Tokenizer": {"eos_token": END, "pad_token": END}}


def read_json(path):
    """The object in a JSON file, {} if there is no file. BadInput if it is damaged."""
    try:
        return dict(json.loads(read_text(path)).items()) if path.exists() else {}
    except MALFORMED as error:
        raise BadInput(f"{path} is not valid ({error!r}); download it again.") from None


def special_tokens(folder):
    """{"eos_token": content, ...}. BadInput for a token that makes ids other than tokenizer.json alone."""
    folder = Path(folder)
    config = read_json(folder / CONFIG)
    decoder = config.get("added_tokens_decoder")  # {id: token}; with it the two older files do not count
    files = {CONFIG: config}
    if decoder is None:
        files |= {NAMES: read_json(folder / NAMES), ADDED: {LISTS[0]: list(read_json(folder / ADDED))}}
    there = {token["content"]: token for token in read_json(folder / TOKENIZER).get("added_tokens") or []}
    try:
        names = dict(BY_CLASS.get(config.get("tokenizer_class", "").removesuffix("Fast"), {}))
        for file, values in files.items():
            named = {}
            for name, value in values.items():
                if name.endswith("_token") and type(value) in (str, dict):  # not add_bos_token
                    named[name] = value
            tokens = [*named.values()]
            for more in filter(None, map(values.get, LISTS)):
                tokens += more.values() if isinstance(more, dict) else more
                named |= more if isinstance(more, dict) else {}
            names |= {name: content(token) for name, token in named.items()}
            for token in map(content, tokens):
                if token and token not in there:
                    refuse(folder / file, f"the token {token!r} is not in {TOKENIZER}")
        for token in (decoder or {}).values():
            if any(token.get(flag, False) != there.get(token["content"], {}).get(flag) for flag in FLAGS):
                refuse(folder / CONFIG, f"the token {token['content']!r} is not the same in {TOKENIZER}")
    except MALFORMED as error:
        raise BadInput(f"{folder / CONFIG} or a file beside it is not valid ({error!r}); download it again.") from None
    if config.get("split_special_tokens"):
        refuse(folder / CONFIG, "split_special_tokens is not implemented")
    return names


def content(token):
    """The text of a token, which may be a dictionary with flags."""
    return token if isinstance(token, str) else token["content"]


def refuse(path, fault):
    raise BadInput(f"{path}: {fault}; save the tokenizer again with transformers (save_pretrained).")


def read_templates(folder):
    """The Jinja text of a chat template, {name: text} of several, or None. Files of their own count before the config.

    BadInput if a file is damaged.
    """
    found = {path.stem: read_text(path) for path in Path(folder).glob(MORE_TEMPLATES)}
    if Path(folder, TEMPLATE).exists():
        found["default"] = read_text(Path(folder, TEMPLATE))
    source = found or read_json(Path(folder, CONFIG)).get("chat_template")
    try:
        return {one["name"]: one["template"] for one in source} if isinstance(source, list) else source
    except MALFORMED as error:
        raise BadInput(f"{Path(folder, CONFIG)} is not valid ({error!r}); download it again.") from None
