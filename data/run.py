"""A run's folder seen from outside: what a training needs before it starts, and a finished run to look at.

Opening always takes the same way: settings -> the model's folder -> config.json and whatever has to fit it -> text ->
weights. `open_training` is for train.py; whatever looks at a finished run begins with `Run` or `open_finished`.
"""

import contextlib
import math
import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from data import BadInput, only_process
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
    """The torch device of --device; BadInput for one that is not there."""
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
    """The torch dtype of --dtype; "auto" is bfloat16 where its products are fast: a GPU of compute capability 8 or
    more, a CPU with AVX512-BF16."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        # A private name of torch: where it is gone, float32 is never wrong.
        fast = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return torch.bfloat16 if fast else torch.float32


# Before a training ---------------------------------------------------------------------------------------------------


def fitting_gates(s, config):
    """The gates of a run on a model; BadInput where --blocks, --sparsity or --seq-len ask for more than it has."""
    if any(config.rows_left):
        raise BadInput(f"{s.model} is a backbone, from which channels are gone already; name the pretrained model.")
    # A memory's tokens take positions too.
    longest = max(s.seq_len, s.eval_len) + s.kv_tokens
    if longest > config.max_position_embeddings:
        limit = config.max_position_embeddings
        raise BadInput(f"{longest} tokens, --kv-tokens included, exceed the model's context of {limit}; lower them.")
    for name in ("blocks", "memory_blocks"):
        wanted = getattr(s, name)
        if wanted > config.num_hidden_layers:
            have = f"{s.model} has {config.num_hidden_layers} blocks"
            raise BadInput(f"{flag(name)} is {wanted}, but {have}; give fewer.")
    with possible_sizes(s.model):
        gates = s.new_gates(config)
    if s.solves:
        with torch.device("meta"):
            module = s.new_module(config)
        check_solvable(config, module.by_block(torch.float32))
    if s.granularity == "neuron" and s.multiple > config.intermediate_size:
        raise BadInput(f"--multiple is {s.multiple}, but a block has {config.intermediate_size} neurons; give less.")
    # The most that could be removed: every gate closed.
    all_closed = {name: torch.zeros(a.shape) for name, a in gates.log_alpha.items()}
    most = gates.sparsity(all_closed, s.count).item()
    if not 0 <= s.sparsity < most:
        what = f"the gated parameters are {most:.3f} of the model by the {s.count} count"
        raise BadInput(f"sparsity {s.sparsity} cannot be reached: {what}; lower --sparsity or gate more --blocks.")
    return gates


@dataclass
class Text:
    """What a run trains on. train {domain: ids}; general: ids for retention, or None; splits {domain: `Split`};
    inputs {input: its hash}: a run goes on only with the same."""

    train: dict[str, np.ndarray]
    general: np.ndarray | None = None
    splits: dict[str, Split] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)


class TextReader:
    """How the run in the folder `out` reads text: with the tokenizer and chat template of its model's `folder`.

    The ids are kept beside the run folders, which share them; or in the run's own, where nobody may write beside it.
    """

    def __init__(self, folder, config, out):
        self.tokenizer = Tokenizer.from_folder(folder)
        self.template = ChatTemplate.from_folder(folder)  # conversations become text as this model has them
        self.separator = config.eos_token_ids[0] if config.eos_token_ids else None  # ends each document
        alone = out.is_dir() and not os.access(out.parent, os.W_OK)  # a mounted volume, say
        self.cache = (out if alone else out.parent) / ".tokens"
        if max(self.tokenizer.vocab_size - 1, *config.eos_token_ids, 0) >= config.vocab_size:
            rows = config.vocab_size
            raise BadInput(f"{folder}: tokenizer.json has ids beyond the model's {rows} rows; pair them.")

    def read(self, path, training, heldout):
        """The `Split` of one domain; BadInput for fewer training or held-out tokens than are needed."""
        return load_text(
            path, self.tokenizer, self.cache, separator=self.separator, template=self.template, need=(training, heldout)
        )


def read_training_text(s, reader, paths=None):
    """The `Text` of a run; BadInput where it is too short.

    `paths` {domain: its text}: where it is not that of `s.data`.
    """
    if paths is None:
        paths = find_domains(s.data, s.domains, least=1 if s.domains else 2)
    memories_learn = s.steps - s.gate_steps if s.order == "prune-first" else s.steps
    if s.memory and 0 < memories_learn < len(paths):
        raise BadInput(f"{len(paths)} memories cannot learn in {memories_learn} steps; raise --steps.")
    # At least one batch, and enough for the router to learn from and to be tested on.
    one_batch = max(s.batch, s.retention_batch) * (s.seq_len + 1)  # and room for a random offset
    training = max(one_batch, 10 * Router.WINDOW)
    heldout = max(s.eval_len, Router.WINDOW)

    text = Text({})
    for name, path in paths.items():
        split = reader.read(path, math.ceil(training / s.text_share), heldout)
        text.splits[name] = split
        text.train[name] = split.train[: int(len(split.train) * s.text_share)]
    if s.retention == "domains":
        text.general = np.concatenate(list(text.train.values()))
    elif s.retention:
        split = reader.read(s.retention, training, 0)
        text.splits["--retention"] = split  # no domain can have this name
        text.general = split.train
    for name, split in text.splits.items():
        text.inputs[f"text of {name}"] = split.key
    return text


@dataclass
class Opened:
    """What a training needs. `folder`: that of the pretrained model."""

    model: Model
    text: Text
    folder: Path


def open_training(s, out, paths=None):
    """Check everything that a run needs, before anything is written. `paths`: see `read_training_text`."""
    if str(out) != str(out).encode(errors="replace").decode():
        raise BadInput(f"--out {out} is not UTF-8, which safetensors needs; give another name.")
    # The order matters: cheap checks come first, gigabytes of weights come last.
    fitting_gates(s, read_config(model_folder(s.model, weights=False)))
    device = pick_device(s.device)
    folder = model_folder(s.model)
    config = read_config(folder)  # once more: the id that ends a turn is in a file that comes with the weights
    text = read_training_text(s, TextReader(folder, config, out), paths)
    text.inputs["model"] = digest(folder)
    model = load(folder, pick_dtype(s.dtype, device), device)
    check_predicts(s, model, text)
    # Everything is in order. The first files to be written are the cached token ids: the next run need not tokenise.
    for split in text.splits.values():
        split.store()
    return Opened(model, text, folder)


@torch.no_grad()
def check_predicts(s, model, text):
    """BadInput for a model that predicts NaN, though all of its weights are numbers."""
    ids = next(iter(text.train.values()))[: s.seq_len].astype(np.int64)
    tokens = torch.from_numpy(ids).to(model.head.device)
    if not model(tokens[None]).isfinite().all():
        raise BadInput(f"{s.model} predicts NaN; download it again, or say --dtype float32.")


# After it ------------------------------------------------------------------------------------------------------------


class Run:
    """A saved run, as its folder has it: settings, backbone, modules, router. Only `gates` needs the pretrained model.

    run = Run("out/handbook"); run.backbone(tokens, memories=run.memories("french")) -> logits [B, T, V]
    """

    def __init__(self, folder, device="auto", dtype=None):
        self.folder = Path(folder)
        self.settings = Settings.from_file(self.folder / "settings.json")
        if not is_saved(self.folder):
            raise BadInput(f"{self.folder} is not finished; continue it with the train.py command that began it.")
        self.device = pick_device(device)
        # What was saved in bfloat16 is computed in float32 where that is faster.
        self.dtype = dtype or pick_dtype(self.settings.dtype, self.device)
        self.tokenizer = Tokenizer.from_folder(self.folder / "backbone")
        self.router = Router.load(self.folder / "router.safetensors")
        self.names = [name for name in self.router.domains if self.module_path(name).exists()]
        self.loaded = {}  # memories, once they were asked for

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
        """{block: `Memory`} of one domain, to be given to the backbone."""
        if name not in self.names:
            raise BadInput(f"{self.folder} has no module {name!r}; it has {', '.join(self.names) or 'none'}.")
        if name not in self.loaded:
            self.loaded[name] = load_module(self.module_path(name), self.config, self.dtype, self.device)
        return self.loaded[name]

    @property
    def modules(self):
        """{domain: {block: `Memory`}}, all of them."""
        return {name: self.memories(name) for name in self.names}

    def gates(self, base):
        """The learnt gates, and the final mask {name: bool [N, channels]}."""
        gates = self.settings.new_gates(base.config)
        gates.beta = self.settings.beta_end or self.settings.beta
        return gates, load_gates(self.folder / "gates.safetensors", gates)


@contextlib.contextmanager
def held(folder, device="auto"):
    """Yield the `Run` in a folder, which no other process changes meanwhile; BadInput if one is about to."""
    Run(folder, device)  # BadInput before a lock file is left in a folder without a run
    with only_process(Path(folder)):
        tidy(Path(folder))
        yield Run(folder, device)  # read again: another process may have changed it until now


def open_finished(folder, device="auto"):
    """(run, its unpruned model, its text {domain: Split}), for an evaluation.

    BadInput if model or text differ from those in training: held-out text could have been trained on.
    """
    run = Run(folder, device)
    text = texts_of(run)
    return run, unpruned_model(run), text


def unpruned_model(run):
    """The model that a run began with; BadInput if its folder holds another one now."""
    pretrained = model_folder(run.settings.model)
    check_model(run, pretrained)
    return load(pretrained, run.dtype, run.device)


def check_model(run, folder):
    """BadInput unless the folder holds the model that a run began with."""
    if not same_model(folder, run.config.raw.get("koff_model")):
        raise BadInput(f"{run.folder} began with another model; bring that back, or train anew (--fresh).")


def check_complete(run):
    """BadInput where the file of a module is missing: tables of the others would take the place of those of all."""
    for name in run.router.domains if run.settings.memory else ():
        if name not in run.names:
            forget = f"or forget the module: eval.py remove {run.folder} {name}"
            raise BadInput(f"{run.module_path(name)} does not exist; bring it back, {forget}.")


def texts_of(run):
    """{domain: `Split`}: the text of each domain, where the run was trained on it or where a later one was found."""
    reader = TextReader(run.folder / "backbone", run.config, run.folder)
    heldout = max(run.settings.eval_len, Router.WINDOW)
    text = {}
    for name, path in paths_of(run).items():
        text[name] = reader.read(path, 0, heldout)
        check_same(run.folder, f"text of {name}", run.router.keys[name], text[name].key)
    return text


def paths_of(run):
    """{domain: path of its text}: in the folder that the run was trained on, or where a later domain was found."""
    # The router's own paths win: of domains that came later, or were renamed.
    names = run.names or run.router.domains
    there = domains_in(Path(run.settings.data), names) | run.router.paths
    paths = {}
    for name in names:
        if name not in there:
            raise BadInput(f"{run.settings.data} has no {name}, on which {run.folder} was trained.")
        paths[name] = Path(there[name])
    return paths
