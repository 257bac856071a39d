"""Safetensors in and out: pretrained Hugging Face folders, and what a run saves.

A run folder has settings.json, backbone/ (a Hugging Face folder of its own), modules/<domain>.safetensors,
gates.safetensors and router.safetensors; each loads alone.
"""

import contextlib
import hashlib
import json
import math
from dataclasses import fields, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from data import BadInput, atomic, read_tensors, write_tensors
from model import Config, Memory, Model

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
GENERATION = "generation_config.json"
BESIDE = (GENERATION, "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")  # what goes with a backbone

# config.json ---------------------------------------------------------------------------------------------------------

# The kinds that transformers' classes demand of a field, where `parse_config` does not ask for one of its own.
NULL = type(None)
KINDS = {
    (bool,): ("use_cache", "use_sliding_window"),
    (float,): ("rms_norm_eps", "initializer_range"),
    (int,): ("max_window_layers",),
    (int, NULL): ("sliding_window", "bos_token_id", "pad_token_id", "pretraining_tp"),
    (int, float, NULL): ("attention_dropout",),
}


def read_config(folder):
    """The `Config` of a Hugging Face folder."""
    path = Path(folder, "config.json")
    try:
        config = parse_config(json.loads(path.read_text(encoding="utf-8")), path)
        # Many models name the end of a turn there only, beside the end of a text in config.json.
        path = Path(folder, GENERATION)
        if path.exists():
            turns = eos_ids(json.loads(path.read_text(encoding="utf-8")))
            every = dict.fromkeys(config.eos_token_ids + turns)  # each once, in this order
            config = replace(config, eos_token_ids=tuple(every))
        return config
    except OSError as error:
        raise BadInput(f"{path} cannot be read ({error.strerror}); give the folder of a checkpoint.") from None
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise BadInput(f"{path} is not a valid {path.name} ({error}); download it again.") from None


def parse_config(raw, where="config.json"):
    """What a config.json says, old and new spellings. BadInput for anything that model.py has not, by its name."""
    kind = raw.get("model_type")
    if kind not in ("llama", "qwen2", "qwen3"):
        raise BadInput(f"{where}: model_type {kind!r} is not implemented; use llama, qwen2 or qwen3.")
    # transformers 5 writes rope_parameters; before, rope_scaling held the scaling and rope_theta stood by itself. Where
    # both are there (some cards advise to add the latter) transformers takes the older one, and so do we.
    rope = raw.get("rope_scaling") or raw.get("rope_parameters")
    if rope is None:
        rope = {}
    check_kinds(raw, where)

    # What a config leaves out is what transformers' own class for it says; what is there has to be of the right kind.
    sizes = {}
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        sizes[key] = value_of(raw, key, int, None, where)
    heads = sizes["num_attention_heads"]
    usual_groups = 32 if kind != "llama" and "num_key_value_heads" not in raw else heads
    groups = value_of(raw, "num_key_value_heads", int, usual_groups, where, nullable=True)
    usual_head = 128 if kind == "qwen3" else sizes["hidden_size"] // heads
    head_dim = value_of(raw, "head_dim", int, usual_head, where, nullable=kind == "llama")
    blocks = sizes["num_hidden_layers"]
    ragged = kind == "llama" and sizes["hidden_size"] % heads  # transformers minds it even where head_dim is given
    if ragged or heads % groups or head_dim % 2 or blocks > 1000:  # a mistyped number would take hours to build
        raise BadInput(f"{where}: {blocks} blocks, {heads} heads of {head_dim}, {groups} groups do not fit; mend it.")
    refuse_unsupported(raw, rope, where)

    # Qwen2 has biases on q, k and v, always, without a key for it.
    bias = kind == "qwen2" or value_of(raw, "attention_bias", bool, False, where)
    context = value_of(raw, "max_position_embeddings", int, 2048 if kind == "llama" else 32768, where)
    return Config(
        model_type=kind,
        **sizes,
        num_key_value_heads=groups,
        head_dim=head_dim,
        rms_norm_eps=value_of(raw, "rms_norm_eps", float, 1e-6, where),
        rope_theta=value_of({**raw, **rope}, "rope_theta", float, 10_000.0, where),
        rope_scaling=rope_scaling(raw, rope, context, where),
        max_position_embeddings=context,
        tie_word_embeddings=value_of(raw, "tie_word_embeddings", bool, False, where),
        qkv_bias=bias,
        o_bias=bias and kind != "qwen2",
        mlp_bias=kind == "llama" and value_of(raw, "mlp_bias", bool, False, where),
        qk_norm=kind == "qwen3",
        eos_token_ids=eos_ids(raw),
        rows_left=tuple(raw.get("koff_kept", ())),
        raw=raw,
    )


