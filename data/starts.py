"""Where gates and memories start (ours; the paper starts all gates alike and a KV memory from noise).

Gates start from a score: the lowest scores are closest to closing. A KV memory starts as the keys and values that the
frozen model has for a passage of the domain's text.
"""

import contextlib
import math

import torch
import torch.nn.functional as F

import koff
from data import BadInput
from data.corpus import batch, passages
from data.fast import in_chunks
from data.objectives import token_losses
from model import Cache, Memory


def start(trainer, texts):
    """Start a trainer's gates from a score, and its KV memories from passages of texts {domain: ids}."""
    if koff.SCORES[trainer.s.gate_init] is not None:
        start_gates(trainer.gates, trainer.model, texts, trainer.s)
    read_contexts(trainer, texts)
    for domain, context in trainer.contexts.items():
        start_kv(trainer.modules[domain], context)


def read_contexts(trainer, texts):
    """Fill `Trainer.contexts` from texts {domain: ids}."""
    _, first_memory, _ = trainer.s.first_blocks(trainer.depth)
    for domain in trainer.domains if trainer.s.kv_from_text else ():
        trainer.contexts[domain] = starting_context(trainer.model, texts[domain], trainer.s, first_memory)


# Gates ---------------------------------------------------------------------------------------------------------------


def start_gates(gates, model, texts, s):
    """Start log alpha from the score that `s.gate_init` names, on texts {domain: ids}."""
    # Equally many sequences of each domain, drawn with another seed than the batches of the training.
    rounds = math.ceil(s.fisher_sequences / (s.batch * len(texts)))
    samples = []
    for ids in texts.values():
        batches = [batch(ids, number, s.batch, s.seq_len, s.seed + 1) for number in range(rounds)]
        samples.append([torch.from_numpy(tokens).to(model.head.device) for tokens in batches])
    torch.manual_seed(s.seed)  # the draws of a score do not depend on the size of the modules
    try:
        scores = koff.SCORES[s.gate_init](model, gates, samples)
    except RuntimeError as error:
        if "probability tensor" not in str(error):  # NaN among them: no token can be drawn
            raise
        raise BadInput(f"{s.model} predicts NaN; download it again, or say --dtype float32.") from None
    spread_by_rank(gates, scores)


@torch.no_grad()
def spread_by_rank(gates, scores, centre=3.0, half=2.0):
    """log alpha = centre -+ half, linear in the rank of `scores` {name: [N, channels]} over all gates."""
    flat = torch.cat([scores[name].flatten() for name in gates.log_alpha])
    rank = flat.argsort().argsort().float()  # 0 for the lowest score
    share = rank / max(1, len(flat) - 1)  # 1 for the highest
    start = koff.split_like(centre - half + 2 * half * share, gates.log_alpha)
    for name, log_alpha in gates.log_alpha.items():
        log_alpha.copy_(start[name])


def fisher_scores(model, gates, texts):
    """{name: [N, channels]}: how much each gate matters, per parameter that closing it frees.

    How fast does the KL to the teacher grow as a gate moves away from 1? Its gradient there is zero, so we use its
    curvature, the Fisher information: squared gradients of log p of tokens that the model itself draws. We sum squared
    per-token gradients instead of squaring the summed gradient, because a module can undo an effect that is the same at
    every token. texts: a list of token tensors [B, T] for each domain. Each domain's scores are normalised to sum to
    one; otherwise domains that the model knows badly would dominate. A gate gets its highest score in any domain.
    """
    c = model.config
    frees = {name: fan_in for name, (_, fan_in) in c.shapes.items()}
    for name in ("gate", "up", "neuron"):
        frees[name] = 3 * c.hidden_size  # without either row the neuron is dead: both rows go, and a column of down
    scores = {name: torch.zeros_like(a) for name, a in gates.log_alpha.items()}
    for batches in texts:
        squares = {name: torch.zeros_like(a) for name, a in gates.log_alpha.items()}
        for tokens in batches:
            for name, gradient in gate_gradients(model, gates, tokens).items():
                squares[name] += gradient.float().square().sum(dim=(1, 2))
        total = sum(square.sum() for square in squares.values())
        for name, square in squares.items():
            scores[name] = torch.maximum(scores[name], square / total / frees[name])
    return scores


def gate_gradients(model, gates, tokens):
    """{name: [N, B, T, channels]}: gradient of `drawn_token_loss` with respect to gates set to 1, with a separate gate
    for every block and token."""
    z = {}
    for name, log_alpha in gates.log_alpha.items():
        ones = log_alpha.new_ones(gates.blocks, *tokens.shape, log_alpha.shape[1], dtype=model.head.dtype)
        z[name] = ones.requires_grad_()
    with torch.no_grad():
        x = model.run(model.embed_tokens(tokens), 0, gates.first_block)
    hidden = model.run(x, gates.first_block, model.config.num_hidden_layers, gates.by_block(z, x.dtype))
    loss = in_chunks(model, hidden.flatten(0, 1), drawn_token_loss)
    return dict(zip(z, torch.autograd.grad(loss, list(z.values())), strict=True))


