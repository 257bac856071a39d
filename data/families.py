"""Decoder families: how each reads its config.json, and what of it is refused. A new family is one entry of `FAMILIES`.

Where config.json leaves a field out, transformers' class for the family has a default; ours has the same. Whatever
would change the numbers and is not implemented is refused by name.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from data import MALFORMED, BadInput
from model import Config

GENERATION = "generation_config.json"


def no_window(raw, context):
    """A family without sliding windows ignores their fields, as transformers does."""
    return False


def qwen_window(raw, context):
    """Qwen's window begins above block max_window_layers; in a model without such a block it means nothing."""
    above = raw.get("max_window_layers", 28) < raw["num_hidden_layers"]
    chosen = raw.get("use_sliding_window") and raw.get("layer_types") is None
    return chosen and above and raw.get("sliding_window", 0) is not None


def mistral_window(raw, context):
    """Mistral's window covers every block; as long as the context it hides nothing."""
    window = raw.get("sliding_window", 4096)
    return window is not None and window < context


@dataclass(frozen=True)
class Family:
    """A family beside Llama: its defaults, where config.json has no such field, and how its blocks differ."""

    groups: int | None = None  # key-value heads; None: as many as query heads
    context: int = 32768
    head_dim: int | None = None  # None: hidden_size / heads
    head_dim_may_be_null: bool = False
    eps: float = 1e-6
    bias: str = "field"  # "field": attention_bias says it, for q, k, v and o; "qkv": always, on q, k, v; "none"
    mlp_bias: bool = False  # has a field mlp_bias
    qk_norm: str | None = None  # see `model.Config`
    post_norm: bool = False
    uses_window: Callable = no_window  # (raw, context) -> whether attention has a sliding window


FAMILIES = {
    "llama": Family(context=2048, head_dim_may_be_null=True, mlp_bias=True),
    "qwen2": Family(groups=32, bias="qkv", uses_window=qwen_window),
    "qwen3": Family(groups=32, head_dim=128, qk_norm="head", uses_window=qwen_window),
    "mistral": Family(
        groups=8, context=131072, head_dim_may_be_null=True, bias="none", uses_window=mistral_window
    ),
    "olmo2": Family(context=2048, eps=1e-5, qk_norm="all", post_norm=True),
}  # fmt: skip


def read_config(folder):
    """The `Config` of a Hugging Face folder."""
    path = Path(folder, "config.json")
    try:
        config = parse_config(json.loads(path.read_text(encoding="utf-8")), path)
        # Many models name the end of a turn only in this file, and the end of a text in config.json.
        path = Path(folder, GENERATION)
        if path.exists():
            turns = eos_ids(json.loads(path.read_text(encoding="utf-8")))
            every = dict.fromkeys(config.eos_token_ids + turns)  # each once, in this order
            config = replace(config, eos_token_ids=tuple(every))
        return config
    except OSError as error:
        raise BadInput(f"{path} cannot be read ({error.strerror}); give the folder of a checkpoint.") from None
    except MALFORMED as error:
        raise BadInput(f"{path} is not a valid {path.name} ({error}); download it again.") from None


def parse_config(raw, where="config.json"):
    """The `Config` of a config.json, in old or new spelling. BadInput for anything that model.py lacks, by its name."""
    kind = raw.get("model_type")
    if kind not in FAMILIES:
        raise BadInput(f"{where}: model_type {kind!r} is not implemented; use one of {', '.join(FAMILIES)}.")
    family = FAMILIES[kind]
    # transformers 5 writes rope_parameters; before, rope_scaling held the scaling and rope_theta stood by itself. Where
    # both are there (some cards advise adding the latter), transformers takes the older one, and so do we.
    rope = raw.get("rope_scaling") or raw.get("rope_parameters")
    if rope is None:
        rope = {}
    check_kinds(raw, where)

    sizes = {}
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        sizes[key] = value_of(raw, key, int, None, where)
    heads = sizes["num_attention_heads"]
    groups = heads
    if family.groups and "num_key_value_heads" not in raw:
        groups = family.groups
    groups = value_of(raw, "num_key_value_heads", int, groups, where, nullable=True)
    head_dim = family.head_dim or sizes["hidden_size"] // heads
    head_dim = value_of(raw, "head_dim", int, head_dim, where, nullable=family.head_dim_may_be_null)
    blocks = sizes["num_hidden_layers"]
    ragged = kind == "llama" and sizes["hidden_size"] % heads  # transformers refuses it even where head_dim is given
    if ragged or heads % groups or head_dim % 2 or blocks > 1000:  # a mistyped number would take hours to build
        raise BadInput(f"{where}: {blocks} blocks, {heads} heads of {head_dim}, {groups} groups do not fit; mend it.")
    context = value_of(raw, "max_position_embeddings", int, family.context, where)
    refuse_unsupported(raw, rope, family, context, where)

    field_bias = family.bias == "field" and value_of(raw, "attention_bias", bool, False, where)
    return Config(
        model_type=kind,
        **sizes,
        num_key_value_heads=groups,
        head_dim=head_dim,
        rms_norm_eps=value_of(raw, "rms_norm_eps", float, family.eps, where),
        rope_theta=value_of({**raw, **rope}, "rope_theta", float, 10_000.0, where),
        rope_scaling=rope_scaling(raw, rope, context, where),
        max_position_embeddings=context,
        tie_word_embeddings=value_of(raw, "tie_word_embeddings", bool, False, where),
        qkv_bias=family.bias == "qkv" or field_bias,
        o_bias=field_bias,
        mlp_bias=family.mlp_bias and value_of(raw, "mlp_bias", bool, False, where),
        qk_norm=family.qk_norm,
        post_norm=family.post_norm,
        eos_token_ids=eos_ids(raw),
        rows_left=tuple(raw.get("koff_kept", ())),
        raw=raw,
    )