def check_kinds(raw, where):
    """BadInput for a field that is there and of none of its `KINDS`."""
    for kinds, keys in KINDS.items():
        for key in keys:
            if key in raw and type(raw[key]) not in kinds:
                raise BadInput(f"{where}: {key} is {raw[key]!r}; take the checkpoint's own config.json.")


def value_of(raw, key, kind, default, where, nullable=False):
    """raw[key], or the default where it is missing, or null where it may be. BadInput unless it is of its kind: a bool,
    or a number above 0."""
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
    """The llama3 scaling in a config's RoPE parameters, None where there is none. BadInput for any other kind."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default" or (kind == "linear" and rope.get("factor") == 1):
        return None
    if kind != "llama3":
        raise BadInput(f"{where}: RoPE scaling {kind!r} is not implemented; choose a model without it.")
    # The pretrained length is looked for as transformers does: beside the scaling, in it, and then the context is it.
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


def refuse_unsupported(raw, rope, where):
    """BadInput for what would change the numbers and is not implemented."""
    unsupported = None
    if raw.get("partial_rotary_factor") not in (None, 1) or rope.get("partial_rotary_factor", 1) != 1:
        unsupported = "partial rotary embedding"
    if "full_attention" in rope:
        unsupported = "RoPE by layer type"
    blocks = raw["num_hidden_layers"]
    types = raw.get("layer_types")
    if types not in (None, ["full_attention"] * blocks):
        unsupported = "layer_types other than full_attention for each block"
    # Qwen's window begins above block max_window_layers: in a model that has no such block it means nothing.
    window = types is None and raw.get("max_window_layers", 28) < blocks and raw.get("sliding_window", 0) is not None
    if raw["model_type"] != "llama" and raw.get("use_sliding_window") and window:
        unsupported = "sliding-window attention"
    if raw.get("hidden_act", "silu") not in ("silu", "swish"):  # two names of one function
        unsupported = f"activation {raw['hidden_act']!r}"
    for key in ("quantization_config", "per_layer_config", "configuration_files"):
        if raw.get(key) is not None:
            unsupported = key
    if unsupported:
        raise BadInput(f"{where}: {unsupported} is not implemented; choose a model without it.")


# Weights -------------------------------------------------------------------------------------------------------------


def shard_names(index):
    """The files that an index of shards names, plain names only: they are untrusted."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        for name in names:
            plain = Path(name).name == name and name.isprintable() and "\\" not in name
            if not plain or not name.endswith(".safetensors"):
                raise BadInput(f"{index} names the file {name!r}, not a plain .safetensors name; do not trust it.")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise BadInput(f"{index} has no valid weight_map; download it again.") from None
    return names


def weight_files(folder):
    """The files of a checkpoint, one or several shards."""
    index = Path(folder, INDEX)
    single = Path(folder, SINGLE)
    if single.exists():  # transformers, too, reads it where there are both
        return [single]
    if index.exists():
        return [Path(folder, name) for name in shard_names(index)]
    raise BadInput(f"{single} does not exist; only safetensors are read: download or convert the weights.")


def digest(folder):
    """A hash of a pretrained model: what its config says, and its weights."""
    return hash_of(weight_files(folder), repr(read_config(folder)))


