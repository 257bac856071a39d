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
    """(names {"eos_token": content, ...}, tokens [(file, token)]) of all files beside tokenizer.json.

    A token is a text, or a dictionary if its flags count. BadInput if a file is damaged.
    """
    folder = Path(folder)
    config = read_json(folder / CONFIG)
    if config.get("split_special_tokens"):
        refuse(folder / CONFIG, "split_special_tokens is not implemented")
    files = {CONFIG: config}
    if "added_tokens_decoder" not in config:  # otherwise the two older files do not count
        files |= {NAMES: read_json(folder / NAMES), ADDED: {LISTS[0]: list(read_json(folder / ADDED))}}
    tokens = []
    try:
        names = dict(BY_CLASS.get(config.get("tokenizer_class", "").removesuffix("Fast"), {}))
        for file, values in files.items():
            named = {}
            for name, value in values.items():
                if name.endswith("_token") and type(value) in (str, dict):  # not add_bos_token
                    named[name] = content(value)
            found = [*named.values()]
            for more in filter(None, map(values.get, LISTS)):
                found += map(content, more.values() if isinstance(more, dict) else more)
                named |= {name: content(token) for name, token in more.items()} if isinstance(more, dict) else {}
            names |= named
            tokens += [(folder / file, token) for token in found if token]
        for token in config.get("added_tokens_decoder", {}).values():
            tokens.append((folder / CONFIG, {**token, "content": content(token)}))
    except MALFORMED as error:
        raise BadInput(f"{folder / CONFIG} or a file beside it is not valid ({error!r}); download it again.") from None
    return names, tokens


def check_special_tokens(folder, added):
    """BadInput for a token that makes other ids than tokenizer.json alone. added: its added tokens {content: token}."""
    for path, token in special_tokens(folder)[1]:
        if isinstance(token, str):
            if token not in added:
                refuse(path, f"the token {token!r} is not in {TOKENIZER}")
        elif any(token.get(flag, False) != added.get(token["content"], {}).get(flag) for flag in FLAGS):
            refuse(path, f"the token {token['content']!r} is not the same in {TOKENIZER}")


def content(token):
    """The text of a token, which may be a dictionary with flags."""
    text = token if isinstance(token, str) else token["content"]
    if not isinstance(text, str):
        raise TypeError("the content of a token is no text")
    return text


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
