"""Scores of gates: which channels matter least? (Ours; the paper starts all gates alike.)

`fisher_scores` asks how much the loss bends as a gate closes. `surgeon_scores`, the default, also asks how much of a
neuron's effect the neurons that stay can take over.
"""

import contextlib

import torch
import torch.nn.functional as F

import koff
from data.fast import in_chunks


def fisher_scores(model, gates, texts, statistics=None):
    """{name: [N, channels]}: how much each gate matters, per parameter that closing it frees.

    How fast does the KL to the teacher grow as a gate moves away from 1? Its gradient there is zero, so we use its
    curvature, the Fisher information: squared gradients of log p of tokens that the model itself draws. We sum squared
    per-token gradients instead of squaring the summed gradient, because a module can undo an effect that is the same at
    every token. texts: a list of token tensors [B, T] for each domain. Each domain's scores are normalised to sum to
    one; otherwise domains that the model knows badly would dominate. A gate gets the sum of its scores.
    statistics: a `Statistics` that gathers more from the same passes.
    """
    statistics = statistics or Statistics(model, gates.first_block)
    c = model.config
    frees = {name: fan_in for name, (_, fan_in) in c.shapes.items()}
    for name in ("gate", "up", "neuron"):
        frees[name] = 3 * c.hidden_size  # without either row the neuron is dead: both rows go, and a column of down
    scores = {name: torch.zeros_like(a) for name, a in gates.log_alpha.items()}
    for batches in texts:
        squares = {name: torch.zeros_like(a) for name, a in gates.log_alpha.items()}
        for tokens in batches:
            for name, gradient in statistics.add(tokens, gates).items():
                squares[name] += gradient.float().square().sum(dim=(1, 2))
        total = sum(square.sum() for square in squares.values())
        for name, square in squares.items():
            scores[name] += square / total / frees[name]
    return scores


def drawn_token_loss(logits):
    """Cross-entropy of each row of logits [n, V] against a token drawn from it, in nats."""
    drawn = torch.multinomial(logits.detach().softmax(-1), 1)  # [n, 1]
    return F.cross_entropy(logits, drawn[:, 0], reduction="none")


koff.SCORES["fisher"] = fisher_scores


def surgeon_scores(model, gates, texts, at_once=8):
    """`fisher_scores`, in which a neuron counts only for the part of its effect that other neurons cannot take over.

    Least squares will repair what can be repaired (data/solve.py), so two neurons that say the same need not both stay.
    It mends o_proj, too, so other channels get the mean neuron's share (a guess; the default gains a little by it).
    """
    neurons = set(gates.log_alpha) & {"gate", "up", "neuron"}
    if not neurons:  # only the attention has gates
        return fisher_scores(model, gates, texts)
    statistics = Statistics(model, gates.first_block, grams=True)
    scores = fisher_scores(model, gates, texts, statistics)
    shares = []
    for i, gram in statistics.gram.items():
        down = model.layers[i].mlp.down_proj.weight.double()
        shares.append(irreplaceable(gram, down, statistics.curvature[i], at_once))
    share = torch.stack(shares).float()  # [N, F]
    for name, score in scores.items():
        scores[name] = score * (share if name in neurons else share.mean())
    return scores


def irreplaceable(gram, down, curvature, at_once=8):
    """The share [F] of each neuron's effect that is lost if it is removed, and the neurons still there are refitted.

    Neurons leave in the order of the least loss (Optimal Brain Surgeon, Hassibi and Stork 1993; for whole neurons:
    ZipLM, arXiv 2302.04089), `at_once` of them in a round. All arguments are float64: gram [F, F] of down's inputs, its
    weights [D, F], curvature [D, D] of the loss in its outputs.
    """
    alone = (down * (curvature @ down)).sum(0) * gram.diagonal()  # the loss if nobody took over, [F]
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    inverse = torch.linalg.inv(damped).float()
    left = torch.arange(len(gram), device=gram.device)
    w = down.float()
    cw = (curvature @ down).float()
    lost = torch.zeros_like(alone)
    level = alone.new_zeros(())  # what a neuron costs never falls, so that all blocks close theirs in this order
    while len(left) > 0:
        loss = (w * cw).sum(0) / inverse.diagonal()
        order = loss.argsort()
        out = order[:at_once]
        stay = order[at_once:]
        level = torch.maximum(level, loss[out].mean())
        lost[left[out]] = level.double()
        take_over = torch.linalg.solve(inverse[out][:, out], inverse[out][:, stay])  # [out, stay]
        w = w[:, stay] - w[:, out] @ take_over
        cw = cw[:, stay] - cw[:, out] @ take_over
        inverse = inverse[stay][:, stay] - inverse[stay][:, out] @ take_over
        left = left[stay]
    tiny = torch.finfo(alone.dtype).tiny
    return (lost / alone.clamp(min=tiny)).clamp(max=1)


koff.SCORES["surgeon"] = surgeon_scores


class Statistics:
    """What backward passes show of `down` in each block from `first_block` on, {block: sum over tokens}, float64.

    gram [F, F] is H^T H of its inputs H, only with `grams`: it is large. curvature [D, D] is that of the loss in its
    outputs: like the Fisher score, outer products of gradients of log p of tokens that the model draws. Tokens count as
    in `solve.Regression`.
    """

    def __init__(self, model, first_block, memories=None, grams=False):
        self.model = model
        self.first_block = first_block
        self.memories = memories
        self.grams = grams
        self.gram = {}
        self.curvature = {}

    def add(self, tokens, gates=None):
        """Add tokens [B, T]. Returns {name: [N, B, T, channels]}: the gradient of `drawn_token_loss` with respect to
        `gates` set to 1, with a separate gate for every block and token."""
        model = self.model
        z = {}
        by_block = None
        if gates:
            for name, log_alpha in gates.log_alpha.items():
                ones = log_alpha.new_ones(gates.blocks, *tokens.shape, log_alpha.shape[1], dtype=model.head.dtype)
                z[name] = ones.requires_grad_()
            by_block = gates.by_block(z, model.head.dtype)
        with torch.no_grad():
            x = model.run(model.embed_tokens(tokens), 0, self.first_block, memories=self.memories)
        x.requires_grad_()
        inputs = {}
        after = {}  # hidden states after each block
        for i in range(self.first_block, len(model.layers)):
            with inputs_to(model.layers[i].mlp.down_proj) as seen:
                x = model.run(x, i, i + 1, by_block, self.memories)
            inputs[i] = seen[0].detach()
            after[i] = x
        loss = in_chunks(model, x.flatten(0, 1), drawn_token_loss)
        gradients = torch.autograd.grad(loss, [*after.values(), *z.values()])
        for (i, x), gradient in zip(after.items(), gradients, strict=False):
            length = x.detach().float().square().mean(-1, keepdim=True).sqrt()  # RMS of the hidden state
            g = (gradient.float() * length).flatten(0, 1)
            self.curvature[i] = self.curvature.get(i, 0.0) + (g.T @ g).double()
            if self.grams:
                h = (inputs[i].float() / length).flatten(0, 1)
                self.gram[i] = self.gram.get(i, 0.0) + (h.T @ h).double()
        return dict(zip(z, gradients[len(after) :], strict=True))


@contextlib.contextmanager
def inputs_to(projection):
    """Yield a list to which every call of the projection under it adds its input."""
    inputs = []
    hook = projection.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    try:
        yield inputs
    finally:
        hook.remove()
