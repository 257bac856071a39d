"""Safetensors in and out: pretrained Hugging Face folders, and what a run saves.

A run folder has settings.json, backbone/ (a Hugging Face folder of its own), modules/<domain>.safetensors,
gates.safetensors and router.safetensors; each loads alone.
"""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from data import BadInput, atomic, read_tensors
from data.download import BESIDE, INDEX, SINGLE, checkpoint_names, located
from model import BlockMemory, Config, Model

# Pretrained models ---------------------------------------------------------------------------------------------------


def parse_config(raw, where="config.json"):
    """Read old and new spellings. Raises BadInput for anything that this file does not implement, by its name."""
    kind = raw.get("model_type")
    if kind not in ("llama", "qwen2", "qwen3"):
        raise BadInput(f"{where}: model_type {kind!r} is not implemented; use llama, qwen2 or qwen3.")
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    sliding = raw.get("use_sliding_window") or "sliding_attention" in (raw.get("layer_types") or ())
    partial = {**raw, **rope}.get("partial_rotary_factor", 1)
    for what, refused in {
        f"RoPE scaling {rope_type!r}": rope_type not in ("default", "llama3"),
        "partial rotary embedding": partial != 1,
        "sliding-window attention": sliding or (kind == "llama" and raw.get("sliding_window")),
        f"activation {raw.get('hidden_act')!r}": raw.get("hidden_act", "silu") != "silu",
        "a quantised checkpoint": raw.get("quantization_config") is not None,
    }.items():
        if refused:
            raise BadInput(f"{where}: {what} is not implemented; choose a model without it.")
    bias = kind == "qwen2" or raw.get("attention_bias", False)  # Qwen2 always has it, without a key for it
    eos = raw.get("eos_token_id")
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    for key in sizes:
        if type(raw.get(key)) is not int or raw[key] < 1:
            raise BadInput(f"{where}: {key} is missing or not a size; take the checkpoint's own config.json.")
    heads = raw["num_attention_heads"]
    groups, head_dim = raw.get("num_key_value_heads") or heads, raw.get("head_dim") or raw["hidden_size"] // heads
    if heads % groups or head_dim % 2:
        raise BadInput(f"{where}: {heads} heads of {head_dim} in {groups} groups do not fit; mend config.json.")
    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    if rope_type == "llama3" and not all(isinstance(rope.get(key), int | float) for key in keys):
        raise BadInput(f"{where}: llama3 RoPE scaling needs the numbers {', '.join(keys)}; mend config.json.")
    return Config(
        model_type=kind,
        **{key: raw[key] for key in sizes},
        num_key_value_heads=groups,
        head_dim=head_dim,
        rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
        rope_theta=float(rope.get("rope_theta") or raw.get("rope_theta") or 10_000.0),
        rope_scaling=dict(rope) if rope_type == "llama3" else None,
        max_position_embeddings=raw.get("max_position_embeddings", 2048),
        tie_word_embeddings=raw.get("tie_word_embeddings", False),
        qkv_bias=bias,
        o_bias=bias and kind != "qwen2",
        mlp_bias=kind == "llama" and raw.get("mlp_bias", False),
        qk_norm=kind == "qwen3",
        eos_token_ids=tuple(eos if isinstance(eos, list) else [] if eos is None else [eos]),
        kept=tuple(raw.get("koff_kept", ())),
        raw=raw,
    )


def read_config(folder):
    path = located(folder, weights=False) / "config.json"
    try:
        return parse_config(json.loads(path.read_text(encoding="utf-8")), path)
    except (FileNotFoundError, NotADirectoryError):
        raise BadInput(f"{path} does not exist; give the folder of a Hugging Face checkpoint.") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise BadInput(f"{path} is not a valid config.json ({error}); download it again.") from None


def checkpoint_files(folder):
    """The files of a checkpoint, one or several shards."""
    index, single = Path(folder, INDEX), Path(folder, SINGLE)
    if index.exists():
        return [Path(folder, name) for name in checkpoint_names(index)]
    if not single.exists():
        raise BadInput(f"{single} does not exist; only safetensors are read: download or convert the weights.")
    return [single]


def checkpoint_name(own):
    """The name that Hugging Face checkpoints give to our parameter `own`."""
    return own if own.startswith("lm_head.") else f"model.{own}"


