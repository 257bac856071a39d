"""What a run will need, from config.json alone: `python train.py --dry-run`.

Its steps run on fake tensors, which have shapes and no numbers, and what they would take is counted.
"""

import weakref
from pathlib import Path

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import koff
from data.checkpoint import read_config
from data.corpus import JUDGED, find_domains
from data.hub import model_folder
from data.run import fitting_gates
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


def usage_of(usage, function, *args):
    """(bytes above what is there before it, operations) of one call."""
    before = usage.now
    usage.peak = before
    usage.operations = 0
    function(*args)
    return usage.peak - before, usage.operations


def dry_run(s, Trainer):
    """Print the sizes, the memory and the operations of the run `s`. `Trainer` is train.py's."""
    config = read_config(model_folder(s.model, weights=False))
    gates = fitting_gates(s, config)
    # How many modules there will be: one a domain; without a folder of text, the fewest that make sense.
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
        scoring, score_operations = 0, 0
        if s.gate_init in koff.SCORES:
            score = koff.SCORES[s.gate_init]
            scoring, score_operations = usage_of(usage, score, model, trainer.gates, [[tokens]])
        judging, judging_operations = 0, 0
        if s.kv_from_text and s.kv_passages > 1:
            first = trainer.modules[0].first
            context = koff.text_context(model, tokens[0, : s.kv_tokens], first)
            judged = torch.zeros(s.kv_passages, JUDGED, dtype=torch.int64)
            shared = model.run(model.embed_tokens(judged), 0, first)
            judging, judging_operations = usage_of(usage, koff.token_losses, model, context, shared, first, judged)
        learning, operations = 0, 0
        if s.steps:
            trainer.step(tokens, "one", 0)  # the first step makes AdamW's state
            learning, operations = usage_of(usage, trainer.step, tokens, "one", 0)
        before = usage.now
        trainer.mask = mask  # as `Trainer.freeze_mask` does; fake tensors cannot say which channels a mask leaves
        trainer.kept = kept
        trainer.student = koff.materialise(model, kept)
        materialised = usage.now - before
        recovering, fewer_operations = 0, 0
        if s.memory and s.steps:  # else nothing is left to learn by then
            recovering, fewer_operations = usage_of(usage, trainer.step, tokens, "one", 0)
        solving, solve_operations = 0, 0
        if trainer.unsolved():
            ids = np.zeros(s.solve_tokens + s.seq_len, dtype=np.int64)
            solving, solve_operations = usage_of(usage, trainer.solve, "one", ids)

    gate_count = koff.count_parameters(trainer.gates)
    module_count = koff.count_parameters(trainer.modules)
    on_device = gate_count + module_count * (1 if s.offload else domains)
    # In float32 a parameter takes 4 bytes, and its two means in AdamW 8.
    adamw = 8 * on_device if s.steps else 0
    peak = weights + 4 * on_device + adamw + max(scoring, judging, learning, materialised + max(recovering, solving))
    physical = gates.sparsity(mask, "physical").item()
    paper = gates.sparsity(mask, "paper").item()
    all_closed = {name: torch.zeros(a.shape) for name, a in gates.log_alpha.items()}
    gated = int(gates.removed(all_closed, "physical"))
    total = s.steps * ((1 - s.fix_mask) * operations + s.fix_mask * fewer_operations)
    score_operations *= s.fisher_sequences / s.batch
    judging_operations *= s.kv_passages * domains
    total += score_operations + judging_operations + domains * solve_operations

    where = f"in {gates.blocks} of {config.num_hidden_layers} blocks"
    print(f"{gates.total:,} parameters, {gated:,} of them gated, {where}")
    trained = f"{gate_count + domains * module_count:,} to train"
    print(f"{module_count:,} parameters a module, {domains} modules and {gate_count:,} gates: {trained}")
    print(f"at the target (closed at random): sparsity {physical:.4f} physical, {paper:.4f} by the paper's count")
    steps = f"{s.steps:,} steps of {operations / 1e12:.3g} and, once the mask is fixed, {fewer_operations / 1e12:.3g}"
    print(f"{total / 1e15:,.3g} PFLOP to train: {s.steps * s.batch * s.seq_len:,} tokens in {steps} TFLOP")
    show(weights, f"weights, {model.head.dtype}")
    show(4 * on_device, "modules and gates, float32")
    show(adamw, "their AdamW state")
    if scoring:
        tokens = f"{s.fisher_sequences} x {s.seq_len} tokens, {score_operations / 1e12:.3g} TFLOP in all"
        show(scoring, f"to score the gates, {s.batch} sequences at a time: {tokens}")
    if judging:
        tokens = f"each of {s.kv_passages} passages a domain, {judging_operations / 1e12:.3g} TFLOP in all"
        show(judging, f"or to judge where a KV memory starts best: {tokens}")
    show(learning, f"or one step of {s.batch} x {s.seq_len} tokens, gates sampled")
    show(materialised + recovering, "or, once the mask is fixed, the materialised student and its step")
    if solving:
        tokens = f"at most {s.solve_tokens:,} tokens a domain, {domains * solve_operations / 1e12:.3g} TFLOP in all"
        show(materialised + solving, f"or, while LoRA on down is solved for, the student and that: {tokens}")
    show(peak, "peak memory")


def show(size, what):
    print(f"{size / 1e9:9.3f} GB  {what}")
