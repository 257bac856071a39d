"""A run's folder, and the way into it.

Opening a run always takes the same way: settings -> the model's folder -> config.json and what has to fit it -> text
-> weights. `train.py` puts a Trainer on top (`open_run`). What looks at a finished run begins with `Run` or
`open_finished`.
"""

import contextlib
import math
import os
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

import koff
from data import BadInput, discard, discard_all, only_process, read_tensors
from data.chat_template import ChatTemplate
from data.checkpoint import (
    BESIDE,
    SINGLE,
    check_backbone,
    digest,
    load,
    load_gates,
    load_module,
    possible_sizes,
    read_config,
)
from data.corpus import Split, domains_in, find_domains, load_text, passages
from data.hub import model_folder
from data.router import Router
from data.settings import Settings, flag
from data.tokenizer import Tokenizer

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
    first_gated, _, _ = s.first_blocks(config.num_hidden_layers)
    with possible_sizes(s.model):
        gates = koff.Gates(config, first_gated, s.granularity, gated=s.gated)
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
    """What a run trains on. train {domain: ids}; general: ids for retention, or None; splits {domain: what was read};
    inputs {what: its hash}: a run goes on only with the same."""

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
        split = reader.read(path, math.ceil(training / s.text), heldout)
        text.splits[name] = split
        text.train[name] = split.train[: int(len(split.train) * s.text)]
    if s.retention == "domains":
        text.general = np.concatenate(list(text.train.values()))
    elif s.retention:
        split = reader.read(s.retention, training, 0)
        text.splits["--retention"] = split  # no domain can have this name
        text.general = split.train
    for name, split in text.splits.items():
        text.inputs[f"text of {name}"] = split.key
    return text


def check_same(folder, what, before, now):
    """BadInput unless the hash of `what` is now as it was before, when the run in the folder began."""
    if before != now:
        raise BadInput(f"{folder} began with another {what}; bring that back, or train anew (--fresh).")


def finished(s, out, fresh=False):
    """Is the run `s` in `out` complete? BadInput if the folder holds something else."""
    ours = out / "settings.json"
    if Path(s.data).resolve() in out.resolve().parents:
        raise BadInput(f"{out} lies within the text in {s.data}; name another folder with --out.")
    if not ours.exists():
        # Names with a dot are not looked at: a lock, a cache.
        if out.exists() and (not out.is_dir() or any(out.glob("[!.]*"))):
            raise BadInput(f"{out} holds something that is not a run; name another folder with --out.")
        return False
    old = Settings.from_file(ours)
    if fresh:
        return False
    # The same command finds its own run again; any other would mix two runs in one folder.
    stopped = (out / "checkpoint.pt").exists()
    for name, value in asdict(s).items():
        moved = stopped and name in ("model", "data")  # the checkpoint knows them by their hash, wherever they are
        if getattr(old, name) != value and not moved:
            raise BadInput(f"{out} holds another run ({flag(name)} differs); name another --out, or say --fresh.")
    return not stopped and (out / "results.json").exists() and (out / "router.safetensors").exists()


# All that is written about a run by train.py and report, which hold it,
HELD = [
    "checkpoint.pt", "log.jsonl", "gates.safetensors", "router.safetensors", "results.json", "report.md",
    "later/*/settings.json", "later/*/checkpoint.pt", "later/*/log.jsonl",
    "backbone/config.json", *[f"backbone/{name}" for name in (SINGLE, *BESIDE)],
]  # fmt: skip
# and by lape, probes and plot. (A benchmark and an export know their run.)
WRITTEN = [
    *HELD, "lape.safetensors", "lape.json", "lape.md", "probes.json", "probes.md",
    "layers.png", "swap.png", "curves.png", "lape.png",
]  # fmt: skip


def half_written(names):
    """The temporary names of `atomic` for some files."""
    parts = [name.rpartition("/") for name in names]
    return [f"{folder}{slash}.{name}.????????.part" for folder, slash, name in parts]


def tidy(out):
    """Remove what processes that held a run and were killed had half-written. The folder is held by this one now."""
    discard_all(out, half_written([*HELD, "settings.json", "modules/*.safetensors"]))


