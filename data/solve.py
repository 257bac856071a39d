"""Least squares once the mask is final (ours; the paper's backbone stays frozen, and its modules are only trained).

`repair` mends the backbone: o_proj and `down` of each block get what brings the student's hidden states closest to the
teacher's, on text of all domains. `solve_memories` does the same for one domain, by LoRA on `down`. Both are the same
regression: H [n, F] are the inputs of a matrix, R [n, D] the teacher's hidden states minus the student's. They take
forward passes only, block by block from the first gated one up, each on blocks that are already mended. (Only the
measure of the error, `scores.Statistics`, takes backward passes.)
"""

import contextlib
import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

import koff
from data import BadInput
from data.checkpoint import refuse_other_tensors
from data.corpus import windows
from data.scores import Statistics, inputs_to
from model import NO_MEMORY, causal_mask, rope_table

AT_ONCE = 2048  # tokens of a batch: without gradients more fit than in a training step


def check_solvable(config, memories):
    """BadInput for blocks and memories in which B A h is not what LoRA on `down` adds to the hidden state."""
    if config.post_norm:
        fault = f"{config.model_type} has a norm behind down, so nothing here has a closed form"
        raise BadInput(f"{fault}; say --repair none --solve-tokens 0.")
    refuse_other_tensors(memories, "solving would ignore it; say --solve-tokens 0")


# The two calls of a training -----------------------------------------------------------------------------------------


def repair_student(trainer, texts):
    """Repair the student of a `Trainer` on texts {name: ids}, equal shares of each. Returns the result of `repair`."""
    s = trainer.s
    batches = []
    for ids in texts.values():
        batches += batches_of(ids, s.repair_tokens / len(texts), trainer)
    with solvable("the backbone"):
        return repair(trainer.model, trainer.student, trainer.kept, batches, s.solve_ridge)


def solve_module(trainer, domain, ids):
    """Solve for a domain's module of a `Trainer`, on the domain's text, ids. Returns the result of `solve_memories`."""
    s = trainer.s
    module = trainer.modules[domain]
    context = keys_and_values(module.by_block(trainer.model.head.dtype))
    curvature = None
    if s.curvature_tokens:
        torch.manual_seed(s.seed)  # it draws tokens
        few = batches_of(ids, s.curvature_tokens, trainer, s.batch * s.seq_len)
        statistics = Statistics(trainer.model, module.first_block, context)
        for tokens in few:
            statistics.add(tokens)
        curvature = statistics.curvature
    with solvable(domain):
        batches = batches_of(ids, s.solve_tokens, trainer)
        model, student = trainer.model, trainer.student
        explained = solve_memories(model, student, module, trainer.kept, batches, s.solve_ridge, curvature)
    for p in (module.lora_a["down"], module.lora_b["down"]):
        trainer.optimizers[domain].state[p] = {}  # AdamW's means belonged to other numbers
    return explained


