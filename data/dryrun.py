"""What a run will need, from config.json alone: `python train.py --dry-run`.

Its steps run on fake tensors, which have shapes and no numbers, and what they would take is counted.
"""

import contextlib
import math
import weakref
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import koff
from data import BadInput, out_of_memory
from data.checkpoint import read_config
from data.corpus import JUDGED, find_domains
from data.hub import model_folder
from data.run import fitting_gates
from data.settings import flag
from model import Model

# torch counts no attention on a CPU, where these steps run. So many matrix products of the size Q K^T are in it:
ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: 2,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: 5,
}


class Usage(TorchDispatchMode):
    """Counts, of all that runs under it, the bytes of living tensors `now`, the most that ever lived (`peak`), and the
    floating-point `operations` of matrix products, two for each multiply-add."""

    def __init__(self):
        super().__init__()
        self.now = 0
        self.peak = 0
        self.operations = 0
        self.alive = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        # torch has a formula for each matrix product; what is not in one is not worth counting.
        kind = function._overloadpacket
        if kind in flop_registry:
            self.operations += flop_registry[kind](*args, **kwargs, out_val=out)
        elif kind in ATTENTION:
            query, key = args[:2] if ATTENTION[kind] == 2 else args[1:3]  # a gradient comes first in backward
            self.operations += ATTENTION[kind] * 2 * query.numel() * key.shape[2]
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.born(tensor.untyped_storage())
        return out

    def born(self, storage):
        key = storage._cdata
        if key in self.alive:  # a view, or written in place: nothing new
            return
        self.alive.add(key)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.gone, key, storage.nbytes())

    def gone(self, key, size):
        self.alive.discard(key)
        self.now -= size


@dataclass
class Phase:
    """One of the things that a run does.

    size: bytes that it needs above what is always there; operations: of one time; times: how often the run does it.
    """

    size: int
    operations: int
    times: float
    what: str

    @property
    def all_operations(self):
        return self.operations * self.times


@dataclass
class Needs:
    """What a run needs.

    gates, mask: those of the run, closed at random; dtype: of the weights; domains: how many; module, gate_count:
    parameters of one module, and of all gates; weights, trained, adamw, contexts: bytes that are there all the time;
    phases: {name: `Phase`}.
    """

    gates: koff.Gates
    mask: dict
    dtype: torch.dtype
    domains: int
    module: int
    gate_count: int
    weights: int
    trained: int
    adamw: int
    contexts: int
    phases: dict

    @property
    def peak(self):
        """Bytes, of GPU memory where there is a GPU: only one phase is at work at a time."""
        always = self.weights + self.trained + self.adamw + self.contexts
        return always + max(phase.size for phase in self.phases.values())