def erase(out, s):
    """Remove an old run from its folder, where the run `s` begins. What else the folder holds stays."""
    # These make it a run. Whenever the process is killed, what is left is taken for a run that has not begun.
    discard_all(out, ["results.json", "router.safetensors", "checkpoint.pt"])
    s.to_file(out / "settings.json")
    discard_all(out, [*WRITTEN, *half_written(WRITTEN)])
    for path in out.glob("modules/*.safetensors"):
        with contextlib.suppress(BadInput):
            if "backbone" in read_tensors(path)[1]:  # a module of ours
                discard(path)


# After it ------------------------------------------------------------------------------------------------------------


class Run:
    """A saved run, as its folder has it: settings, backbone, modules, router. Only `gates` needs the pretrained model.

    run = Run("out/handbook"); run.backbone(tokens, module=run.module("french")) -> logits [B, T, V]
    """

    def __init__(self, folder, device="auto", dtype=None):
        self.folder = Path(folder)
        self.settings = Settings.from_file(self.folder / "settings.json")
        if not (self.folder / "router.safetensors").exists():  # the last part that train.py saves
            raise BadInput(f"{self.folder} is not finished; continue it with the train.py command that began it.")
        self.device = pick_device(device)
        # What was saved in bfloat16 is computed in float32 where that is faster.
        self.dtype = dtype or pick_dtype(self.settings.dtype, self.device)
        self.tokenizer = Tokenizer.from_folder(self.folder / "backbone")
        self.router = Router.load(self.folder / "router.safetensors")
        self.names = [name for name in self.router.domains if self.module_path(name).exists()]
        self.loaded = {}  # modules, once they were asked for

    @cached_property
    def config(self):
        return read_config(self.folder / "backbone")

    @cached_property
    def backbone(self):
        check_backbone(self.folder / "backbone", self.config)
        return load(self.folder / "backbone", self.dtype, self.device)

    def module_path(self, name):
        return self.folder / "modules" / f"{name}.safetensors"

    def module(self, name):
        """{block: `Memory`} of one domain, to be given to the backbone."""
        if name not in self.names:
            raise BadInput(f"{self.folder} has no module {name!r}; it has {', '.join(self.names) or 'none'}.")
        if name not in self.loaded:
            self.loaded[name] = load_module(self.module_path(name), self.config, self.dtype, self.device)
        return self.loaded[name]

    @property
    def modules(self):
        """{domain: {block: `Memory`}}, all of them."""
        return {name: self.module(name) for name in self.names}

    def gates(self, base):
        """The learnt gates, and the final mask {name: bool [N, channels]}."""
        s = self.settings
        first_gated, _, _ = s.first_blocks(len(base.layers))
        gates = koff.Gates(base.config, first_gated, s.granularity, s.beta_end or s.beta, s.gated)
        return gates, load_gates(self.folder / "gates.safetensors", gates)


@contextlib.contextmanager
def held(folder, device="auto"):
    """Yield the `Run` in a folder, which no other process changes meanwhile; BadInput if one is about to."""
    Run(folder, device)  # a lock is no thing to leave in a folder that has no run
    with only_process(Path(folder)):
        tidy(Path(folder))
        yield Run(folder, device)  # what may have changed until now is read again


def open_finished(folder, device="auto"):
    """What an evaluation looks at: the run, its unpruned model, its text {domain: Split}. BadInput where the model or a
    text is another than in training: what was held out could have been trained on."""
    run = Run(folder, device)
    text = texts_of(run)
    return run, unpruned_model(run), text


def unpruned_model(run):
    """The model that a run began with; BadInput where its folder holds another one now."""
    pretrained = model_folder(run.settings.model)
    check_same(run.folder, "model", run.config.raw.get("koff_model"), digest(pretrained))
    return load(pretrained, run.dtype, run.device)


def starting_context(model, ids, s, first):
    """{block: `Memory`} from block `first` on, what the KV memory of a domain starts from: the best of the passages of
    its training text, ids. (With --kv-init normal it starts from noise; then this is for comparison only.)"""
    device = model.head.device
    tried, judged = [torch.from_numpy(tokens).to(device) for tokens in passages(ids, s.kv_passages, s.kv_tokens)]
    return koff.best_context(model, tried, judged, first)


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