def drawn_token_loss(logits):
    """Cross-entropy of each row of logits [n, V] against a token drawn from it, in nats."""
    drawn = torch.multinomial(logits.detach().softmax(-1), 1)  # [n, 1]
    return F.cross_entropy(logits, drawn[:, 0], reduction="none")


koff.SCORES["fisher"] = fisher_scores


def surgeon_scores(model, gates, texts, at_once=8):
    """`fisher_scores`, in which a neuron counts only for the part of its effect that other neurons cannot take over.

    Least squares will repair what can be repaired (data/solve.py), so two neurons that say the same need not both stay.
    """
    scores = fisher_scores(model, gates, texts)
    every = [tokens for batches in texts for tokens in batches]
    statistics = down_statistics(model, every, gates.first_block)
    shares = []
    for i, (gram, curvature) in statistics.items():
        down = model.layers[i].mlp.down_proj.weight.double()
        shares.append(irreplaceable(gram, down, curvature, at_once))
    for name in scores.keys() & {"gate", "up", "neuron"}:
        scores[name] = scores[name] * torch.stack(shares).float()
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


def down_statistics(model, batches, first_block, memories=None, grams=True):
    """{block: (H^T H [F, F], C [D, D])} of `down` from `first_block` on, float64 means over tokens.

    H are its inputs; without `grams` H^T H, which is large, is None. C is the curvature of the loss in its outputs:
    like the Fisher score, the mean outer product of gradients of log p of tokens that the model draws. Tokens count as
    in `solve.Regression`. batches: tokens [B, T].
    """
    found = {}
    for tokens in batches:
        with torch.no_grad():
            x = model.run(model.embed_tokens(tokens), 0, first_block, memories=memories)
        x.requires_grad_()
        inputs = {}
        after = {}  # hidden states after each block
        for i in range(first_block, len(model.layers)):
            with inputs_to(model.layers[i].mlp.down_proj) as seen:
                x = model.run(x, i, i + 1, memories=memories)
            inputs[i] = seen[0].detach()
            after[i] = x
        loss = in_chunks(model, x.flatten(0, 1), drawn_token_loss)
        gradients = torch.autograd.grad(loss, list(after.values()))
        for i, gradient in zip(after, gradients, strict=True):
            length = after[i].detach().float().square().mean(-1, keepdim=True).sqrt()  # RMS of the hidden state
            h = (inputs[i].float() / length).flatten(0, 1)
            g = (gradient.float() * length).flatten(0, 1)
            of_block = {"gram": h, "curvature": g} if grams else {"curvature": g}
            sums = found.setdefault(i, {name: 0.0 for name in of_block})
            for name, x in of_block.items():
                sums[name] += (x.T @ x).double()  # in place, after the first batch
    n = sum(tokens.numel() for tokens in batches)
    for sums in found.values():
        for total in sums.values():
            total /= n
    return {i: (sums.get("gram"), sums["curvature"]) for i, sums in found.items()}


@contextlib.contextmanager
def inputs_to(projection):
    """Yield a list to which every call of the projection under it adds its input."""
    inputs = []
    hook = projection.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    try:
        yield inputs
    finally:
        hook.remove()


# KV memories ---------------------------------------------------------------------------------------------------------


def starting_context(model, ids, s, first_block):
    """{block: `Memory`}: keys and values of the best of --kv-passages passages of a domain's training text, ids.

    (With --kv-init normal a memory starts from noise; then this context is used for comparison only.)
    """
    device = model.head.device
    tried, judged = [torch.from_numpy(tokens).to(device) for tokens in passages(ids, s.kv_passages, s.kv_tokens)]
    return best_context(model, tried, judged, first_block)


@torch.no_grad()
def text_context(model, tokens, first_block):
    """{block: `Memory`} from `first_block` on: the keys and values that the frozen model has for tokens [M]."""
    cache = Cache(room=0)
    model.hidden(tokens[None], cache=cache)
    context = {}
    for i in range(first_block, len(model.layers)):
        keys, values = cache.layers[i]  # [1, G, M, hd]
        context[i] = Memory(keys=keys[0], values=values[0])
    return context


@torch.no_grad()
def best_context(model, tried, judged, first_block):
    """The `text_context` of that passage of `tried` [P, M] after which the model best predicts the texts `judged`
    [P, T]. (The beginning of a text is often a poor start: a title, a licence.)"""
    contexts = [text_context(model, passage, first_block) for passage in tried]
    if len(contexts) == 1:
        return contexts[0]
    shared = model.run(model.embed_tokens(judged), 0, first_block)
    losses = [token_losses(model, context, shared, first_block, judged).mean() for context in contexts]
    return contexts[torch.stack(losses).argmin().item()]


@torch.no_grad()
def start_kv(module, context):
    """The keys and values of a `MemoryModule` become those of a `text_context`."""
    for n in range(module.blocks):
        module.keys[n] = context[module.first_block + n].keys
        module.values[n] = context[module.first_block + n].values
