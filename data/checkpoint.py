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
from model import BlockMemory, Config, Model

# Pretrained models ---------------------------------------------------------------------------------------------------


def read_config(folder):
    path = Path(folder, "config.json")
    try:
        return Config.from_dict(json.loads(path.read_text(encoding="utf-8")), path)
    except (FileNotFoundError, NotADirectoryError):
        raise BadInput(f"{path} does not exist; give the folder of a Hugging Face checkpoint.") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise BadInput(f"{path} is not a valid config.json ({error}); download it again.") from None


def checkpoint_files(folder):
    """The files of a checkpoint, one or several shards. Their names in an index are untrusted."""
    index, single = Path(folder, "model.safetensors.index.json"), Path(folder, "model.safetensors")
    if not index.exists():
        if not single.exists():
            raise BadInput(f"{single} does not exist; only safetensors are read: download or convert the weights.")
        return [single]
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        for name in names:
            if Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
                raise BadInput(f"{index} names the file {name!r}, not a plain .safetensors name; do not trust it.")
    except (ValueError, LookupError, TypeError, AttributeError):
        raise BadInput(f"{index} has no valid weight_map; download it again.") from None
    return [Path(folder, name) for name in names]


def checkpoint_name(own):
    """The name that Hugging Face checkpoints give to our parameter `own`."""
    return own if own.startswith("lm_head.") else f"model.{own}"


def load(folder, dtype=torch.float32, device="cpu"):
    """Read a Hugging Face folder (or a compact backbone) into a frozen `Model`.

    Every tensor name and shape has to be accounted for. Raises BadInput otherwise.
    """
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


def save_backbone(folder, model, tokenizer_json):
    """Write the compact backbone; returns its fingerprint, which every module trained with it carries."""
    folder = Path(folder)
    state = {checkpoint_name(n): t.contiguous() for n, t in model.state_dict().items()}
    with atomic(folder / "model.safetensors") as partial:
        save_file(state, partial, metadata={"format": "pt"})
        fingerprint = hashlib.sha256(partial.read_bytes()).hexdigest()[:16]
    with atomic(folder / "tokenizer.json") as partial:
        partial.write_bytes(Path(tokenizer_json).read_bytes())
    with atomic(folder / "config.json") as partial:
        partial.write_text(json.dumps({**model.config.raw, "koff_fingerprint": fingerprint}, indent=1))
    return fingerprint


def tensors_of(blocks):
    """A module as it is saved: {"layers.{i}.{projection}.lora_A", ".lora_B", "layers.{i}.keys", ".values"} -> tensor."""
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
