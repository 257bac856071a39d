"""LoRA on `down` by least squares, once the mask is final (ours; the paper's modules are only trained).

Let H [n, F'] be the student's neuron activations, and R [n, D'] the teacher's hidden state after a block minus the
student's. The best LoRA of rank r is the reduced-rank regression of R on H. It takes forward passes only, block by
block from the first gated one up, each on blocks that are already solved.
"""

import contextlib
import math
from dataclasses import replace

import torch
import torch.nn.functional as F

import koff
from data import BadInput
from data.checkpoint import refuse_other_tensors
from data.corpus import windows

AT_ONCE = 4096  # tokens of a batch: without gradients more fit than in a training step


def check_solvable(config, memories):
    """BadInput for blocks and memories in which B A h is not what LoRA on `down` adds to the hidden state."""
    if config.post_norm:
        raise BadInput(f"{config.model_type} has a norm behind down, so LoRA has no closed form; say --solve-tokens 0.")
    refuse_other_tensors(memories, "solving would ignore it; say --solve-tokens 0")


def solve_module(trainer, domain, ids):
    """Solve for a domain's module of a `Trainer`, on the domain's text, ids. Returns the result of `solve_memories`."""
    s = trainer.s
    tokens = windows(ids, s.seq_len, math.ceil(s.solve_tokens / s.seq_len))  # the whole text if it is shorter
    batches = torch.from_numpy(tokens).to(trainer.device).split(max(1, AT_ONCE // s.seq_len))
    module = trainer.modules[domain]
    try:
        explained = solve_memories(trainer.model, trainer.student, module, trainer.kept, batches, s.solve_ridge)
    except torch.linalg.LinAlgError as error:
        raise BadInput(f"{domain} cannot be solved for ({error}); lower the rates, and say --fresh.") from None
    for p in (module.lora_a["down"], module.lora_b["down"]):
        trainer.optimizers[domain].state[p] = {}  # AdamW's means belonged to other numbers
    return explained


@torch.no_grad()
def solve_memories(model, student, module, kept, batches, ridge):
    """Set a `MemoryModule`'s LoRA on `down` so that the student's hidden states come closest to the teacher's.

    The rest of the module is attached as it is. The teacher gets the module's keys and values too: they are context,
    and LoRA should restore what was cut, not undo what the context adds.

    student, kept: from `koff.materialise` and `koff.kept_channels`; batches: token tensors [B, T] of the module's
    domain; ridge: see `reduced_rank_regression`. Returns {block: explained share of |R|^2, float64 scalars}. Memory:
    hidden states of all tokens twice, H of one block, and H^T H [F', F'] in float64.
    """
    dtype = model.head.dtype
    whole = module.by_block(dtype)
    check_solvable(model.config, whole)
    split = min(min(kept), module.first_block)  # below it teacher and student are the same
    first = max(min(kept), module.first_block)  # the first block that has both gates and a memory
    memories = koff.materialise_memories(whole, kept)
    context = {i: replace(memory, lora={}) for i, memory in whole.items()}
    teachers = []  # hidden states before the block at hand, [B, T, D] of each batch
    students = []
    for tokens in batches:
        shared = model.run(model.embed_tokens(tokens), 0, split)
        teachers.append(model.run(shared, split, first, memories=context))
        students.append(student.run(shared, split, first, memories=memories))

    explained = {}
    for i in range(first, len(model.layers)):
        lora = {name: pair for name, pair in memories[i].lora.items() if name != "down"}
        memory = {i: replace(memories[i], lora=lora)}
        with inputs_to(student.layers[i].mlp.down_proj) as neurons:  # H: [B, T, F'] of each batch
            for n in range(len(batches)):
                teachers[n] = model.run(teachers[n], i, i + 1, memories=context)
                students[n] = student.run(students[n], i, i + 1, memories=memory)

        rows = kept[i]["down"]
        gram, cross, square = products(neurons, teachers, students, rows)
        a, b, fitted = reduced_rank_regression(gram, cross, module.rank, ridge)
        set_lora(module, i, "down", a, b, kept[i]["neuron"], rows)
        explained[i] = fitted / square.clamp(min=torch.finfo(square.dtype).tiny)
        for n, h in enumerate(neurons):
            added = F.linear(F.linear(h, a.to(dtype)), b.to(dtype))
            students[n] = students[n].index_add(-1, rows, added)
    return explained


def products(neurons, teachers, students, rows):
    """(H^T H [F', F'], H^T R [F', D'], |R|^2) in float64, from lists of [B, T, ...]. R has the channels `rows` only."""
    device = rows.device
    width = neurons[0].shape[-1]
    gram = torch.zeros(width, width, dtype=torch.float64, device=device)
    cross = torch.zeros(width, len(rows), dtype=torch.float64, device=device)
    square = torch.zeros((), dtype=torch.float64, device=device)
    for h, teacher, student in zip(neurons, teachers, students, strict=True):
        # A token weighs 1 / RMS of its hidden state, because the next norm rescales it. Otherwise a few tokens with
        # massive activations would dominate.
        teacher = teacher.float()
        weight = teacher.square().mean(-1, keepdim=True).rsqrt()
        h = (weight * h.float()).flatten(0, 1)  # [B T, F']
        missing = weight * (teacher - student.float())
        missing = missing.index_select(-1, rows).flatten(0, 1)  # [B T, D']
        gram += h.T @ h
        cross += h.T @ missing
        square += missing.square().sum()
    return gram, cross, square


@contextlib.contextmanager
def inputs_to(projection):
    """Yield a list to which every call of the projection under it adds its input."""
    inputs = []
    hook = projection.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    try:
        yield inputs
    finally:
        hook.remove()


def reduced_rank_regression(gram, cross, rank, ridge):
    """(A [r, F], B [D, r], the part of |R|^2 that they explain): H A^T B^T is the best approximation of R of its rank.

    From H^T H [F, F] and H^T R [F, D], float64. "Best" includes the penalty lambda |A^T B^T|^2 (Mukherjee and Zhu
    2011), where lambda is `ridge` times the mean of H^T H's diagonal. r is `rank`, or F or D if that is less. A and B
    are scaled alike, so that one AdamW rate fits both.
    """
    addend = (ridge * gram.diagonal().mean()).clamp(min=torch.finfo(gram.dtype).tiny)  # H may be zero
    damped = gram + addend * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    w = torch.linalg.solve(damped, cross)  # [F, D]: ridge regression, R ~ H W
    fitted = cross.T @ w  # [D, D], symmetric: W^T (H^T H + lambda) W
    _, vectors = torch.linalg.eigh(fitted)  # directions of R, the best explained one last
    r = min(rank, *cross.shape)
    b = vectors[:, vectors.shape[1] - r :]
    a = (w @ b).T
    explained = 2 * (a * (cross @ b).T).sum() - (a @ gram * a).sum()  # |R|^2 - |R - H A^T B^T|^2
    length = a.norm(dim=1).clamp(min=torch.finfo(a.dtype).tiny)  # 0 where nothing is missing
    return a / length[:, None].sqrt(), b * length.sqrt(), explained


@torch.no_grad()
def set_lora(module, i, name, a, b, columns, rows):
    """Block i of a `MemoryModule` gets LoRA A [up to r, columns] and B [rows, up to r], and 0 elsewhere.

    B includes the scale alpha / r. Spare rows of A stay random: with B = 0 they add nothing, but can learn.
    """
    whole_a = module.lora_a[name][i - module.first_block]
    whole_b = module.lora_b[name][i - module.first_block].zero_()
    whole_a[: len(a)] = 0
    whole_a[: len(a), columns] = a.to(whole_a.dtype)
    whole_b[rows, : len(a)] = (b / module.scale).to(whole_b.dtype)