def hash_of(files, text=""):
    """Sixteen letters that follow from a text and from what is in some files."""
    found = hashlib.sha256(text.encode())
    for path in files:
        with open(path, "rb") as file:
            while part := file.read(2**24):
                found.update(part)
    return found.hexdigest()[:16]


def checkpoint_name(own):
    """The name that Hugging Face checkpoints give to our parameter `own`."""
    return own if own.startswith("lm_head.") else f"model.{own}"


@contextlib.contextmanager
def possible_sizes(folder):
    """Under it a model is made of the config.json in a folder: BadInput where that fails."""
    try:
        yield
    except Exception:  # of another kind for each kind of wrong number
        raise BadInput(f"{folder}: no model has the sizes of its config.json; take the checkpoint's own.") from None


def load(folder, dtype=torch.float32, device="cpu"):
    """Read a Hugging Face folder, or a backbone of ours, into a frozen `Model`.

    Every tensor name and shape has to be accounted for. Raises BadInput otherwise.
    """
    config = read_config(folder)
    with possible_sizes(folder), torch.device("meta"):  # shapes without numbers: the file brings these
        model = Model(config)
    expected = model.state_dict()
    state = {}
    # Shard by shard, tensor by tensor: never two copies of the model in memory.
    for path in weight_files(folder):
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118
                    own = name.removeprefix("model.")
                    if own.endswith("rotary_emb.inv_freq"):  # old checkpoints store what the config says
                        continue
                    tensor = file.get_tensor(name)
                    check_tensor(path, name, tensor, expected.get(own), model)
                    if own in state:
                        raise BadInput(f"{path} holds {name}, which was there before; download the checkpoint again.")
                    state[own] = tensor.to(device, tensor.dtype if own.endswith(".kept") else dtype)
        except FileNotFoundError:
            raise BadInput(f"{path} does not exist, though the index names it; download it again.") from None
        except (SafetensorError, OSError) as error:
            raise BadInput(f"{path} is truncated or not a safetensors file ({error}); download it again.") from None
    if config.tie_word_embeddings and "lm_head.weight" in state:
        # The same matrix by its other name: some files hold both, some this one only.
        head = state.pop("lm_head.weight")
        if not torch.equal(state.setdefault("embed_tokens.weight", head), head):
            raise BadInput(f"{folder}: lm_head.weight differs from the embedding that config.json ties it to.")
    # Nothing may be left at random: a tensor that no file has is an error, not a default.
    missing = expected.keys() - state.keys()
    if missing:
        one = checkpoint_name(min(missing))
        raise BadInput(f"{folder}: {len(missing)} tensors are missing, {one} among them; download it again.")
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False)


def check_tensor(path, name, tensor, expected, model):
    """BadInput unless a tensor of a file is one that the model has, in the shape that it has there."""
    if expected is None and name == "lm_head.weight" and model.config.tie_word_embeddings:
        expected = model.head
    if expected is None:
        raise BadInput(f"{path} holds {name}, which a {model.config.model_type} of this config has not.")
    shape = list(tensor.shape)
    needed = list(expected.shape)
    if shape != needed:
        raise BadInput(f"{path}: {name} has shape {shape}, config.json says {needed}.")
    if name.endswith(".kept"):  # the channels of a backbone of ours
        return
    if not tensor.is_floating_point():
        kind = str(tensor.dtype).removeprefix("torch.")
        raise BadInput(f"{path}: {name} is {kind}, not floating point; take the checkpoint before it was quantised.")
    if not tensor.float().isfinite().all():  # float8 cannot be asked, and float64 may exceed what we compute in
        raise BadInput(f"{path}: {name} has numbers that are NaN or infinite; download or train it again.")


# Saved runs ----------------------------------------------------------------------------------------------------------


