"""What a run will need: `python train.py --dry-run`."""

import weakref
from dataclasses import replace
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

import koff
from data.corpus import find_domains
from data.run import fitting, pick_dtype
from model import Model


class Peak(TorchDispatchMode):
    """Counts the bytes of all tensors that are made under it, those alive `now` and the most that ever were, and the
    floating-point operations, two for each multiply-add of a matrix product."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.alive, self.operations = 0, 0, set(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if formula := flop_registry.get(function._overloadpacket):
            self.operations += formula(*args, **(kwargs or {}), out_val=out)
        for storage in (x.untyped_storage() for x in tree_iter(out) if isinstance(x, torch.Tensor)):
            if (key := storage._cdata) not in self.alive:  # neither a view nor written in place
                self.alive.add(key)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.gone, key, storage.nbytes())
        return out

    def gone(self, key, size):
        self.alive.discard(key)
        self.now -= size


def dry_run(s, Trainer):
    """Print the sizes and the memory of the run `s`, from config.json alone: its steps run on tensors without numbers.

    Returns the exit status, 0.
    """
    config, gates = fitting(s)
    domains = len(find_domains(s.data, s.domains)) if Path(s.data).is_dir() else 2
    torch.manual_seed(s.seed)
    gates.spread({name: torch.rand(a.shape) for name, a in gates.log_alpha.items()})  # chance decides what closes
    mask = gates.final_mask(s.sparsity, s.count, s.budget, s.multiple)
    physical, paper = (gates.sparsity(mask, count).item() for count in ("physical", "paper"))
    kept = koff.kept_channels(mask, config, gates.first, "cpu")
    with torch.device("meta"):
        model = Model(config).to(pick_dtype(s.dtype, torch.device("cuda")))
    shapes = {name: (p.shape, p.dtype) for name, p in model.state_dict().items()}
    with FakeTensorMode(allow_non_fake_inputs=True), Peak() as size:
        model.load_state_dict({n: torch.empty(shape, dtype=d) for n, (shape, d) in shapes.items()}, assign=True)
        weights = size.now
        trainer = Trainer(model.requires_grad_(False), replace(s, budget="global", compile=False), ["one"])
        tokens = torch.zeros(s.batch, s.seq_len, dtype=torch.int64)

        def step():
            size.peak, size.operations, before = size.now, 0, size.now
            trainer.step(tokens, "one", 0)
            return size.peak - before, size.operations

        step()  # the first one makes AdamW's state
        (sampled, operations), before = step(), size.now
        trainer.mask, trainer.kept, trainer.student = mask, kept, koff.compact(model, kept)  # as `close` does
        small = size.now - before
        fixed, fewer = step()
        fixed += small
    gate, module = (sum(p.numel() for p in part.parameters()) for part in (trainer.gates, trainer.memories))
    gated = gates.removed({name: torch.zeros(a.shape) for name, a in gates.log_alpha.items()}, "physical")
    trained = gate + domains * module
    there = gate + (1 if s.offload else domains) * module
    where = f"in {s.blocks} of {config.num_hidden_layers} blocks"
    print(f"{gates.total:,} parameters, {int(gated):,} of them gated, {where}")
    print(f"{module:,} parameters a module, {domains} modules and {gate:,} gates: {trained:,} to train")
    print(f"at the target (closed at random): sparsity {physical:.4f} physical, {paper:.4f} by the paper's count")
    every = s.steps * ((1 - s.fix_mask) * operations + s.fix_mask * (fewer if s.memory else 0))
    what = f"{s.steps:,} steps of {operations / 1e12:.3g} and, once the mask is fixed, {fewer / 1e12:.3g} TFLOP"
    print(f"{every / 1e15:,.3g} PFLOP to train: {s.steps * s.batch * s.seq_len:,} tokens in {what}")
    parts = {f"weights, {model.head.dtype}": weights, "memories and gates, float32": 4 * there}
    parts |= {"their AdamW state": 8 * there, f"one step of {s.batch} x {s.seq_len} tokens, gates sampled": sampled}
    parts["or, once the mask is fixed, the compact student and its step"] = fixed
    parts["peak memory"] = weights + 12 * there + max(sampled, fixed)
    for name, b in parts.items():
        print(f"{b / 1e9:9.3f} GB  {name}")
    return 0