def load(folder, dtype=torch.float32, device="cpu"):
    """Read a Hugging Face folder, a model on the Hub or a compact backbone into a frozen `Model`.

    Every tensor name and shape has to be accounted for. Raises BadInput otherwise.
    """
    folder = located(folder)
    config = read_config(folder)
    with torch.device("meta"):
        model = Model(config)
    expected, state = model.state_dict(), {}
    for path in checkpoint_files(folder):
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118
                    own, tensor = name.removeprefix("model."), file.get_tensor(name)
                    if own.endswith("rotary_emb.inv_freq"):  # old checkpoints store what the config says
                        continue
                    if own not in expected and not (own == "lm_head.weight" and config.tie_word_embeddings):
                        raise BadInput(f"{path} holds {name}, which a {config.model_type} of this config has not.")
                    shape, needed = list(tensor.shape), list(expected.get(own, model.head).shape)
                    if shape != needed:
                        raise BadInput(f"{path}: {name} has shape {shape}, config.json says {needed}.")
                    state[own] = tensor.to(device, dtype if tensor.is_floating_point() else None)
        except FileNotFoundError:
            raise BadInput(f"{path} does not exist, though the index names it; download it again.") from None
        except (SafetensorError, OSError) as error:
            raise BadInput(f"{path} is truncated or not a safetensors file ({error}); download it again.") from None
    if missing := expected.keys() - state.keys():
        one = checkpoint_name(min(missing))
        raise BadInput(f"{folder}: {len(missing)} tensors are missing, {one} among them; download it again.")
    tied = state.pop("lm_head.weight", None) if config.tie_word_embeddings else None
    if tied is not None and not torch.equal(tied, state["embed_tokens.weight"]):
        raise BadInput(f"{folder}: lm_head.weight differs from the embedding that config.json ties it to.")
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False)


# Saved runs ----------------------------------------------------------------------------------------------------------


def save_backbone(folder, model, pretrained):
    """Write the compact backbone, with the tokenizer's files from the folder `pretrained`; returns its fingerprint,
    which every module trained with it carries."""
    folder = Path(folder)
    state = {checkpoint_name(n): t.contiguous() for n, t in model.state_dict().items()}
    with atomic(folder / "model.safetensors") as partial:
        save_file(state, partial, metadata={"format": "pt"})
        fingerprint = hashlib.sha256(partial.read_bytes()).hexdigest()[:16]
    for file in (path for name in BESIDE if (path := Path(pretrained, name)).exists()):
        with atomic(folder / file.name) as partial:
            partial.write_bytes(file.read_bytes())
    with atomic(folder / "config.json") as partial:
        own = {"dtype": str(model.head.dtype).removeprefix("torch."), "koff_fingerprint": fingerprint}
        partial.write_text(json.dumps({**model.config.raw, **own}, indent=1))
    return fingerprint


def tensors_of(blocks):
    """A module as saved: {"layers.{i}.{projection}.lora_A", ".lora_B", "layers.{i}.keys", ".values"} -> tensor."""
    out = {}
    for i, m in blocks.items():
        for name, (a, b) in m.lora.items():
            out |= {f"layers.{i}.{name}.lora_A": a, f"layers.{i}.{name}.lora_B": b}
        if m.keys is not None:
            out |= {f"layers.{i}.keys": m.keys, f"layers.{i}.values": m.values}
    return {name: t.detach().contiguous() for name, t in out.items()}


def save_module(path, blocks, fingerprint):
    """Write one module {block: BlockMemory}, marked with the backbone that it belongs to."""
    with atomic(path) as partial:
        save_file(tensors_of(blocks), partial, metadata={"koff_backbone": fingerprint})


def load_module(path, config, dtype, device="cpu"):
    """{block: BlockMemory} of a saved module. BadInput if it was trained with another backbone than `config`'s."""
    tensors, metadata = read_tensors(path, device=device)
    tensors, made_for = {name: t.to(dtype) for name, t in tensors.items()}, metadata.get("koff_backbone")
    if made_for is None or made_for != config.raw.get("koff_fingerprint"):
        raise BadInput(f"{path} was trained with another backbone ({made_for}); load it with the run it belongs to.")
    blocks = {}
    for name, tensor in tensors.items():
        _, i, *rest = name.split(".")
        block = blocks.setdefault(int(i), BlockMemory({}))
        if len(rest) == 1:
            setattr(block, rest[0], tensor)
        elif rest[1] == "lora_A":
            block.lora[rest[0]] = (tensor, tensors[f"layers.{i}.{rest[0]}.lora_B"])
    return blocks


def save_gates(path, gates, mask):
    """Write every log alpha and the final mask, each [N, channels]."""
    tensors = {f"log_alpha.{n}": a.detach().contiguous() for n, a in gates.log_alpha.items()}
    with atomic(path) as partial:
        save_file(tensors | {f"mask.{n}": m.to(torch.uint8) for n, m in mask.items()}, partial)


def load_gates(path, gates):
    """Fill `gates` with the saved log alpha; returns the final mask {name: bool [N, channels]}."""
    tensors, _ = read_tensors(path)
    gates.load_state_dict({name: t for name, t in tensors.items() if name.startswith("log_alpha.")})
    return {n.removeprefix("mask."): t.bool() for n, t in tensors.items() if n.startswith("mask.")}
