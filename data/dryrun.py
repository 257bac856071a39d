"""What a run will need, from config.json alone: `python train.py --dry-run`.

Its steps run on fake tensors, which have shapes and no numbers, while the bytes of living tensors are counted.
"""

import contextlib
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

import koff
from data import BadInput, out_of_memory
from data.corpus import find_domains
from data.run import fitting_gates
from data.scores import surgeon_scores
from data.settings import flag
from data.solve import repair_student, solve_module
from data.starts import spread_by_rank, text_context
from model import Model

try:  # torch does not promise to keep these names; without them there is no dry run
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves
except ImportError:
    FakeTensorMode, TorchDispatchMode = None, object


class Usage(TorchDispatchMode):
    """Counts the bytes of living tensors made under it: `now`, and the most that ever lived (`peak`)."""

    def __init__(self):
        super().__init__()
        self.now = 0
        self.peak = 0
        self.alive = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.born(tensor.untyped_storage())
        return out

    def born(self, storage):
        key = id(storage)
        if key not in self.alive:  # otherwise it is a view, or written in place
            self.alive.add(key)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.gone, key, storage.nbytes())

    def gone(self, key, size):
        self.alive.discard(key)
        self.now -= size

    def of(self, function, *args):
        """Bytes that a call needs above those before it."""
        before = self.now
        self.peak = before
        function(*args)
        return self.peak - before


def estimate(s, Trainer, domains):
    """({tensors that stay: bytes}, {phase: bytes that it needs beside them}) of the run `s` on so many domains.

    `Trainer` is train.py's.
    """
    gates = fitting_gates(s)
    config = gates.config
    # Nobody knows yet which gates will close: here chance decides.
    torch.manual_seed(s.seed)
    spread_by_rank(gates, {name: torch.rand(a.shape) for name, a in gates.log_alpha.items()})
    mask = gates.final_mask(s.sparsity, s.count)
    kept = koff.kept_channels(mask, config, gates.first_block, "cpu")
    # Sized as on a GPU, whatever is here: --dtype auto is bfloat16.
    dtype = torch.bfloat16 if s.dtype == "auto" else getattr(torch, s.dtype)
    with torch.device("meta"):
        model = Model(config).to(dtype).requires_grad_(False)
    # From here on no tensor has numbers and none takes memory: an 8B model is measured on a laptop.
    with FakeTensorMode(allow_non_fake_inputs=True), Usage() as usage:
        state = {name: torch.empty(t.shape, dtype=t.dtype) for name, t in model.state_dict().items()}
        model.load_state_dict(state, assign=True)
        del state
        stay = {f"weights, {dtype}": usage.now}
        trainer = Trainer(model, replace(s, offload=False), ["one"])  # the other domains' modules are added below
        before = usage.now
        if s.kv_from_text:
            text = torch.zeros(s.kv_tokens, dtype=torch.int64)
            trainer.contexts["one"] = text_context(model, text, trainer.modules["one"].first_block)
        stay["texts that KV memories start from, as keys and values"] = domains * (usage.now - before)

        # Only one domain's module is at work at a time, and only one phase.
        tokens = torch.zeros(s.batch, s.seq_len, dtype=torch.int64)
        phases = {}
        score = koff.SCORES[s.gate_init]
        if score is surgeon_scores:  # otherwise its loop over neurons takes long here
            score = partial(score, at_once=4096)
        if score:
            phases["a batch of the gates' score"] = usage.of(score, model, trainer.gates, [[tokens]])
        if s.gate_steps:
            trainer.learn(tokens, "one", 0)  # the first step makes AdamW's state
            phases["a step with sampled gates"] = usage.of(trainer.learn, tokens, "one", 0)
        before = usage.now
        # As `Trainer.freeze_mask` does, which needs numbers to see the channels that a mask leaves.
        trainer.kept = kept
        trainer.student = koff.materialise(model, kept)
        trainer.attached = s.memory
        student = usage.now - before
        if text := text_of_repair(s, domains):
            phases["the materialised student, and repairing"] = student + usage.of(repair_student, trainer, text)
            student = usage.now - before  # now it has matrices of its own
        recover = 0
        if s.memory and s.steps > s.gate_steps:
            trainer.recover(tokens, "one", 0)  # again, without AdamW's state
            recover = usage.of(trainer.recover, tokens, "one", 0)
        phases["the materialised student, and a step under the final mask"] = student + recover
        if s.solves:
            ids = np.zeros(s.solve_tokens + s.seq_len, dtype=np.int64)
            phases["the materialised student, and solving"] = student + usage.of(solve_module, trainer, "one", ids)

    on_device = koff.count_parameters(gates) + size_of_module(s, config) * (1 if s.offload else domains)
    stay["modules and gates, float32"] = 4 * on_device
    stay["their AdamW state"] = 8 * on_device if s.steps else 0
    return stay, phases


def text_of_repair(s, domains):
    """Text of the repair's size, {name: ids}."""
    names = {"none": (), "domains": range(domains)}.get(s.repair, ["a text"])
    return {name: np.zeros(s.repair_tokens // len(names) + s.seq_len, dtype=np.int64) for name in names}


def size_of_module(s, config):
    """The parameters of one module of the run."""
    with torch.device("meta"):
        return koff.count_parameters(s.new_module(config)) if s.memory else 0


def peak(stay, phases):
    """Gigabytes that an `estimate` adds up to."""
    return (sum(stay.values()) + max(phases.values())) / 1e9


def dry_run(s, Trainer):
    """Print the sizes and the memory of the run `s`, and which flags would lower it. `Trainer` is train.py's.

    BadInput for a torch without fake tensors.
    """
    if FakeTensorMode is None:
        raise BadInput(f"--dry-run needs fake tensors, which torch {torch.__version__} has elsewhere; omit it.")
    gates = fitting_gates(s)
    # Without a folder of text, the fewest domains that make sense.
    domains = len(find_domains(s.data, s.domains)) if Path(s.data).is_dir() else 2
    print(f"{gates.total:,} parameters; {koff.count_parameters(gates):,} gates in {gates.blocks} blocks")
    print(f"{size_of_module(s, gates.config):,} parameters a module, {domains} modules")
    stay, phases = estimate(s, Trainer, domains)
    for what, size in (stay | phases).items():
        print(f"{size / 1e9:9.3f} GB  {what}")
    print(f"{peak(stay, phases):9.3f} GB  peak memory")
    print(f"less with: {knobs(s, on_gpu=True)}")


def knobs(s, on_gpu):
    """The flags that would lower the peak, as text."""
    flags = []
    for name, least in ("batch", 1), ("seq_len", 16):
        half = getattr(s, name) // 2
        if half >= least:
            flags.append(f"{flag(name)} {half}")
    for name in ("checkpointing", "offload"):
        if not getattr(s, name) and (name != "offload" or on_gpu):
            flags.append(flag(name))
    return ", ".join(flags) or "a smaller model"


@contextlib.contextmanager
def enough_memory(trainer):
    """Under it, running out of memory becomes a BadInput: how much the training needs, and which flags lower that."""
    try:
        yield
    except Exception as error:
        if not out_of_memory(error) or FakeTensorMode is None:
            raise
        s = replace(trainer.s, dtype=str(trainer.model.head.dtype).removeprefix("torch."))
        size = peak(*estimate(s, type(trainer), len(trainer.domains)))
        less = knobs(s, trainer.device.type == "cuda")
        raise BadInput(f"there is not enough memory: this takes about {size:.3g} GB, and less with {less}.") from None