def batches_of(ids, tokens, trainer, size=AT_ONCE):
    """Batches [B, T] of about `tokens` tokens, in windows spread over the text ids; all of it if it is shorter."""
    s = trainer.s
    x = windows(ids, s.seq_len, math.ceil(tokens / s.seq_len))
    return torch.from_numpy(x).to(trainer.device).split(max(1, size // s.seq_len))


@contextlib.contextmanager
def solvable(what):
    """A context in which a matrix without an inverse becomes a BadInput."""
    try:
        yield
    except torch.linalg.LinAlgError as error:
        raise BadInput(f"{what} cannot be solved for ({error}); lower the rates, and say --fresh.") from None


# The backbone --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def repair(model, student, kept, batches, ridge):
    """Add to o_proj and `down` of a materialised student the regression's solution, at full rank.

    What was cut stays cut, and `model` stays as it is: the student gets matrices of its own.

    student, kept: from `koff.materialise` and `koff.kept_channels`; batches: token tensors [B, T]. Returns {block:
    explained share of |R|^2 behind the MLP, float64 scalars}. Memory: three hidden states of every token, everything
    else of one batch, and H^T H [F, F] of one block in float64.
    """
    first = min(kept)  # below it teacher and student are the same
    teachers = [model.run(model.embed_tokens(tokens), 0, first) for tokens in batches]  # before block i, [B, T, D]
    students = list(teachers)
    explained = {}
    for i in range(first, len(model.layers)):
        block = student.layers[i]
        fit = Regression()
        with inputs_to(block.self_attn.o_proj) as heads:  # H: [B, T, H hd] of each batch
            for n in range(len(batches)):
                teachers[n] = after_attention(model, i, teachers[n])
                students[n] = after_attention(student, i, students[n])
                fit.add(heads[n], teachers[n], students[n], kept[i]["o"])
        change = fit.solution(ridge).T
        add_to(block.self_attn.o_proj, change)
        for n, h in enumerate(heads):
            added = F.linear(h, change.to(h.dtype))
            students[n] = students[n].index_add(-1, kept[i]["o"], added)

        fit = Regression()
        for n in range(len(batches)):
            teachers[n] = model.layers[i].add_mlp(teachers[n])
            with inputs_to(block.mlp.down_proj) as neurons:  # H: [B, T, F] of this batch
                after = block.add_mlp(students[n])
            fit.add(neurons[0], teachers[n], after, kept[i]["down"])
        w = fit.solution(ridge)
        add_to(block.mlp.down_proj, w.T)
        for n in range(len(batches)):  # in place: two lists of hidden states would be held at a time
            students[n] = block.add_mlp(students[n])
        explained[i] = (fit.explained_by(w) / fit.square).nan_to_num()  # nothing may be missing
    return explained


def add_to(projection, change):
    """Replace the matrix of a `Projection` by its sum with `change`. (The old one may be the teacher's, too.)"""
    weight = (projection.weight.double() + change).to(projection.weight.dtype)
    projection.weight = nn.Parameter(weight, requires_grad=False)


# A module ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def solve_memories(model, student, module, kept, batches, ridge, curvature=None):
    """Set a `MemoryModule`'s LoRA on `down` so that the student's hidden states come closest to the teacher's.

    The rest of the module is attached as it is. The teacher gets the module's keys and values too: they are context,
    and LoRA should restore what was cut, not undo what the context adds.

    student, kept: from `koff.materialise` and `koff.kept_channels`; batches: token tensors [B, T] of the module's
    domain; ridge, curvature: see `reduced_rank_regression`. Returns {block: explained share of |R|^2}, float64 scalars.
    Memory: see `repair`.
    """
    dtype = model.head.dtype
    whole = module.by_block(dtype)
    check_solvable(model.config, whole)
    split = min(min(kept), module.first_block)  # below it teacher and student are the same
    first = max(min(kept), module.first_block)  # the first block that has both gates and a memory
    memories = koff.materialise_memories(whole, kept)
    context = keys_and_values(whole)
    teachers = []  # hidden states before the block at hand, [B, T, D] of each batch
    students = []
    # The first token of each window, as if it began a text: nothing stands before it. Hidden states [windows, 1, D].
    beginnings = torch.cat([tokens[:, :1] for tokens in batches])
    beginnings = student.run(student.embed_tokens(beginnings), 0, first)
    for tokens in batches:
        shared = model.run(model.embed_tokens(tokens), 0, split)
        teachers.append(model.run(shared, split, first, memories=context))
        students.append(student.run(shared, split, first, memories=memories))

    explained = {}
    for i in range(first, len(model.layers)):
        block = student.layers[i]
        lora = {name: pair for name, pair in memories[i].lora.items() if name != "down"}
        memory = replace(memories[i], lora=lora)
        rows = kept[i]["down"]
        fit = Regression()
        for n in range(len(batches)):
            teachers[n] = after_attention(model, i, teachers[n], context[i])
            teachers[n] = model.layers[i].add_mlp(teachers[n])
            students[n] = after_attention(student, i, students[n], memory)
            with inputs_to(block.mlp.down_proj) as neurons:  # H: [B, T, F] of this batch
                after = block.add_mlp(students[n], memory=memory)
            fit.add(neurons[0], teachers[n], after, rows)
        bend = curvature[i][rows][:, rows] if curvature else None
        a, b, _ = reduced_rank_regression(fit, ridge, bend)
        a = a[: module.rank]
        b = b[:, : module.rank]
        beginnings = after_attention(student, i, beginnings)
        with inputs_to(block.mlp.down_proj) as at_beginning:
            beginnings = block.add_mlp(beginnings)
        a = without_massive(a, at_beginning[0], neurons[0])  # the last batch stands for all
        set_lora(module, i, a, b, kept[i]["neuron"], rows)
        memory.lora["down"] = (a.to(dtype), b.to(dtype))
        for n in range(len(batches)):
            students[n] = block.add_mlp(students[n], memory=memory)
        explained[i] = (fit.explained_by((b @ a).T) / fit.square).nan_to_num()
    return explained


def keys_and_values(memories):
    """{block: `Memory`} without LoRA."""
    return {i: replace(memory, lora={}) for i, memory in memories.items()}


def after_attention(model, i, x, memory=NO_MEMORY):
    """Hidden states x [B, T, D] before block i -> those between its attention and its MLP."""
    T = x.shape[1]
    rope = rope_table(model.config, memory.length, T, like=x)
    mask = causal_mask(T, memory.length + T, like=x)
    return model.layers[i].add_attention(x, i, rope, mask, memory=memory)


def without_massive(a, beginnings, usual):
    """LoRA A [r, F] without the main direction of first tokens' inputs, where these are longer than usual ones.

    In some models the inputs of `down` at the first token of a text, `beginnings` [B, 1, F], are hundreds of times as
    long as others, `usual` [B, T, F], and of one direction (massive activations, Sun et al. 2024, arXiv 2402.17762).
    Behind keys and values no token is the first, so the regression does not see this direction. Without keys and
    values, the LoRA would add arbitrary numbers there.
    """
    beginnings = beginnings.flatten(0, 1).float()
    _, lengths, directions = torch.linalg.svd(beginnings, full_matrices=False)
    is_massive = lengths[:1] ** 2 / len(beginnings) > usual.float().square().sum(-1).mean()
    massive = (directions[:1] * is_massive).to(a.dtype)
    return a - a @ massive.T @ massive


def set_lora(module, i, a, b, columns, rows):
    """`down` of block i gets LoRA A [up to r, columns] and B [rows, up to r] in a `MemoryModule`, and 0 elsewhere.

    B includes the scale alpha / r. Spare rows of A stay random: with B = 0 they add nothing, but can learn.
    """
    whole_a = module.lora_a["down"][i - module.first_block]
    whole_b = module.lora_b["down"][i - module.first_block].zero_()
    whole_a[: len(a)] = 0
    whole_a[: len(a), columns] = a.to(whole_a.dtype)
    whole_b[rows, : len(a)] = (b / module.scale).to(whole_b.dtype)


# The regression ------------------------------------------------------------------------------------------------------


class Regression:
    """H^T H [F, F], H^T R [F, D'] and |R|^2 in float64, added up batch by batch."""

    gram = cross = square = 0.0

    def add(self, h, teacher, student, rows):
        """h [B, T, F]; teacher, student [B, T, D] -> R has their channels `rows`."""
        # A token weighs 1 / RMS of its hidden state, because the next norm rescales it. Otherwise a few tokens with
        # massive activations would dominate.
        teacher = teacher.float()
        weight = teacher.square().mean(-1, keepdim=True).rsqrt()
        h = (weight * h.float()).flatten(0, 1)  # [B T, F]
        missing = weight * (teacher - student.float())
        missing = missing.index_select(-1, rows).flatten(0, 1)  # [B T, D']
        self.gram = self.gram + (h.T @ h).double()
        self.cross = self.cross + (h.T @ missing).double()
        self.square = self.square + missing.double().square().sum()

    def solution(self, ridge):
        """W [F, D'] of ridge regression, R ~ H W. lambda is `ridge` times the mean of H^T H's diagonal."""
        tiny = torch.finfo(torch.float64).tiny
        addend = (ridge * self.gram.diagonal().mean()).clamp(min=tiny)  # H may be zero
        damped = self.gram + addend * torch.eye(len(self.gram), dtype=torch.float64, device=self.gram.device)
        return torch.linalg.solve(damped, self.cross)

    def explained_by(self, w):
        """|R|^2 - |R - H W|^2 for W [F, D']."""
        return 2 * (w * self.cross).sum() - (w * (self.gram @ w)).sum()


def reduced_rank_regression(fit, ridge, curvature=None):
    """(A [R, F], B [D', R], gains [R]) of a `Regression`, the best rank first; R is F or D', whichever is less.

    H A^T B^T, with the first r rows of A and columns of B, is the best approximation of R of rank r. "Best" includes
    the penalty lambda |A^T B^T|^2 (Mukherjee and Zhu 2011), and measures an error e of the hidden state as e^T C e,
    where C [D', D'] is `curvature` (default: 1). A gain is the error that a rank removes, in this measure. A and B
    are scaled alike, so that one AdamW rate fits both.
    """
    w = fit.solution(ridge)
    if curvature is None:
        root = inverse = torch.eye(w.shape[1], dtype=w.dtype, device=w.device)
    else:
        values, vectors = torch.linalg.eigh(curvature)
        values = values.clamp(min=1e-4 * values[-1:])  # no direction is free; there may be none at all
        root = vectors * values.sqrt() @ vectors.T
        inverse = vectors / values.sqrt() @ vectors.T
    fitted = root @ fit.cross.T @ w @ root  # C^1/2 W^T (H^T H + lambda) W C^1/2, symmetric
    gains, directions = torch.linalg.eigh(fitted)  # in rising order
    r = min(w.shape)
    gains = gains.flip(0)[:r].clamp(min=0)
    directions = directions.flip(1)[:, :r]
    b = inverse @ directions
    a = (w @ root @ directions).T
    tiny = torch.finfo(a.dtype).tiny
    ratio = (a.norm(dim=1) / b.norm(dim=0)).clamp(min=tiny).sqrt()  # A is 0 where nothing is missing
    return a / ratio[:, None], b * ratio, gains
