"""Read and write safetensors: pretrained Hugging Face folders, and the parts of a run.

A run folder has settings.json, backbone/ (itself a Hugging Face folder), modules/<domain>.safetensors,
gates.safetensors and router.safetensors. Each part loads alone.
"""

import contextlib
import hashlib
import json
from dataclasses import fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from data import MALFORMED, BadInput, atomic, read_tensors, write_tensors
from data.families import GENERATION, read_config
from data.special_tokens import FILES
from model import Memory, Model

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
BESIDE = (GENERATION, *FILES)  # files saved with a backbone

# Weights -------------------------------------------------------------------------------------------------------------


def weight_files(folder):
    """The safetensors files of a checkpoint: one file, or the shards in its index."""
    index = Path(folder, INDEX)
    single = Path(folder, SINGLE)
    if single.exists():  # if both exist, transformers reads this one, too
        return [single]
    if not index.exists():
        raise BadInput(f"{single} does not exist; only safetensors are read: download or convert the weights.")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        for name in names:  # they are untrusted: plain names only
            plain = Path(name).name == name and name.isprintable() and "\\" not in name
            if not plain or not name.endswith(".safetensors"):
                raise BadInput(f"{index} names the file {name!r}, not a plain .safetensors name; do not trust it.")
    except (OSError, *MALFORMED):
        raise BadInput(f"{index} has no valid weight_map; download it again.") from None
    return [Path(folder, name) for name in names]


def digest(folder):
    """A hash of a pretrained model's files: weights, config.json and generation_config.json."""
    files = [*weight_files(folder), Path(folder, "config.json"), Path(folder, GENERATION)]
    return "files-" + hash_of([path for path in files if path.exists()])


def same_model(folder, known):
    """Whether the model in a folder has the digest `known`, which a run has saved."""
    if str(known).startswith("files-"):
        return digest(folder) == known
    # Older runs hashed `Config` as Python printed it then.
    config = read_config(folder)
    names = [f.name for f in fields(config) if f.name not in ("post_norm", "raw")]
    values = {name: getattr(config, name) for name in names} | {"qk_norm": config.qk_norm is not None}
    printed = ", ".join(f"{name}={value!r}" for name, value in values.items())
    return hash_of(weight_files(folder), f"Config({printed})") == known


def hash_of(files, text=""):
    """A hash of a text and of the contents of files, sixteen hexadecimal digits."""
    sha = hashlib.sha256(text.encode())
    for path in files:
        with open(path, "rb") as file:
            while part := file.read(2**24):
                sha.update(part)
    return sha.hexdigest()[:16]


def checkpoint_name(own):
    """The name of our parameter `own` in Hugging Face checkpoints."""
    return own if own.startswith("lm_head.") else f"model.{own}"


@contextlib.contextmanager
def possible_sizes(folder):
    """A context for making a model from the config.json in a folder: any failure becomes a BadInput."""
    try:
        yield
    except Exception:  # each kind of wrong number fails in another way
        raise BadInput(f"{folder}: no model has the sizes of its config.json; take the checkpoint's own.") from None


def load(folder, dtype=torch.float32, device="cpu"):
    """Read a Hugging Face folder, or a backbone of ours, into a frozen `Model`.

    BadInput if any tensor is missing, superfluous or of another shape.
    """
    config = read_config(folder)
    with possible_sizes(folder), torch.device("meta"):  # shapes only: the numbers come from the files
        model = Model(config)
    expected = model.state_dict()
    if config.tie_word_embeddings:  # one matrix with two names: files hold either or both
        expected["lm_head.weight"] = model.head
    state = {}
    # We read tensor by tensor. There are never two copies of the model in memory.
    for path in weight_files(folder):
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118
                    own = name.removeprefix("model.")
                    if own.endswith("rotary_emb.inv_freq"):  # in old checkpoints; it follows from the config
                        continue
                    tensor = file.get_tensor(name)
                    check_tensor(path, name, tensor, expected.get(own), config)
                    if own in state:
                        raise BadInput(f"{path} holds {name}, which was there before; download the checkpoint again.")
                    state[own] = tensor.to(device, tensor.dtype if own.endswith(".kept") else dtype)
        except FileNotFoundError:
            raise BadInput(f"{path} does not exist, though the index names it; download it again.") from None
        except (SafetensorError, OSError) as error:
            raise BadInput(f"{path} is truncated or not a safetensors file ({error}); download it again.") from None
    if config.tie_word_embeddings and "lm_head.weight" in state:
        head = state.pop("lm_head.weight")
        if not torch.equal(state.setdefault("embed_tokens.weight", head), head):
            raise BadInput(f"{folder}: lm_head.weight differs from the embedding that config.json ties it to.")
    missing = model.state_dict().keys() - state.keys()
    if missing:
        one = checkpoint_name(min(missing))
        raise BadInput(f"{folder}: {len(missing)} tensors are missing, {one} among them; download it again.")
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False)


def check_tensor(path, name, tensor, expected, config):
    """BadInput unless a tensor in a file has the name and shape of a tensor in the model, `expected`, and is finite."""
    if expected is None:
        raise BadInput(f"{path} holds {name}, which a {config.model_type} of this config has not.")
    if tensor.shape != expected.shape:
        shapes = f"has shape {list(tensor.shape)}, config.json says {list(expected.shape)}"
        raise BadInput(f"{path}: {name} {shapes}.")
    if name.endswith(".kept"):  # channel numbers, in a backbone of ours
        return
    if not tensor.is_floating_point():
        kind = str(tensor.dtype).removeprefix("torch.")
        raise BadInput(f"{path}: {name} is {kind}, not floating point; take the checkpoint before it was quantised.")
    if not tensor.float().isfinite().all():  # float8 has no isfinite, and float64 may overflow
        raise BadInput(f"{path}: {name} has numbers that are NaN or infinite; download or train it again.")


