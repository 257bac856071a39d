"""Open a training or a finished run: checks first, weights last.

The order is always the same: settings, the model's folder, config.json and everything that must fit it, text, weights.
train.py begins with `open_training`. Everything that uses a finished run begins with `Run` or `open_finished`.
"""

import contextlib
import math
import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from data import BadInput, fast, only_process
from data.chat_template import ChatTemplate
from data.checkpoint import check_backbone, digest, load, load_gates, load_module, possible_sizes, same_model
from data.corpus import Split, domains_in, find_domains, load_text
from data.families import read_config
from data.hub import model_folder
from data.life import check_same, is_saved, tidy
from data.router import Router
from data.settings import Settings, flag
from data.solve import check_solvable
from data.tokenizer import Tokenizer
from model import Model

# The machine ---------------------------------------------------------------------------------------------------------


def pick_device(name):
    """The torch device of --device. BadInput if it does not exist."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, ImportError):  # torch has no device of that name or number
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise BadInput(f"--device {name!r} is not there; give cpu, or cuda where torch finds a GPU.")
    return device


def pick_dtype(name, device):
    """The torch dtype of --dtype. "auto" is bfloat16 on hardware that multiplies it fast: a GPU of compute capability 8
    or more, a CPU with AVX512-BF16. Otherwise it is float32."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        is_fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        # This name is private to torch. If a version lacks it, we take float32.
        is_fast = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return torch.bfloat16 if is_fast else torch.float32


# Before a training ---------------------------------------------------------------------------------------------------


def fitting_gates(s):
    """The gates of a run on its model, whose weights are not needed. BadInput for settings that exceed the model."""
    config = read_config(model_folder(s.model, weights=False))
    if any(config.rows_left):
        raise BadInput(f"{s.model} is a backbone, from which channels are gone already; name the pretrained model.")
    # The tokens of a KV memory take positions, too.
    longest = max(s.seq_len, s.eval_len) + s.kv_tokens
    if longest > config.max_position_embeddings:
        limit = config.max_position_embeddings
        raise BadInput(f"{longest} tokens, --kv-tokens included, exceed the model's context of {limit}; lower them.")
    for name in ("blocks", "memory_blocks"):
        wanted = getattr(s, name)
        if wanted > config.num_hidden_layers:
            blocks = config.num_hidden_layers
            raise BadInput(f"{flag(name)} is {wanted}, but {s.model} has {blocks} blocks; give fewer.")
    with possible_sizes(s.model):
        gates = s.new_gates(config)
    memories = {}
    if s.solves:
        with torch.device("meta"):
            memories = s.new_module(config).by_block(torch.float32)
    if s.solves or s.repair != "none":
        check_solvable(config, memories)
    if s.granularity == "neuron" and s.multiple > config.intermediate_size:
        raise BadInput(f"--multiple is {s.multiple}, but a block has {config.intermediate_size} neurons; give less.")
    all_closed = {name: torch.zeros_like(log_alpha) for name, log_alpha in gates.log_alpha.items()}
    most = gates.sparsity(all_closed, s.count).item()
    if not 0 <= s.sparsity < most:
        what = f"the gated parameters are {most:.3f} of the model by the {s.count} count"
        raise BadInput(f"sparsity {s.sparsity} cannot be reached: {what}; lower --sparsity or gate more --blocks.")
    return gates


@dataclass
class Text:
    """The text of a run. A stopped run continues only with the same inputs.

    train {domain: ids}; general: ids for retention, or None; repair {name: ids}, on which the backbone is repaired, or
    empty; splits {domain: `Split`}; inputs {input: its hash}.
    """

    train: dict[str, np.ndarray]
    general: np.ndarray | None = None
    repair: dict[str, np.ndarray] = field(default_factory=dict)
    splits: dict[str, Split] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)


