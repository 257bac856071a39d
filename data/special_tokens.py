"""The files beside a tokenizer.json: added tokens that it lacks, the names of special tokens, chat templates.

transformers' AutoTokenizer adds every token of these files to the tokenizer. So do we, and the ids are equal. (Where
versions of transformers differ, the newest counts.)
"""

import json
from dataclasses import dataclass
from pathlib import Path

from data import MALFORMED, BadInput
from data.corpus import read_text

TEMPLATE = "chat_template.jinja"
MORE_TEMPLATES = "additional_chat_templates"  # a folder: <name>.jinja
TOKENIZER = "tokenizer.json"
CONFIG = "tokenizer_config.json"
NAMES, IDS = OLDER = ("special_tokens_map.json", "added_tokens.json")  # {name: token}, {content: id}
FILES = (TOKENIZER, CONFIG, *OLDER, TEMPLATE, f"{MORE_TEMPLATES}/*.jinja")

# In this order they get their ids.
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# The names that classes of transformers give without any file.
END = "<|endoftext|>"
GPT2 = {"bos_token": END, "eos_token": END, "unk_token": END}
BY_CLASS = {"GPT2Tokenizer": GPT2, "GPTNeoXTokenizer": GPT2, "Qwen2Tokenizer": {"eos_token": END, "pad_token": END}}
BY_MODEL = {"qwen2": "Qwen2Tokenizer", "qwen3": "Qwen2Tokenizer", "olmo2": "GPTNeoXTokenizer"}


def read_json(path):
    """The object in a JSON file, {} if there is none. BadInput if it is damaged."""
    try:
        found = json.loads(read_text(path)) if path.exists() else {}
        return dict(found.items())
    except MALFORMED as error:
        raise BadInput(f"{path} is not valid ({error!r}); download it again.") from None


@dataclass
class SpecialTokens:
    """The tokens beside a tokenizer.json: dictionaries of "content" and flags, in the order of their ids.

    overriding: their flags count more than those of equal tokens in tokenizer.json; others: they are added if
    tokenizer.json has no equal one; names {"eos_token": content, ...}.
    """

    overriding: list[dict]
    others: list[dict]
    names: dict[str, str]


def read_special_tokens(folder):
    """The `SpecialTokens` of a folder. BadInput if a file is damaged or asks for what we lack."""
    path = Path(folder, CONFIG)
    config = read_json(path)
    if config.get("split_special_tokens"):
        raise BadInput(f"{path}: split_special_tokens is not implemented; remove it.")
    try:
        return collect(Path(folder), config)
    except MALFORMED as error:
        raise BadInput(f"{path} or a file beside it has no valid tokens ({error!r}); download it again.") from None


def collect(folder, config):
    """`read_special_tokens`, for a parsed tokenizer_config.json."""
    kind = config.get("tokenizer_class") or BY_MODEL.get(read_json(folder / "config.json").get("model_type"), "")
    values = BY_CLASS.get(kind.removesuffix("Fast"), {}) | config
    ids = {}
    if "added_tokens_decoder" not in config:  # otherwise the two older files do not count
        values |= read_json(folder / NAMES)
        ids = read_json(folder / IDS)

    names = {name: value for name, value in values.items() if name.endswith("_token") and type(value) in (str, dict)}
    extra = values.get("extra_special_tokens") or values.get("additional_special_tokens") or []
    if isinstance(extra, dict):
        names |= extra
        extra = []
    names |= values.get("model_specific_special_tokens") or {}
    names = {name: as_token(names[name]) for name in (*ROLES, *names) if name in names}
    special = [*names.values(), *map(as_token, extra)]
    contents = [token["content"] for token in special]
    added = [{"content": text, "normalized": text not in contents} for text in sorted(ids, key=ids.get)]
    decoder = {int(id): as_token(token) for id, token in config.get("added_tokens_decoder", {}).items()}
    return SpecialTokens(
        [decoder[id] for id in sorted(decoder)],
        added + special,
        {name: token["content"] for name, token in names.items()},
    )


def as_token(value):
    """An added token from the text of a special one, or from a dictionary."""
    if isinstance(value, str):
        return {"content": value, "normalized": False}
    if not isinstance(value["content"], str):
        raise TypeError("the content of a token is no text")
    return {"normalized": not value.get("special", False), **value}


def read_templates(folder):
    """The Jinja text of a chat template, {name: text} of several, or None. Files of their own count before the config.

    BadInput if a file is damaged.
    """
    found = {path.stem: read_text(path) for path in sorted(Path(folder, MORE_TEMPLATES).glob("*.jinja"))}
    if Path(folder, TEMPLATE).exists():
        found["default"] = read_text(Path(folder, TEMPLATE))
    source = found or read_json(Path(folder, CONFIG)).get("chat_template")
    if isinstance(source, list):
        try:
            source = {one["name"]: one["template"] for one in source}
        except MALFORMED as error:
            raise BadInput(f"{Path(folder, CONFIG)} is not valid ({error!r}); download it again.") from None
    return source