# Saved runs ----------------------------------------------------------------------------------------------------------


def save_backbone(folder, model, pretrained, **about):
    """Write the materialised backbone, with the tokenizer's files from the folder `pretrained`.

    about: more fields for its config.json. Returns the backbone's fingerprint, a hash of the weights. Every module of
    the backbone carries the same fingerprint.
    """
    folder = Path(folder)
    state = {checkpoint_name(name): tensor.contiguous() for name, tensor in model.state_dict().items()}
    with atomic(folder / SINGLE) as partial:
        save_file(state, partial, metadata={"format": "pt"})
        fingerprint = hash_of([partial])
    for pattern in BESIDE:
        for source in Path(pretrained).glob(pattern):
            with atomic(folder / source.relative_to(pretrained)) as partial:
                partial.write_bytes(source.read_bytes())
    dtype = str(model.head.dtype).removeprefix("torch.")
    config = {**model.config.raw, **about, "dtype": dtype, "koff_fingerprint": fingerprint}
    if model.config.rows_left:
        config["koff_kept"] = model.config.rows_left
    config.pop("torch_dtype", None)  # the old name of dtype: if both exist, older libraries read this one
    with atomic(folder / "config.json") as partial:
        partial.write_text(json.dumps(config, indent=1))
    return fingerprint


def check_backbone(folder, config):
    """BadInput if the weights of a saved backbone do not have the fingerprint in its `config`."""
    path = Path(folder, SINGLE)
    known = isinstance(getattr(torch, str(config.raw.get("dtype")), None), torch.dtype)
    if not known or not path.exists() or hash_of([path]) != config.raw.get("koff_fingerprint"):
        raise BadInput(f"{path} is not as it was saved; copy the folder again, or train the run again.")


def tensors_of(memories):
    """The tensors of {block: `Memory`} by their saved names.

    LoRA is "layers.{i}.{projection}.lora_A" and ".lora_B". Every other tensor is "layers.{i}.{field}".
    """
    tensors = {}
    for i, memory in memories.items():
        for name, (a, b) in memory.lora.items():
            tensors[f"layers.{i}.{name}.lora_A"] = a
            tensors[f"layers.{i}.{name}.lora_B"] = b
        for f in fields(memory):
            value = getattr(memory, f.name)
            if isinstance(value, torch.Tensor):
                tensors[f"layers.{i}.{f.name}"] = value
    return {name: tensor.clone() for name, tensor in tensors.items()}  # safetensors refuses shared memory


def refuse_other_tensors(memories, consequence):
    """BadInput if a `Memory` has a tensor that a fork has added to LoRA, keys and values."""
    for memory in memories.values():
        for f in fields(memory):
            if f.name not in ("keys", "values") and isinstance(getattr(memory, f.name), torch.Tensor):
                raise BadInput(f"the memories have a tensor {f.name!r}: {consequence}.")


def save_module(path, memories, fingerprint):
    """Write the memories of one domain and the fingerprint of their backbone."""
    write_tensors(path, tensors_of(memories), backbone=fingerprint)


def load_module(path, config, dtype, device="cpu"):
    """{block: `Memory`} of a saved module. BadInput if it was trained with another backbone than `config`'s."""
    tensors, about = read_tensors(path, device)
    # A module fits the open channels of its own backbone. On another backbone it would load and mean nothing.
    made_for = about.get("backbone")
    if made_for is None or made_for != config.raw.get("koff_fingerprint"):
        raise BadInput(f"{path} was trained with another backbone ({made_for}); load it with the run it belongs to.")
    memories = {}
    try:
        for name, tensor in tensors.items():
            _, i, part, *half = name.split(".")  # layers.7.down.lora_A, or layers.7.keys
            memory = memories.setdefault(range(config.num_hidden_layers)[int(i)], Memory())
            if half:
                a = tensors[f"layers.{i}.{part}.lora_A"]
                b = tensors[f"layers.{i}.{part}.lora_B"]
                memory.lora[part] = (a.to(dtype), b.to(dtype))
            else:
                setattr(memory, part, tensor.to(dtype))
    except MALFORMED:
        raise BadInput(f"{path} is not a module of this version; train it again.") from None
    return memories


def save_gates(path, gates, mask):
    """Write every log alpha and the final mask, each [N, channels]."""
    tensors = {f"log_alpha.{name}": a for name, a in gates.log_alpha.items()}
    for name, is_open in mask.items():
        tensors[f"mask.{name}"] = is_open.to(torch.uint8)
    write_tensors(path, tensors)


def load_gates(path, gates):
    """Fill `gates` with the saved log alpha. Returns the final mask {name: bool [N, channels]}."""
    tensors, _ = read_tensors(path)
    mask = {}
    try:
        for name in gates.log_alpha:
            gates.log_alpha[name].data.copy_(tensors[f"log_alpha.{name}"])
            mask[name] = tensors[f"mask.{name}"].bool()
    except (LookupError, RuntimeError):
        raise BadInput(f"{path} has not the gates that settings.json asks for; train the run again.") from None
    return mask