def estimate(s, Trainer, domains=None):
    """The `Needs` of the run `s`, on so many domains, if not all that its text has. `Trainer` is train.py's."""
    config = read_config(model_folder(s.model, weights=False))
    gates = fitting_gates(s, config)
    # How many modules there will be: one a domain; without a folder of text, the fewest that make sense.
    if domains is None:
        domains = len(find_domains(s.data, s.domains)) if Path(s.data).is_dir() else 2
    torch.manual_seed(s.seed)
    # Before training nobody knows what will close: chance decides here.
    gates.start_from({name: torch.rand(a.shape) for name, a in gates.log_alpha.items()})
    mask = gates.final_mask(s.sparsity, s.count, s.multiple)
    kept = koff.kept_channels(mask, config, gates.first, "cpu")
    # Sized as on a GPU, whatever is here: --dtype auto is bfloat16.
    dtype = torch.bfloat16 if s.dtype == "auto" else getattr(torch, s.dtype)
    with torch.device("meta"):
        model = Model(config).to(dtype)

    # From here on no tensor has numbers, and none takes memory: an 8B model is measured on a laptop.
    with FakeTensorMode(allow_non_fake_inputs=True), Usage() as usage:
        state = {name: torch.empty(t.shape, dtype=t.dtype) for name, t in model.state_dict().items()}
        model.load_state_dict(state, assign=True)
        del state
        weights = usage.now
        # One domain is enough: what the others own is added below, and only one is at work at a time.
        trainer = Trainer(model.requires_grad_(False), s, ["one"])
        tokens = torch.zeros(s.batch, s.seq_len, dtype=torch.int64)
        phases = {}
        if s.gate_init in koff.SCORES:
            phases["score"] = scoring(usage, trainer, tokens, domains)
        context = 0
        if s.kv_from_text:
            before = usage.now
            first = trainer.modules[0].first
            trainer.contexts["one"] = koff.text_context(model, tokens.flatten()[: s.kv_tokens], first)
            context = usage.now - before
            if s.kv_passages > 1:
                phases["judge"] = judging(usage, trainer, domains)
        phases["learn"] = learning(usage, trainer, tokens)
        before = usage.now
        trainer.mask = mask  # as `Trainer.freeze_mask` does; fake tensors cannot say which channels a mask leaves
        trainer.kept = kept
        trainer.student = koff.materialise(model, kept)
        student = usage.now - before
        phases["recover"] = recovering(usage, trainer, tokens, student)
        if trainer.unsolved():
            phases["solve"] = solving(usage, trainer, domains, student)

    gate_count = koff.count_parameters(trainer.gates)
    module = koff.count_parameters(trainer.modules)
    on_device = gate_count + module * (1 if s.offload else domains)
    # In float32 a parameter takes 4 bytes, and its two means in AdamW 8.
    adamw = 8 * on_device if s.steps else 0
    return Needs(
        gates, mask, model.head.dtype, domains, module, gate_count,
        weights, 4 * on_device, adamw, domains * context, phases,
    )  # fmt: skip


# The phases. `usage` counts what they do with the `trainer` on fake tokens [batch, seq_len].


def usage_of(usage, function, *args):
    """(bytes above what is there before it, operations) of one call."""
    before = usage.now
    usage.peak = before
    usage.operations = 0
    function(*args)
    return usage.peak - before, usage.operations


def scoring(usage, trainer, tokens, domains):
    s = trainer.s
    size, operations = usage_of(usage, koff.SCORES[s.gate_init], trainer.model, trainer.gates, [[tokens]])
    batches = domains * math.ceil(s.fisher_sequences / (s.batch * domains))  # as `Trainer.initialise` draws them
    what = f"to score the gates, {s.batch} sequences at a time: {batches * s.batch} x {s.seq_len} tokens"
    return Phase(size, operations, batches, what)


def judging(usage, trainer, domains):
    s = trainer.s
    context = trainer.contexts["one"]
    first = min(context)
    judged = torch.zeros(s.kv_passages, JUDGED, dtype=torch.int64)
    shared = trainer.model.run(trainer.model.embed_tokens(judged), 0, first)
    size, operations = usage_of(usage, koff.token_losses, trainer.model, context, shared, first, judged)
    what = f"or to judge where a KV memory starts best: each of {s.kv_passages} passages a domain"
    return Phase(size, operations, s.kv_passages * domains, what)


def learning(usage, trainer, tokens):
    s = trainer.s
    size, operations = 0, 0
    if s.steps:
        trainer.step(tokens, "one", 0)  # the first step makes AdamW's state
        size, operations = usage_of(usage, trainer.step, tokens, "one", 0)
    what = f"or one step of {s.batch} x {s.seq_len} tokens, gates sampled"
    return Phase(size, operations, s.steps * (1 - s.fix_mask), what)


def recovering(usage, trainer, tokens, student):
    s = trainer.s
    size, operations = 0, 0
    if s.memory and s.steps:  # else nothing is left to learn by then
        size, operations = usage_of(usage, trainer.step, tokens, "one", 0)
    what = "or, once the mask is fixed, the materialised student and its step"
    return Phase(student + size, operations, s.steps * s.fix_mask, what)


