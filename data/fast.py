"""Functions of model.py and koff.py in less time and memory. tests/test_fast.py compares them with the plain forms.

Only `final_mask` changes results, by a few gates.
"""

import contextlib
import ctypes
from copy import deepcopy
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

import koff
from data.objectives import next_tokens
from model import Attention, matrix_name

ROWS = 128  # rows of logits that are held at a time


def enable():
    """For the whole process: attention copies no keys, and freed memory stays in the process."""
    Attention.attend = staticmethod(attend)
    keep_pages()


# Attention without copies of keys and values -------------------------------------------------------------------------


def attend(q, k, v, mask):
    """`model.attend`."""
    B, H, T, hd = q.shape
    G, S = k.shape[1:3]
    if T == S:  # nothing precedes the text, so the kernel's own causal mask will do
        # On CUDA no fused kernel for float32 lets query heads share keys. With copies there is one, and it never writes
        # out the T x S scores.
        shared = not (q.is_cuda and q.dtype == torch.float32)
        if not shared:
            k = k.repeat_interleave(H // G, dim=1)
            v = v.repeat_interleave(H // G, dim=1)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=shared)
    # The H / G query heads of a group become rows of one head, whose keys then need no copies.
    rows = q.reshape(B, G, H // G * T, hd)
    if mask is not None:
        mask = mask.repeat(H // G, 1)
    y = F.scaled_dot_product_attention(rows, k, v, attn_mask=mask)
    return y.reshape(B, H, T, hd)  # not a view: some GPU kernels return another layout


# LoRA in the matrices: a module then costs nothing a token -----------------------------------------------------------


@torch.no_grad()
def merged(model, memories):
    """(a model with W + B A in place of each W that has a LoRA, {block: `Memory`} without LoRA).

    The sum is in float32 and is rounded once. The two models share all other tensors, and `model` stays as it is.
    """
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    model = deepcopy(model, tensors)  # new modules, the same tensors
    rest = {}
    for i, memory in memories.items():
        for name, (a, b) in memory.lora.items():
            projection = model.get_submodule(matrix_name(i, name))
            weight = projection.weight.float() + b.float() @ a.float()
            projection.weight = nn.Parameter(weight.to(b.dtype), requires_grad=False)
        rest[i] = replace(memory, lora={})
    return model, rest


# Logits a few rows at a time: they are the largest tensor of a step, 49,152 to 151,936 numbers a token ---------------


@torch.no_grad()
def teacher_topk(model, hidden, top):
    """`koff.teacher_topk`."""
    chunks = [koff.teacher_topk(model, rows, top) for rows in hidden.split(ROWS)]
    return tuple(torch.cat(parts) for parts in zip(*chunks, strict=True))


def distill(model, hidden, teacher, tokens, objective):
    """`koff.distill`, for any of `koff.OBJECTIVES`, on tokens [B, T]."""
    total = in_chunks(model, hidden.flatten(0, 1), objective, *teacher, next_tokens(tokens))
    return total / tokens.numel()


def in_chunks(model, hidden, loss, *beside, size=ROWS):
    """Sum over the rows of hidden [n, D] of loss(logits [rows, V], the same rows of each of `beside` [n, ...])."""
    return InChunks.apply(hidden, model, loss, size, *beside)


class InChunks(torch.autograd.Function):
    """For each chunk of rows: its loss, and at once the gradient in its hidden states. Only its logits exist then."""

    @staticmethod
    def forward(ctx, hidden, model, loss, size, *beside):
        gradient = torch.empty_like(hidden)
        total = torch.zeros((), device=hidden.device)
        for start in range(0, len(hidden), size):
            rows = slice(start, start + size)
            part = hidden[rows].detach()
            with torch.enable_grad():  # a Function runs without autograd
                part.requires_grad_()
                logits = model.logits(part)
                value = loss(logits, *[t[rows] for t in beside]).sum()
            gradient[rows] = torch.autograd.grad(value, part)[0]
            total += value.detach()
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx, scale):
        (gradient,) = ctx.saved_tensors
        others = len(ctx.needs_input_grad) - 1  # model, loss, size and `beside` have no gradient
        return (scale * gradient, *[None] * others)


# Matrices whose sides are multiples of eight, which GPUs multiply faster ---------------------------------------------


def final_mask(gates, target, count, multiple):
    """`Gates.final_mask` in which each block keeps a multiple of `multiple` neurons; the other gates compensate."""
    if multiple == 1 or "neuron" not in gates.log_alpha:
        return gates.final_mask(target, count)
    order = gates.log_alpha["neuron"].float().cpu().argsort(dim=-1, stable=True)
    rank = order.argsort(-1)  # within its block; the highest is the best

    def rounded(mask):
        wanted = mask["neuron"].sum(-1, keepdim=True)  # [N, 1]
        wanted = (wanted / multiple).round() * multiple
        return {**mask, "neuron": rank >= rank.shape[-1] - wanted}

    neurons = gates.final_mask(target, count, rounded)["neuron"]
    # Search again with these neurons. The first search moves in steps of `multiple` neurons and overshoots by up to
    # one step; the gates of k, v and down are finer and can hit the target.
    return gates.final_mask(target, count, lambda mask: {**mask, "neuron": neurons})


# Memory of the process -----------------------------------------------------------------------------------------------

M_TRIM_THRESHOLD = -1  # names and numbers of glibc's malloc.h
M_MMAP_MAX = -4


def keep_pages():
    """Keep freed memory in the process, on Linux. Otherwise each step returns hundreds of megabytes and asks for them
    again, page by page: about a sixth of its time on two cores."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library: nothing to do
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)  # large tensors come from the heap too,
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)  # and the heap does not shrink
