"""Where gates and memories start (ours; the paper starts all gates alike and a KV memory from noise).

Gates start from a score: the lowest scores are closest to closing. A KV memory starts as the keys and values that the
frozen model has for a passage of the domain's text.
"""

import math

import torch

import koff
from data import BadInput
from data.corpus import batch, passages
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
def spread_by_rank(gates, scores):
    """log alpha from 1 to 5, linear in the rank of `scores` {name: [N, channels]} over all gates."""
    flat = torch.cat([scores[name].flatten() for name in gates.log_alpha])
    rank = flat.argsort().argsort().float()  # 0 for the lowest score
    share = rank / max(1, len(flat) - 1)  # 1 for the highest
    start = koff.split_like(1 + 4 * share, gates.log_alpha)
    for name, log_alpha in gates.log_alpha.items():
        log_alpha.copy_(start[name])


# KV memories ---------------------------------------------------------------------------------------------------------


def starting_context(model, ids, s, first_block):
    """{block: `Memory`}: keys and values of the best of --kv-passages passages of a domain's training text, ids.

    (With --kv-init normal a memory starts from noise; then this context is used for comparison only.)
    """
    device = model.head.device
    places, each = (s.kv_places, 32) if s.kv_places else (s.kv_passages, 64)
    found = passages(ids, s.kv_passages, s.kv_tokens, places, each)
    tried, judged = [torch.from_numpy(tokens).to(device) for tokens in found]
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
