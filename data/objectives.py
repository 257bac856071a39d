"""Objectives beside koff.py's KL, which the paper compares or leaves open, and the loss that evaluation measures.

The KL's gradient in the logits, with probabilities p of the teacher and q of the student:

    kl               q - p in the top K, q (1 - p_rest / q_rest) outside
    kl-renormalise   q - p of the renormalised two in the top K, 0 outside
    kl-drop          q sum(p) - p in the top K, q sum(p) outside; the sum is over the top K

The arguments of an objective are those of `koff.kl_topk`.
"""

import torch
import torch.nn.functional as F

import koff

NO_TARGET = -100  # marks the last position of a sequence, whose next token is unknown


def next_tokens(tokens):
    """The token after each of tokens [B, T], as [B T]."""
    targets = torch.full_like(tokens, NO_TARGET)
    targets[:, :-1] = tokens[:, 1:]
    return targets.flatten()


def kl_renormalise(logits, index, log_p, log_p_rest, next_tokens=None):
    """KL of both top-K distributions, each scaled to a sum of one. Mass outside the top K is ignored."""
    log_p = log_p.log_softmax(-1)
    log_q = logits.gather(-1, index).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def kl_drop(logits, index, log_p, log_p_rest, next_tokens=None):
    """The terms of the top K, with their true probabilities, and no term for the rest."""
    log_q, _ = koff.top_and_rest(logits, index)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def next_token_loss(logits, targets):
    """Cross-entropy of each row of logits [n, V] against targets [n], in nats; 0 where there is no target."""
    return F.cross_entropy(logits, targets, reduction="none", ignore_index=NO_TARGET)


def next_token(logits, index, log_p, log_p_rest, next_tokens):
    """Plain language modelling, without the teacher."""
    return next_token_loss(logits, next_tokens)


def blend(logits, index, log_p, log_p_rest, next_tokens):
    """(KL + next-token loss) / 2. (It diverged in the paper.)"""
    return (koff.kl_topk(logits, index, log_p, log_p_rest) + next_token_loss(logits, next_tokens)) / 2


koff.OBJECTIVES |= {"kl-renormalise": kl_renormalise, "kl-drop": kl_drop, "next-token": next_token, "blend": blend}


@torch.no_grad()
def token_losses(model, memories, shared, split, tokens):
    """Next-token loss of every token with a predecessor, [n, T - 1] float64, in nats.

    tokens [n, T]; shared [n, T, D]: their hidden states before block `split`, the same for every model and module.
    """
    hidden = model.run(shared, split, len(model.layers), memories=memories)
    losses = []
    for states, row in zip(hidden, tokens, strict=True):  # the logits of one row at a time
        logits = model.logits(states[:-1])  # [T - 1, V]
        losses.append(next_token_loss(logits, row[1:]).double())
    return torch.stack(losses)
