"""A run's folder, and the way into it: settings, model, text, device and dtype, each looked up in one place."""

import contextlib
import ctypes
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

import torch

import koff
from data import BadInput
from data.chat_template import ChatTemplate
from data.checkpoint import load, load_gates, load_module, read_config
from data.corpus import find_domains, load_text
from data.router import Router
from data.settings import Settings
from data.tokenizer import Tokenizer


def pick_device(name):
    usual = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.empty(0, device=usual if name == "auto" else name).device
    except (RuntimeError, AssertionError):  # torch has no device of that name or number
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise BadInput(f"--device {name!r} is not there; give cpu, or cuda where torch finds a GPU.")
    return found


def pick_dtype(name, device):
    if name != "auto":
        return getattr(torch, name)
    cpu_has_it = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return torch.bfloat16 if device.type == "cuda" or (device.type == "cpu" and cpu_has_it()) else torch.float32


def keep_pages():
    """Keep freed memory in the process: large short-lived tensors cost Linux more in page faults than in arithmetic."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # not glibc: nothing to do
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no private mappings
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: do not give the heap back


def reading(out, tokenizer, config, folder):
    """How a run reads text: one token cache beside the run folders; an eos id ends each document; conversations become
    text as the model in `folder` has it."""
    template, ends = ChatTemplate.from_folder(folder), (*config.eos_token_ids, None)
    return dict(tokenizer=tokenizer, cache=out.parent / ".tokens", separator=ends[0], template=template)


def fitting(s):
    """(config, gates) of the model; BadInput where --blocks or --sparsity ask for more than it has."""
    config = read_config(s.model)
    if min(first := s.first(config.num_hidden_layers)) < 0:
        most = max(s.blocks, s.memory_blocks)
        raise BadInput(f"--blocks is {most}, but {s.model} has {config.num_hidden_layers} blocks; give fewer.")
    gates = koff.Gates(config, first[0], s.granularity, gated=s.gated)
    most = gates.sparsity({name: torch.zeros(a.shape) for name, a in gates.log_alpha.items()}, s.count).item()
    if not 0 <= s.sparsity < most:
        what = f"the gated parameters are {most:.3f} of the model by the {s.count} count"
        raise BadInput(f"sparsity {s.sparsity} cannot be reached: {what}; lower --sparsity or gate more --blocks.")
    return config, gates


def finished(s, out, fresh=False):
    """Is the run `s` in `out` complete? BadInput if the folder holds something else."""
    ours = out / "settings.json"
    if out.exists() and not ours.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BadInput(f"{out} holds something that is not a run; name another folder with --out.")
    if fresh or not ours.exists():
        return False
    old = asdict(Settings.from_file(ours))
    if changed := [name for name, value in asdict(s).items() if old[name] != value]:
        flag = "--" + changed[0].replace("_", "-")
        raise BadInput(f"{out} holds another run ({flag} differs); name another --out, or say --fresh.")
    return (out / "results.json").exists()


class Run:
    """A saved run, as its folder has it: settings, compact backbone, modules, router. Needs no base checkpoint."""

    def __init__(self, folder, device="auto", dtype=None):
        self.folder = Path(folder)
        self.settings = Settings.from_file(self.folder / "settings.json")
        if not (self.folder / "router.safetensors").exists():  # the last part that train.py saves
            raise BadInput(f"{self.folder} is not finished; continue it with the train.py command that began it.")
        self.device = pick_device(device)
        self.dtype = dtype or pick_dtype(self.settings.dtype, self.device)
        self.tokenizer = Tokenizer.from_folder(self.folder / "backbone")
        self.router = Router.load(self.folder / "router.safetensors")
        self.names = [name for name in self.router.domains if self.module_path(name).exists()]
        self.loaded = {}

    @cached_property
    def backbone(self):
        return load(self.folder / "backbone", self.dtype, self.device)

    def module_path(self, name):
        return self.folder / "modules" / f"{name}.safetensors"

    def module(self, name):
        if name not in self.names:
            raise BadInput(f"{self.folder} has no module {name!r}; it has {', '.join(self.names) or 'none'}.")
        if name not in self.loaded:
            config = read_config(self.folder / "backbone")
            self.loaded[name] = load_module(self.module_path(name), config, self.dtype, self.device)
        return self.loaded[name]

    @property
    def modules(self):
        """{domain: {block: BlockMemory}}, all of them."""
        return {name: self.module(name) for name in self.names}

    def gates(self, base):
        """The learnt gates, and the final mask {name: bool [N, channels]}."""
        s = self.settings
        gates = koff.Gates(base.config, s.first(len(base.layers))[0], s.granularity, s.beta_end or s.beta, s.gated)
        return gates, load_gates(self.folder / "gates.safetensors", gates)


def opened(folder, device="auto"):
    """What an evaluation looks at: the run, its unpruned model, its text {domain: Split}."""
    run = Run(folder, device)
    s, base = run.settings, load(run.settings.model, run.dtype, run.device)
    how = reading(run.folder, run.tokenizer, base.config, run.folder / "backbone")
    how["need"] = (0, max(s.eval_len, Router.WINDOW))
    return run, base, {name: load_text(path, **how) for name, path in texts_of(run).items()}


def texts_of(run):
    """{domain: path of its text}: in the folder that the run was trained on, or where a later domain was found."""
    there, names = find_domains(run.settings.data) | run.router.paths, run.names or run.router.domains
    if missing := [name for name in names if name not in there]:
        raise BadInput(f"{run.settings.data} has no {missing[0]}, on which {run.folder} was trained.")
    return {name: Path(there[name]) for name in names}