def solving(usage, trainer, domains, student):
    s = trainer.s
    ids = np.zeros(s.solve_tokens + s.seq_len, dtype=np.int64)
    size, operations = usage_of(usage, trainer.solve, "one", ids)
    what = f"or, while LoRA on down is solved for, the student and that: at most {s.solve_tokens:,} tokens a domain"
    return Phase(student + size, operations, domains, what)


# What is printed -----------------------------------------------------------------------------------------------------


def dry_run(s, Trainer):
    """Print the sizes, the memory and the operations of the run `s`. `Trainer` is train.py's."""
    needs = estimate(s, Trainer)
    gates = needs.gates
    physical = gates.sparsity(needs.mask, "physical").item()
    paper = gates.sparsity(needs.mask, "paper").item()
    all_closed = {name: torch.zeros(a.shape) for name, a in gates.log_alpha.items()}
    gated = int(gates.removed(all_closed, "physical"))
    total = sum(phase.all_operations for phase in needs.phases.values())
    first, fixed = needs.phases["learn"].operations, needs.phases["recover"].operations

    where = f"in {gates.blocks} of {gates.config.num_hidden_layers} blocks"
    print(f"{gates.total:,} parameters, {gated:,} of them gated, {where}")
    trained = f"{needs.gate_count + needs.domains * needs.module:,} to train"
    modules = f"{needs.domains} modules and {needs.gate_count:,} gates"
    print(f"{needs.module:,} parameters a module, {modules}: {trained}")
    print(f"at the target (closed at random): sparsity {physical:.4f} physical, {paper:.4f} by the paper's count")
    steps = f"{s.steps:,} steps of {first / 1e12:.3g} and, once the mask is fixed, {fixed / 1e12:.3g}"
    print(f"{total / 1e15:,.3g} PFLOP to train: {s.steps * s.batch * s.seq_len:,} tokens in {steps} TFLOP")
    show(needs.weights, f"weights, {needs.dtype}")
    show(needs.trained, "modules and gates, float32")
    show(needs.adamw, "their AdamW state")
    if needs.contexts:
        show(needs.contexts, "the keys and values of text that memories start from, and the teacher has read")
    for name, phase in needs.phases.items():
        what = phase.what
        if name not in ("learn", "recover"):  # of which the line above says it
            what += f", {phase.all_operations / 1e12:.3g} TFLOP in all"
        show(phase.size, what)
    show(needs.peak, "peak memory")


def show(size, what):
    print(f"{size / 1e9:9.3f} GB  {what}")


# Where memory ran out ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def enough_memory(trainer):
    """Under it an error of too little memory becomes a BadInput: what the training needs, and what would need less."""
    try:
        yield
    except Exception as error:
        if not out_of_memory(error):
            raise
        said = f"there is not enough memory: this takes about {peak_of(trainer):.3g} GB"
        for knob, less in knobs(trainer.s, trainer.device):
            with contextlib.suppress(BadInput):  # it contradicts another setting
                said += f", with {knob} {peak_of(trainer, **less):.3g}"
        raise BadInput(f"{said}; --dry-run says more.") from None


def peak_of(trainer, **less):
    """Gigabytes that a training needs, under other settings."""
    dtype = str(trainer.model.head.dtype).removeprefix("torch.")
    return estimate(replace(trainer.s, dtype=dtype, **less), type(trainer), len(trainer.domains)).peak / 1e9


def knobs(s, device):
    """[(flag, settings)]: what makes a training smaller, one by one."""
    found = []
    for name, least in ("batch", 1), ("seq_len", 16):
        half = getattr(s, name) // 2
        if half >= least:
            found.append((f"{flag(name)} {half}", {name: half}))
    for name in ("checkpointing", "offload"):
        if not getattr(s, name) and (name != "offload" or device.type == "cuda"):
            found.append((flag(name), {name: True}))
    return found