def save_backbone(folder, model, pretrained, **about):
    """Write the materialised backbone, with the tokenizer's files from the folder `pretrained`.

    about: what its config.json says beside. Returns its fingerprint, a hash of the weights, which every module trained
    with it carries.
    """
    folder = Path(folder)
    state = {checkpoint_name(name): tensor.contiguous() for name, tensor in model.state_dict().items()}
    with atomic(folder / SINGLE) as partial:
        save_file(state, partial, metadata={"format": "pt"})
        fingerprint = hash_of([partial])
    for name in BESIDE:
        source = Path(pretrained, name)
        if source.exists():
            with atomic(folder / name) as partial:
                partial.write_bytes(source.read_bytes())
    # The pretrained config.json, with what is new about this model: channels left, dtype, fingerprint.
    dtype = str(model.head.dtype).removeprefix("torch.")
    config = {**model.config.raw, **about, "dtype": dtype, "koff_fingerprint": fingerprint}
    config.pop("torch_dtype", None)  # the older name; where both are there, older libraries read this one
    with atomic(folder / "config.json") as partial:
        partial.write_text(json.dumps(config, indent=1))
    return fingerprint


def check_backbone(folder, config):
    """BadInput where the weights of a saved backbone are not those that its `config` was written with."""
    path = Path(folder, SINGLE)
    known = isinstance(getattr(torch, str(config.raw.get("dtype")), None), torch.dtype)
    if not known or not path.exists() or hash_of([path]) != config.raw.get("koff_fingerprint"):
        raise BadInput(f"{path} is not as it was saved; copy the folder again, or train the run again.")


def tensors_of(module):
    """A module {block: `Memory`} as it is saved: "layers.{i}.{projection}.lora_A" and ".lora_B", and for every other
    field of a `Memory` that is there "layers.{i}.{field}" -> tensor."""
    tensors = {}
    for i, memory in module.items():
        for name, (a, b) in memory.lora.items():
            tensors[f"layers.{i}.{name}.lora_A"] = a
            tensors[f"layers.{i}.{name}.lora_B"] = b
        for f in fields(memory):
            value = getattr(memory, f.name)
            if isinstance(value, torch.Tensor):
                tensors[f"layers.{i}.{f.name}"] = value
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def save_module(path, module, fingerprint):
    """Write one module, marked with the backbone that it belongs to."""
    write_tensors(path, tensors_of(module), backbone=fingerprint)


def load_module(path, config, dtype, device="cpu"):
    """{block: `Memory`} of a saved module. BadInput if it was trained with another backbone than `config`'s."""
    tensors, about = read_tensors(path, device=device)
    # A module fits the channels that its backbone kept. On another backbone it would load and mean nothing.
    made_for = about.get("backbone")
    if made_for is None or made_for != config.raw.get("koff_fingerprint"):
        raise BadInput(f"{path} was trained with another backbone ({made_for}); load it with the run it belongs to.")
    module = {}
    try:
        for name, tensor in tensors.items():
            _, i, part, *half = name.split(".")  # layers.7.down.lora_A, or layers.7.keys
            memory = module.setdefault(range(config.num_hidden_layers)[int(i)], Memory())
            if half:
                a = tensors[f"layers.{i}.{part}.lora_A"]
                b = tensors[f"layers.{i}.{part}.lora_B"]
                memory.lora[part] = (a.to(dtype), b.to(dtype))
            else:
                setattr(memory, part, tensor.to(dtype))
    except (LookupError, ValueError):
        raise BadInput(f"{path} is not a module of this version; train it again.") from None
    return module


def save_gates(path, gates, mask):
    """Write every log alpha and the final mask, each [N, channels]."""
    tensors = {f"log_alpha.{name}": a for name, a in gates.log_alpha.items()}
    for name, is_open in mask.items():
        tensors[f"mask.{name}"] = is_open.to(torch.uint8)
    write_tensors(path, tensors)


def load_gates(path, gates):
    """Fill `gates` with the saved log alpha; returns the final mask {name: bool [N, channels]}."""
    tensors, _ = read_tensors(path)
    mask = {}
    try:
        for name in gates.log_alpha:
            gates.log_alpha[name].data.copy_(tensors[f"log_alpha.{name}"])
            mask[name] = tensors[f"mask.{name}"].bool()
    except (LookupError, RuntimeError):
        raise BadInput(f"{path} has not the gates that settings.json asks for; train the run again.") from None
    return mask