class TextReader:
    """Reads text for the run in the folder `out`, with the tokenizer and chat template of the model in `folder`.

    The cache of ids is beside the run folders, which share it. If we cannot write there, it is in the run's folder.
    """

    def __init__(self, folder, config, out):
        self.tokenizer = Tokenizer.from_folder(folder, config.vocab_size)
        self.template = ChatTemplate.from_folder(folder)
        self.separator = config.eos_token_ids[0] if config.eos_token_ids else None  # ends each document
        alone = out.is_dir() and not os.access(out.parent, os.W_OK)  # for example, a mounted volume
        self.cache = (out if alone else out.parent) / ".tokens"
        if self.separator is not None and self.separator >= config.vocab_size:
            raise BadInput(f"{folder}: eos_token_id is {self.separator}, beyond the {config.vocab_size} rows; mend it.")

    def read(self, path, training, heldout, known=None):
        """The `Split` of one domain. BadInput if it has fewer tokens than `training` or `heldout`."""
        need = (training, heldout)
        return load_text(path, self.tokenizer, self.cache, self.separator, self.template, need, known)


def read_training_text(s, reader, paths=None):
    """The `Text` of a run. BadInput if any part is too short. paths {domain: its text} replace those of `s.data`."""
    if paths is None:
        paths = find_domains(s.data, s.domains, least=1 if s.domains else 2)
    memories_learn = s.steps - s.gate_steps if s.order == "prune-first" else s.steps
    if s.memory and 0 < memories_learn < len(paths):
        raise BadInput(f"{len(paths)} memories cannot learn in {memories_learn} steps; raise --steps.")
    # A text must hold one batch, and enough tokens to train and test the router.
    one_batch = max(s.batch, s.retention_batch) * (s.seq_len + 1)  # + 1: room for a random offset
    training = max(one_batch, 10 * Router.WINDOW)
    heldout = max(s.eval_len, Router.WINDOW)

    text = Text({})
    for name, path in paths.items():
        text.splits[name] = reader.read(path, math.ceil(training / s.text_share), heldout)
        ids = text.splits[name].train
        text.train[name] = ids[: int(len(ids) * s.text_share)]
    if s.retention == "domains":
        text.general = np.concatenate(list(text.train.values()))
    elif s.retention:
        text.splits["--retention"] = reader.read(s.retention, training, 0)  # no domain can have this name
        text.general = text.splits["--retention"].train
    if s.repair == "domains":
        text.repair = text.train
    elif s.repair != "none":
        text.splits["--repair"] = reader.read(s.repair, training, 0)
        text.repair = {"--repair": text.splits["--repair"].train}
    for name, split in text.splits.items():
        text.inputs[f"text of {name}"] = split.key
    return text


@dataclass
class Opened:
    """The pretrained model of a run, its folder, and the run's text."""

    model: Model
    text: Text
    folder: Path


def open_training(s, out, paths=None):
    """Check all inputs of a run before anything is written. paths: see `read_training_text`."""
    if str(out) != str(out).encode(errors="replace").decode():
        raise BadInput(f"--out {out} is not UTF-8, which safetensors needs; give another name.")
    # Cheap checks come first, gigabytes of weights last.
    config = fitting_gates(s).config
    device = pick_device(s.device)
    folder = model_folder(s.model)
    text = read_training_text(s, TextReader(folder, config, out), paths)
    text.inputs["model"] = digest(folder)
    model = load(folder, pick_dtype(s.dtype, device), device)
    # All checks have passed. Only now is the cache of token ids written.
    for split in text.splits.values():
        split.store()
    return Opened(model, text, folder)


# A finished run ------------------------------------------------------------------------------------------------------