# The types that transformers demands of fields for which `value_of` would not do.
KINDS = {
    "rms_norm_eps": (float,),
    "use_sliding_window": (bool,),
    "max_window_layers": (int,),
    "sliding_window": (int, type(None)),
}


def check_kinds(raw, where):
    """BadInput for a field of another type than its `KINDS`."""
    for key, kinds in KINDS.items():
        if key in raw and type(raw[key]) not in kinds:
            raise BadInput(f"{where}: {key} is {raw[key]!r}; take the checkpoint's own config.json.")


def value_of(raw, key, kind, default, where, nullable=False):
    """raw[key], or the default if it is missing (or null, if it may be).

    BadInput unless it is of type `kind`: a bool, or a number above 0.
    """
    value = raw.get(key, default)
    if value is None and nullable:
        value = default
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or (kind is not bool and not 0 < value < math.inf):
        should = "true or false" if kind is bool else f"a number above 0 ({kind.__name__})"
        raise BadInput(f"{where}: {key} is {value!r}, not {should}; take the checkpoint's own config.json.")
    return value


def eos_ids(raw):
    """The ids that end a text: one, several, or none."""
    eos = raw.get("eos_token_id")
    if eos is None:
        return ()
    ids = tuple(eos) if isinstance(eos, list) else (eos,)
    for number in ids:
        if type(number) is not int or not -1 <= number < 1e9:  # some configs say -1 for none
            raise ValueError(f"eos_token_id {number!r} is no id")
    return tuple(number for number in ids if number >= 0)


def rope_scaling(raw, rope, context, where):
    """The llama3 scaling among a config's RoPE parameters, or None. BadInput for any other kind."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default" or (kind == "linear" and rope.get("factor") == 1):
        return None
    if kind != "llama3":
        raise BadInput(f"{where}: RoPE scaling {kind!r} is not implemented; choose a model without it.")
    # transformers looks for the pretrained length beside the scaling, then in it, then takes the context.
    original = "original_max_position_embeddings"
    found = {original: context, **rope}
    if original in raw:
        found[original] = raw[original]
    scaling = {}
    for key in ("factor", "low_freq_factor", "high_freq_factor", original):
        scaling[key] = value_of(found, key, float, None, f"{where}, llama3 RoPE scaling")
    if scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise BadInput(f"{where}: low_freq_factor is not below high_freq_factor; mend config.json.")
    return scaling


def refuse_unsupported(raw, rope, family, context, where):
    """BadInput for what would change the numbers and is not implemented."""
    unsupported = None
    if raw.get("partial_rotary_factor") not in (None, 1) or rope.get("partial_rotary_factor", 1) != 1:
        unsupported = "partial rotary embedding"
    if "full_attention" in rope:
        unsupported = "RoPE by layer type"
    if raw.get("layer_types") not in (None, ["full_attention"] * raw["num_hidden_layers"]):
        unsupported = "layer_types other than full_attention for each block"
    if family.uses_window(raw, context):
        unsupported = "sliding-window attention"
    if raw.get("hidden_act", "silu") not in ("silu", "swish"):  # two names of one function
        unsupported = f"activation {raw['hidden_act']!r}"
    for key in ("quantization_config", "per_layer_config", "configuration_files"):
        if raw.get(key) is not None:
            unsupported = key
    if unsupported:
        raise BadInput(f"{where}: {unsupported} is not implemented; choose a model without it.")