class Run:
    """A saved run: settings, backbone, modules, router. Only `gates` needs the pretrained model.

    run = Run("out/handbook"); run.backbone(tokens, memories=run.memories("french")) -> logits [B, T, V]
    model, memories = run.attached("french"); model(tokens, memories=memories) -> the same, in less time for long texts
    """

    def __init__(self, folder, device="auto", dtype=None):
        self.folder = Path(folder)
        self.settings = Settings.from_file(self.folder / "settings.json")
        if not is_saved(self.folder):
            raise BadInput(f"{self.folder} is not finished; continue it with the train.py command that began it.")
        self.device = pick_device(device)
        # A backbone saved in bfloat16 still runs in float32 on hardware where that is faster.
        self.dtype = dtype or pick_dtype(self.settings.dtype, self.device)
        self.tokenizer = Tokenizer.from_folder(self.folder / "backbone", self.config.vocab_size)
        self.router = Router.load(self.folder / "router.safetensors")
        self.names = [name for name in self.router.domains if self.module_path(name).exists()]
        self.loaded = {}  # {domain: its memories}, once somebody asked for them
        self.merged = {}  # {domain: `attached`}, of the last one only

    @cached_property
    def config(self):
        return read_config(self.folder / "backbone")

    @cached_property
    def backbone(self):
        check_backbone(self.folder / "backbone", self.config)
        return load(self.folder / "backbone", self.dtype, self.device)

    def module_path(self, name):
        return self.folder / "modules" / f"{name}.safetensors"

    def memories(self, name):
        """{block: `Memory`} of one domain, an argument of the backbone."""
        if name not in self.names:
            raise BadInput(f"{self.folder} has no module {name!r}; it has {', '.join(self.names) or 'none'}.")
        if name not in self.loaded:
            self.loaded[name] = load_module(self.module_path(name), self.config, self.dtype, self.device)
        return self.loaded[name]

    def attached(self, name=None):
        """(model, memories) that read a text with the module `name`, or with none. See `fast.merged`."""
        if name is None:
            return self.backbone, None
        if name not in self.merged:
            memories = self.memories(name)
            self.merged.clear()  # matrices of one module at a time
            self.merged[name] = fast.merged(self.backbone, memories)
        return self.merged[name]

    @property
    def modules(self):
        """{domain: {block: `Memory`}} of all domains."""
        return {name: self.memories(name) for name in self.names}

    def gates(self, base):
        """(the learned gates, the final mask {name: bool [N, channels]})."""
        gates = self.settings.new_gates(base.config)
        gates.beta = self.settings.beta_end or self.settings.beta
        return gates, load_gates(self.folder / "gates.safetensors", gates)


@contextlib.contextmanager
def held(folder, device="auto"):
    """Yield the `Run` in a folder, and keep other processes from changing it. BadInput if one is at work there."""
    Run(folder, device)  # BadInput for a folder without a run, before we leave a lock file there
    with only_process(Path(folder)):
        tidy(Path(folder))
        yield Run(folder, device)  # read again: another process may have changed it before we held the lock


def open_finished(folder, device="auto"):
    """(run, its unpruned model, its text {domain: Split}), for an evaluation.

    BadInput if the model or a text has changed since training: the run could have trained on text that is now held out.
    """
    run = Run(folder, device)
    text = texts_of(run)
    return run, unpruned_model(run), text


def unpruned_model(run):
    """The pretrained model of a run. BadInput if its folder now holds another model."""
    pretrained = model_folder(run.settings.model)
    check_model(run, pretrained)
    return load(pretrained, run.dtype, run.device)


def check_model(run, folder):
    """BadInput unless the folder holds the pretrained model of the run."""
    if not same_model(folder, run.config.raw.get("koff_model")):
        raise BadInput(f"{run.folder} began with another model; bring that back, or train anew (--fresh).")


def check_complete(run):
    """BadInput if the file of a module is missing. Otherwise tables without it would overwrite the complete ones."""
    for name in run.router.domains if run.settings.memory else ():
        if name not in run.names:
            forget = f"or forget the module: eval.py remove {run.folder} {name}"
            raise BadInput(f"{run.module_path(name)} does not exist; bring it back, {forget}.")


def texts_of(run):
    """{domain: `Split`} of a run. BadInput for a text that has changed since training."""
    reader = TextReader(run.folder / "backbone", run.config, run.folder)
    heldout = max(run.settings.eval_len, Router.WINDOW)
    text = {}
    for name, path in paths_of(run).items():
        text[name] = reader.read(path, 0, heldout, run.router.keys[name])
        check_same(run.folder, f"text of {name}", run.router.keys[name], text[name].key)
    return text


def paths_of(run):
    """{domain: path of its text}."""
    # The router knows the paths of domains that were added later. The others are in the folder of the settings.
    names = run.names or run.router.domains
    there = domains_in(Path(run.settings.data), names) | run.router.paths
    paths = {}
    for name in names:
        if name not in there:
            raise BadInput(f"{run.settings.data} has no {name}, on which {run.folder} was trained.")
        paths[name] = Path(there[name])
    return paths
