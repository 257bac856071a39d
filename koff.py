"""Knowledge offloading (Galliamov, Choenni, Titov, arXiv 2605.29075): gates, memory modules, distillation, the mask.

    min over z, {M_d}:  sum_d E_{x in D_d} KL(teacher || student(z, M_d))  +  lambda * Omega(z)                   Eq. 1
                        + the same KL on general text with a random module attached, for the gates only           Eq. 2

The paper's symbols and where they are:

    f_theta        the frozen pretrained model, `model.Model`; the teacher is this model without gates and LoRA
    z              gates on output channels; learned as log alpha, `Gates.log_alpha`; sampled by `hard_concrete`
    M_d            the memory module of domain d, `MemoryModule`; its part in one block is a `model.Memory`
    dW_d x         LoRA, B A x in `model.Projection`;  K_mem, V_mem (Eq. 3): `Memory.keys` and `.values`
    Omega(z)       how far the sparsity (`Gates.sparsity`) is from its target;  with its lambda: `Penalty`
    distill        `kl_topk`, KL to the teacher's top-K outcomes, and the rest of them as `--tail` says
    s*             the target, `--sparsity`, by one of two counts (`Gates.removed`)
    materialise    the final 0/1 mask (`Gates.final_mask`) cuts closed channels out of the matrices, `materialise`

Ours, not the paper's: once the mask is fixed LoRA on `down` has a closed form, `solve_memories`, from which training
goes on; and the teacher has read the text with which a KV memory starts, `text_context`.

Shapes as in `model.py`; N is the number of gated blocks, K the number of the teacher's outcomes that are kept.
"""

import contextlib
import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from model import Cache, Memory, Model, matrix_name

# Hard Concrete gates (Louizos et al. 2018, arXiv 1712.01312) on output channels --------------------------------------

GAMMA, ZETA = -0.1, 1.1  # the stretch of the concrete distribution; the paper gives none, these are Louizos'
# Which projections have gates: the sets that the paper compares; its choice is "kv+mlp". (To gate q too, add "qkv+mlp":
# nothing else has to change. The modules have no LoRA on q, see `LORA`.)
GATED = ("kv", "qkv", "kv+mlp", "kv+mlp+o")
MLP_GATES = {"projection": ("gate", "up", "down"), "neuron": ("neuron", "down")}


def p_open(log_alpha, beta):
    """P(z > 0) = sigmoid(log alpha - beta log(-gamma / zeta))  (Louizos, Eq. 12)."""
    return torch.sigmoid(log_alpha - beta * math.log(-GAMMA / ZETA))


def hard_concrete(log_alpha, beta, u):
    """z in [0, 1] for uniform noise u in (0, 1), differentiable in log_alpha  (Louizos, Eq. 10 and 11)."""
    s = torch.sigmoid((torch.logit(u) + log_alpha) / beta)
    return (s * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


class Gates(nn.Module):
    """log alpha of every gate in blocks first .. first + N - 1: one parameter [N, channels] per gated projection.

    granularity "projection" is the paper's: gate, up and down each on its own. "neuron" has one gate per MLP neuron, on
    silu(gate) * up: closing it frees a row of gate, a row of up and a column of down. gated: one of `GATED`.
    """

    def __init__(self, config, first, granularity="neuron", beta=2 / 3, gated="kv+mlp", start=3.0):
        super().__init__()
        self.config = config
        self.first = first
        self.beta = beta
        names = []
        for part in gated.split("+"):
            names += MLP_GATES[granularity] if part == "mlp" else list(part)  # "kv" is k and v
        self.blocks = config.num_hidden_layers - first  # N
        log_alpha = {}
        for name in names:
            channels = config.intermediate_size if name == "neuron" else config.shapes[name][0]
            log_alpha[name] = torch.full((self.blocks, channels), start)
        self.log_alpha = nn.ParameterDict(log_alpha)
        with torch.device("meta"):  # shapes without numbers: how many parameters has the whole unpruned model?
            self.total = count_parameters(Model(config))

    def by_block(self, z, dtype):
        """{name: [N, channels]} -> {block: {name: [channels]}}, the form that `Model` takes; cast once, not per use."""
        blocks = {self.first + n: {} for n in range(self.blocks)}
        for name, values in z.items():
            for n, row in enumerate(values.to(dtype).unbind()):
                blocks[self.first + n][name] = row
        return blocks

    def sample(self, dtype, generator=None):
        """One draw of all gates in the form that `Model` takes, differentiable in log alpha."""
        z = {}
        for name, log_alpha in self.log_alpha.items():
            u = torch.empty_like(log_alpha).uniform_(1e-6, 1 - 1e-6, generator=generator)
            z[name] = hard_concrete(log_alpha, self.beta, u)
        return self.by_block(z, dtype)

    def p_open(self):
        """{name: [N, channels]}: the probability that each gate is not zero."""
        p = {}
        for name, log_alpha in self.log_alpha.items():
            p[name] = p_open(log_alpha, self.beta)
        return p

    def removed(self, is_open, count):
        """Parameters removed, a scalar, for `is_open` {name: [N, channels]}: P(open), or 0 and 1 (exact in float64).

        count "paper": closed channels x fan-in. "physical": parameters missing from the materialised backbone. They
        follow from the joint state: a neuron lives only if its gate *and* its up are open. Gates are independent, so
        that the expectation of a product is the product of the expectations.
        """
        c = self.config
        removed = 0
        for name, p in is_open.items():
            closed = (1 - p).sum()
            if name == "neuron":
                fan_in = 2 * c.hidden_size  # that of its row of gate and that of its row of up
            else:
                fan_in = c.shapes[name][1]
            if count == "paper":
                removed = removed + closed * fan_in
            elif name in ("q", "k", "v", "o"):
                bias = c.o_bias if name == "o" else c.qkv_bias
                removed = removed + closed * (fan_in + bias)  # a row of the matrix, and its bias where there is one
        if count == "paper" or "down" not in is_open:  # without gates on the MLP nothing else is removed
            return removed

        # The MLP: what it has before, less what the open neurons and the open rows of down leave of it.
        neurons = is_open["neuron"] if "neuron" in is_open else is_open["gate"] * is_open["up"]
        before = self.blocks * self.mlp_size(c.intermediate_size, c.hidden_size)
        alive = neurons.sum(-1)  # [N], in each block
        rows = is_open["down"].sum(-1)
        after = self.mlp_size(alive, rows)
        return removed + (before - after.sum())

    def mlp_size(self, neurons, rows):
        """Parameters of an MLP with so many neurons and so many rows of down left: numbers, or tensors of any shape."""
        size = 2 * self.config.hidden_size * neurons + neurons * rows  # gate and up, then down
        if self.config.mlp_bias:
            size = size + 2 * neurons + rows
        return size

    def sparsity(self, mask=None, count="physical"):
        """Share of all parameters removed: the expected one, differentiable; with a 0/1 mask the exact one."""
        if mask is None:
            is_open = self.p_open()
        else:
            is_open = {name: rows.double() for name, rows in mask.items()}
        return self.removed(is_open, count) / self.total

    @torch.no_grad()
    def start_from(self, scores, centre=3.0, half=2.0):
        """Start log alpha at centre -+ half, linear in the rank of `scores` {name: [N, channels]} over all gates."""
        flat = torch.cat([scores[name].flatten() for name in self.log_alpha])
        rank = flat.argsort().argsort().float()  # 0 for the lowest score
        share = rank / max(1, len(flat) - 1)  # 1 for the highest
        start = split_like(centre - half + 2 * half * share, self.log_alpha)
        for name, log_alpha in self.log_alpha.items():
            log_alpha.copy_(start[name])

    @torch.no_grad()
    def final_mask(self, target, count, multiple=1):
        """{name: bool [N, channels]}, True is open: the lowest log alpha close until the exact count reaches `target`.

        With granularity "neuron" the open neurons of a block are rounded to a `multiple`, which GPUs like; the other
        gates make up for it. Overshoots by one gate at most, by one multiple where hardly any other gate is closed.
        """
        log_alpha = {}
        for name, a in self.log_alpha.items():
            log_alpha[name] = a.float().cpu()
        if multiple == 1 or "neuron" not in log_alpha:
            return self.close_lowest(log_alpha, target, count)
        rounded = self.close_lowest(log_alpha, target, count, multiple)
        # Once more with the neurons as they are now, so that their places in the order do nothing: a search in steps of
        # `multiple` neurons overshoots by as many, and the finer gates of k, v and down can land closer.
        return self.close_lowest(log_alpha, target, count, neurons=rounded["neuron"])

    def close_lowest(self, log_alpha, target, count, multiple=1, neurons=None):
        """The mask that closes as few gates as reach the target, in order of log alpha (see `final_mask`)."""
        flat = [a.flatten() for a in log_alpha.values()]
        order = torch.cat(flat).argsort(stable=True)
        # Closing one gate more never gives parameters back. So the least number that reaches the target is found by
        # halving the interval in which it lies.
        low = 0
        high = len(order)
        while low < high:
            middle = (low + high) // 2
            mask = mask_without(order[:middle], log_alpha, multiple, neurons)
            if self.sparsity(mask, count) >= target:
                high = middle
            else:
                low = middle + 1
        return mask_without(order[:low], log_alpha, multiple, neurons)


def count_parameters(module):
    return sum(p.numel() for p in module.parameters())


def split_like(flat, like):
    """Cut a vector over all gates into {name: [N, channels]}, in the shapes and the order of `like`."""
    parts = {}
    start = 0
    for name, tensor in like.items():
        end = start + tensor.numel()
        parts[name] = flat[start:end].view_as(tensor)
        start = end
    return parts


def mask_without(closed, log_alpha, multiple, neurons):
    """The mask whose `closed` gates (places among all gates) are False, with rounded or with given neurons."""
    gates = sum(a.numel() for a in log_alpha.values())
    is_open = torch.ones(gates, dtype=torch.bool)
    is_open[closed] = False
    mask = split_like(is_open, log_alpha)
    if neurons is not None:
        mask["neuron"] = neurons
    elif multiple > 1:
        wanted = mask["neuron"].sum(-1, keepdim=True)  # [N, 1]
        wanted = (wanted / multiple).round() * multiple
        order = log_alpha["neuron"].argsort(dim=-1, stable=True)
        rank = order.argsort(-1)  # within the block; the highest is the best
        mask["neuron"] = rank >= rank.shape[-1] - wanted
    return mask


class Penalty:
    """lambda * Omega(z) of Eq. 1 from the gap between target and sparsity, with multipliers [2] that follow it.

    The gap is the one that there will be when AdamW's momentum has died down: it moves the gates on for some nine steps
    as fast as they are now, and only the loss opens what has closed too much.
    hinge, progressive: Omega is the gap, 0 at the target and beyond ("progressive" is the hinge behind a rising target,
    see `Trainer.target`). The paper's "auto-scaling" of lambda is not given; here, with --scaled, lambda grows by 3% a
    step while there is a gap that does not shrink, and shrinks by as much while there is none. The less lambda needs to
    be, the more the loss decides which gates close.
    lagrangian: lambda_1 gap + lambda_2 gap^2, whose multipliers climb their own gradients (Sheared LLaMA, arXiv
    2310.06694). It pulls back what went too far. lambda_2 begins at three times `start`, because a square is small,
    which is also the rate at which both climb; lambda_1 begins at 0 and climbs slowly, or what it gathers on the way
    would lead far beyond the target.
    """

    MOMENTUM = 9  # steps: the sum of 0.9, 0.9^2, ...
    CLOSE = 0.002  # of all parameters: a smaller gap is none
    GROWTH = 1.03
    LARGEST = 6000.0  # a lambda beyond would leave nothing of the loss
    UP, DOWN = 0.01, 0.15  # of its gradient, for lambda_1

    def __init__(self, kind, start, scaled, device):
        self.kind = kind
        self.scaled = scaled
        self.rate = 3 * start
        first = [0.0, self.rate] if kind == "lagrangian" else [start, 0.0]
        self.multipliers = torch.tensor(first, device=device)
        self.last = None  # [2]: sparsity and gap of the step before

    def __call__(self, sparsity, target):
        """The penalty for the expected sparsity, both scalars. Each call also moves the multipliers, for the next."""
        gap = target - sparsity.detach()
        now = torch.stack([sparsity.detach(), gap])
        speed, widening = now - (now if self.last is None else self.last)
        self.last = now
        gap_ahead = target - (sparsity + self.MOMENTUM * speed)
        if self.kind == "lagrangian":
            loss = self.multipliers[0] * gap_ahead + self.multipliers[1] * gap_ahead.square()
            slowly = torch.where(gap > 0, self.UP, self.DOWN)
            climb = self.rate * torch.stack([slowly * gap, gap.square()])
            self.multipliers = (self.multipliers + climb).clamp(min=0)  # the loss opens gates by itself
            return loss
        loss = self.multipliers[0] * gap_ahead.clamp(min=0)
        if self.scaled:
            behind = torch.where(widening >= 0, self.GROWTH, 1.0)
            factor = torch.where(gap > self.CLOSE, behind, 1 / self.GROWTH)
            self.multipliers = (self.multipliers * factor).clamp(1.0, self.LARGEST)  # never lost for good
        return loss


def fisher_scores(model, gates, texts):
    """{name: [N, channels]}: how much each gate matters per parameter that it frees, to start log alpha from.

    How fast does the KL to the teacher grow when a gate leaves 1 at one token? There it has no slope, so that its
    curvature counts, the Fisher information: the squared gradient of log p of tokens that the model itself draws. It is
    summed over tokens, rather than squared as a sum: what a closed gate changes alike everywhere, a module gives back.
    texts: of each domain a list of token tensors [B, T]. A domain's scores are scaled to a sum of one, or those that
    the model knows badly would decide alone; a gate matters as much as to the domain that needs it most.
    """
    c = model.config
    frees = {name: columns for name, (_, columns) in c.shapes.items()}
    for name in ("gate", "up", "neuron"):
        frees[name] = 3 * c.hidden_size  # without either row the neuron is dead: both rows go, and a column of down
    scores = {name: torch.zeros_like(a) for name, a in gates.log_alpha.items()}
    for batches in texts:
        squares = {name: torch.zeros_like(a) for name, a in gates.log_alpha.items()}
        for tokens in batches:
            for name, gradient in gate_gradients(model, gates, tokens).items():
                squares[name] += gradient.float().square().sum(dim=(1, 2))
        whole = sum(square.sum() for square in squares.values())
        for name, square in squares.items():
            scores[name] = torch.maximum(scores[name], square / whole / frees[name])
    return scores


def gate_gradients(model, gates, tokens):
    """{name: [N, B, T, channels]}: `drawn_token_loss` by gates that are 1, of each block and token one of its own."""
    z = {}
    for name, log_alpha in gates.log_alpha.items():
        ones = log_alpha.new_ones(gates.blocks, *tokens.shape, log_alpha.shape[1], dtype=model.head.dtype)
        z[name] = ones.requires_grad_()
    with torch.no_grad():
        x = model.run(model.embed_tokens(tokens), 0, gates.first)
    hidden = model.run(x, gates.first, model.config.num_hidden_layers, gates.by_block(z, x.dtype))
    loss = in_chunks(model, hidden.flatten(0, 1), drawn_token_loss)
    return dict(zip(z, torch.autograd.grad(loss, list(z.values())), strict=True))


def drawn_token_loss(logits):
    """Cross-entropy of each row of logits [n, V] against a token drawn from it, in nats."""
    drawn = torch.multinomial(logits.detach().softmax(-1), 1)  # [n, 1]
    return F.cross_entropy(logits, drawn[:, 0], reduction="none")


# Scores to start the gates from: (model, gates, texts) -> {name: [N, channels]}. To try one of your own, name it
# here: it is then a choice of --gate-init.
SCORES = {"fisher": fisher_scores}


# The memory module of a domain: LoRA on five projections, and M trainable keys and values ----------------------------

# Which projections of a module have LoRA; the paper's choice is "kv+mlp". `down` is in all: for it alone LoRA has a
# closed form, see `solve_memories`.
LORA = {"kv+mlp": ("k", "v", "gate", "up", "down"), "mlp": ("gate", "up", "down"), "down": ("down",)}


class MemoryModule(nn.Module):
    """M_d, float32, in the upper blocks from `first` on; here N is their number (see `--memory-blocks`).

    LoRA A [N, r, fan-in] and B [N, channels, r]; keys and values [N, G, M, hd], keys after RoPE.
    """

    def __init__(self, config, first, rank, alpha, kv_tokens, lora="kv+mlp"):
        super().__init__()
        self.first = first
        self.blocks = config.num_hidden_layers - first  # N
        self.rank = rank
        self.scale = alpha / rank if rank else 0.0
        self.lora_a = nn.ParameterDict()
        self.lora_b = nn.ParameterDict()
        for name in LORA[lora] if rank else ():
            channels, fan_in = config.shapes[name]
            bound = fan_in**-0.5  # Kaiming-uniform with a = sqrt(5), as peft; B = 0: at first LoRA adds nothing
            a = torch.empty(self.blocks, rank, fan_in)
            self.lora_a[name] = a.uniform_(-bound, bound)
            self.lora_b[name] = torch.zeros(self.blocks, channels, rank)
        self.keys = None
        self.values = None
        if kv_tokens:
            shape = (self.blocks, config.num_key_value_heads, kv_tokens, config.head_dim)
            self.keys = nn.Parameter(torch.randn(shape) * 0.02)
            self.values = nn.Parameter(torch.randn(shape) * 0.02)

    def parameter_groups(self):
        """{"lora": [...], "kv": [...]}: every parameter once, by the learning rate that it gets."""
        lora = [*self.lora_a.values(), *self.lora_b.values()]
        kv = [] if self.keys is None else [self.keys, self.values]
        return {"lora": lora, "kv": kv}

    @torch.no_grad()
    def init_kv(self, context):
        """Keys and values become those of a `text_context`."""
        for n in range(self.blocks):
            self.keys[n] = context[self.first + n].keys
            self.values[n] = context[self.first + n].values

    @torch.no_grad()
    def set_lora(self, i, name, a, b, columns, rows):
        """Block i gets LoRA A [up to r, columns] and B [rows, up to r], with alpha / r in B, and 0 elsewhere."""
        whole_a = self.lora_a[name][i - self.first]
        whole_b = self.lora_b[name][i - self.first].zero_()
        whole_a[: len(a)] = 0  # rows of A that are not needed stay random: with B = 0 they add nothing, but can learn
        whole_a[: len(a), columns] = a.to(whole_a.dtype)
        whole_b[rows, : len(a)] = (b / self.scale).to(whole_b.dtype)

    def by_block(self, dtype):
        """{block: `Memory`} in `dtype`, the form that `Model` takes; cast once, then a view for each block."""
        lora = [{} for _ in range(self.blocks)]
        for name in self.lora_a:
            a = self.lora_a[name].to(dtype).unbind()  # N times [r, fan-in]
            b = (self.scale * self.lora_b[name]).to(dtype).unbind()
            for n in range(self.blocks):
                lora[n][name] = (a[n], b[n])
        keys = [None] * self.blocks
        values = keys
        if self.keys is not None:
            keys = self.keys.to(dtype).unbind()
            values = self.values.to(dtype).unbind()
        module = {}
        for n in range(self.blocks):
            module[self.first + n] = Memory(lora[n], keys[n], values[n])
        return module


@torch.no_grad()
def text_context(model, tokens, first):
    """{block: `Memory`} from block `first` on: the keys and values that the frozen model has for tokens [M]."""
    cache = Cache(room=0)
    model.hidden(tokens[None], cache=cache)
    context = {}
    for i in range(first, len(model.layers)):
        keys, values = cache.layers[i]  # [1, G, M, hd]
        context[i] = Memory(keys=keys[0], values=values[0])
    return context


@torch.no_grad()
def best_context(model, tried, judged, first):
    """The `text_context` of the one of the passages `tried` [P, M] after which the model predicts the texts `judged`
    [P, T] best. (The beginning of a text is often a poor start: a title, a licence.)"""
    contexts = [text_context(model, passage, first) for passage in tried]
    if len(contexts) == 1:
        return contexts[0]
    shared = model.run(model.embed_tokens(judged), 0, first)
    losses = [token_losses(model, context, shared, first, judged).mean() for context in contexts]
    return contexts[torch.stack(losses).argmin().item()]


# Distillation: KL(teacher || student) on the teacher's top-K outcomes ------------------------------------------------


def top_and_rest(logits, index):
    """(log-probability of the outcomes at `index` [n, K], of all others together [n, 1]) under logits [n, V].

    The others are summed by themselves and not got as 1 - the sum of the top, so that a rest of 1e-9 is exact.
    """
    top = logits.gather(-1, index)
    others = logits.scatter(-1, index, float("-inf"))  # a copy without the top
    rest = others.logsumexp(-1, keepdim=True)
    log_z = torch.logaddexp(top.logsumexp(-1, keepdim=True), rest)  # logsumexp of all logits
    return top - log_z, rest - log_z


@torch.no_grad()
def teacher_topk(model, hidden, top=100, chunk=128):
    """What distillation asks of the teacher: (index [n, K], log p there [n, K], log p of the rest [n, 1]) of its
    hidden states [n, D]."""
    chunks = []
    for h in hidden.split(chunk):  # never more than a chunk of logits at a time: the vocabulary is wide
        logits = model.logits(h)
        K = min(top, logits.shape[-1] - 1)  # something has to be left outside
        index = logits.topk(K, dim=-1).indices
        chunks.append((index, *top_and_rest(logits, index)))
    return tuple(torch.cat(parts) for parts in zip(*chunks, strict=True))


def kl_bucket(logits, index, log_p, log_p_rest):
    """All outcomes outside the top K are one more outcome on both sides, so that no mass leaks there unseen."""
    log_q, log_q_rest = top_and_rest(logits, index)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    kl_rest = (log_p_rest.exp() * (log_p_rest - log_q_rest)).squeeze(-1)
    return kl + kl_rest


def kl_renormalise(logits, index, log_p, log_p_rest):
    """Both top-K distributions are scaled to a sum of one; what is outside is not looked at."""
    log_p = log_p.log_softmax(-1)
    log_q = logits.gather(-1, index).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def kl_drop(logits, index, log_p, log_p_rest):
    """The true probabilities of the top K, and no term for what is outside."""
    log_q, _ = top_and_rest(logits, index)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


TAILS = {"bucket": kl_bucket, "renormalise": kl_renormalise, "drop": kl_drop}


NO_TARGET = -100  # the last token of a sequence: what follows it is not known


def next_token_loss(logits, targets):
    """Cross-entropy of each row of logits [n, V] against targets [n], in nats; 0 where the target is `NO_TARGET`."""
    return F.cross_entropy(logits, targets, reduction="none", ignore_index=NO_TARGET)


@torch.no_grad()
def token_losses(model, module, shared, first, tokens):
    """Next-token loss of each token that can be predicted, [n, T - 1] float64, in nats.

    tokens [n, T]; shared [n, T, D]: their hidden states before block `first`, the same for every model and module.
    """
    hidden = model.run(shared, first, len(model.layers), module=module)
    losses = []
    for states, row in zip(hidden, tokens, strict=True):  # one row's logits at a time: the vocabulary is wide
        logits = model.logits(states[:-1])  # [T - 1, V]: the last token predicts nothing that we know
        loss = next_token_loss(logits, row[1:])
        losses.append(loss.double())
    return torch.stack(losses)


# What a step of training minimises: (logits [n, V], `teacher_topk` of these rows, next tokens [n], tail) -> [n].


def kl_topk(logits, teacher, targets=None, tail="bucket"):
    """KL(teacher || student) of each row. Autograd finds its gradient in the logits (p and q are the probabilities):

    bucket: q - p in the top K, q (1 - p_rest / q_rest) outside; renormalise: q - p of the renormalised two, 0 outside;
    drop: q sum(p) - p in the top K, q sum(p) outside, with the sum over the top K.
    """
    return TAILS[tail](logits, *teacher)


def next_token(logits, teacher, targets, tail):
    """Plain language modelling, without the teacher. The last token of a sequence counts as 0."""
    return next_token_loss(logits, targets)


def blend(logits, teacher, targets, tail):
    """(KL + next-token loss) / 2. (It diverged in the paper.)"""
    kl = kl_topk(logits, teacher, targets, tail)
    return (kl + next_token_loss(logits, targets)) / 2


# To try a loss of your own, write it in torch and name it here: it is then a choice of --objective.
OBJECTIVES = {"kl": kl_topk, "next-token": next_token, "blend": blend}


class InChunks(torch.autograd.Function):
    """The sum of a loss over the rows of a hidden state, one chunk of logits at a time.

    Logits are the largest tensor of a step: 49,152 to 151,936 numbers a token. So each chunk is taken to its loss, and
    at once back to the gradient of its hidden rows, by autograd, before the next chunk is made.
    """

    @staticmethod
    def forward(ctx, hidden, model, loss, size, *beside):
        gradient = torch.empty_like(hidden)
        total = torch.zeros((), device=hidden.device)
        for start in range(0, len(hidden), size):
            rows = slice(start, start + size)
            part = hidden[rows].detach()
            with torch.enable_grad():  # inside a Function autograd is off
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
        others = len(ctx.needs_input_grad) - 1  # model, loss, size and what is beside have no gradient
        return (scale * gradient, *[None] * others)


def in_chunks(model, hidden, loss, *beside, size=128):
    """Sum over the rows of hidden [n, D] of loss(logits [rows, V], rows of each of `beside` [n, ...]) -> [rows]."""
    return InChunks.apply(hidden, model, loss, size, *beside)


def distill(model, hidden, teacher, tokens, objective="kl", tail="bucket"):
    """The objective, mean per token, for the student's hidden states [B, T, D] on tokens [B, T]; a scalar."""
    targets = torch.full_like(tokens, NO_TARGET)
    targets[:, :-1] = tokens[:, 1:]

    def loss(logits, next_tokens, *outcomes):  # of one chunk of rows
        return OBJECTIVES[objective](logits, outcomes, next_tokens, tail)

    rows = hidden.flatten(0, 1)  # [B T, D]
    total = in_chunks(model, rows, loss, targets.flatten(), *teacher)
    return total / tokens.numel()


# Materialising the mask: closed channels leave the matrices ----------------------------------------------------------


def kept_channels(mask, config, first, device):
    """{block: {projection: int64 [kept]}}: the open channels of mask {name: bool [N, channels]}.

    "neuron" is the same as "gate" and "up": a neuron needs both.
    """
    blocks = config.num_hidden_layers - first
    is_open = {}
    for name, (channels, _) in config.shapes.items():
        is_open[name] = torch.ones(blocks, channels, dtype=torch.bool)  # what has no gate stays
    is_open.update(mask)
    neurons = mask["neuron"] if "neuron" in mask else is_open["gate"] & is_open["up"]
    for name in ("neuron", "gate", "up"):
        is_open[name] = neurons
    kept = {}
    for n in range(blocks):
        kept[first + n] = {}
        for name, rows in is_open.items():
            index = rows[n].nonzero()[:, 0]
            kept[first + n][name] = index.to(device)
    return kept


@torch.no_grad()
def materialise(model, kept):
    """The physically smaller model of `kept_channels`: its output is that of `model` with the same 0/1 gates."""
    c = model.config
    state = dict(model.state_dict())
    sizes = [None] * c.num_hidden_layers
    for i, index in kept.items():
        sizes[i] = {}
        for name in ("q", "k", "v", "o", "neuron", "down"):
            sizes[i][name] = len(index[name])
        for name, (channels, _) in c.shapes.items():
            if len(index[name]) == channels:
                continue
            for key in (f"{matrix_name(i, name)}.weight", f"{matrix_name(i, name)}.bias"):
                if key in state:
                    state[key] = state[key][index[name]]
            if name not in ("gate", "up"):  # cut-out neurons are gone for good, other channels are zeros at their place
                state[f"{matrix_name(i, name)}.kept"] = index[name]
        if len(index["neuron"]) < c.intermediate_size:
            down = f"{matrix_name(i, 'down')}.weight"
            state[down] = state[down][:, index["neuron"]].contiguous()  # the columns that dead neurons fed
    with torch.device("meta"):
        raw = {**c.raw, "koff_kept": sizes}  # so that the saved config.json says it too
        small = Model(replace(c, rows_left=tuple(sizes), raw=raw))
    small.load_state_dict(state, assign=True)
    return small.requires_grad_(False)


def materialise_module(module, kept):
    """{block: `Memory`} for the model that `materialise` makes: LoRA loses the rows and columns that left the matrix.
    Differentiable, so that a module can be trained on the smaller model."""
    small = dict(module)
    for i in module.keys() & kept.keys():
        lora = {}
        for name, (a, b) in module[i].lora.items():
            if name == "down":
                a = a.index_select(1, kept[i]["neuron"])
            lora[name] = (a, b.index_select(0, kept[i][name]))
        small[i] = replace(module[i], lora=lora)
    return small


# Memories by least squares: once the mask is fixed, LoRA on `down` has a closed form ---------------------------------


@torch.no_grad()
def solve_memories(model, student, module, kept, batches, ridge):
    """Set a `MemoryModule`'s LoRA on `down` so that the student's hidden states come closest to the teacher's.

    Forward passes only, block by block from the first gated one up. With H [n, F'] what the student's neurons say, and
    R [n, D'] what its hidden state after the block lacks of the teacher's, the best LoRA is the rank-r regression of R
    on H. The blocks below are already solved, and the rest of the module is attached as it is. Its keys and values are
    the teacher's too: they are context, and LoRA should give back what was cut, not undo what context adds.
    Not in the paper, whose modules are trained only.

    student, kept: `materialise`, `kept_channels`; batches: token tensors [B, T] of the module's domain; ridge: see
    `reduced_rank_regression`. Returns {block: share of R that was explained, float64 scalars}. Memory: the hidden
    states of all tokens twice, H of one block, and H^T H [F', F'] in float64.
    """
    dtype = model.head.dtype
    split = min(min(kept), module.first)  # as in `Trainer`
    first = max(min(kept), module.first)  # the first block that has both: gates and a memory
    whole = module.by_block(dtype)
    memories = materialise_module(whole, kept)
    context = {i: replace(memory, lora={}) for i, memory in whole.items()}
    teachers = []  # hidden states before the block that is solved, [B, T, D] of each batch
    students = []
    for tokens in batches:
        shared = model.run(model.embed_tokens(tokens), 0, split)
        teachers.append(model.run(shared, split, first, module=context))
        students.append(student.run(shared, split, first, module=memories))

    explained = {}
    for i in range(first, len(model.layers)):
        # The block without LoRA on down: what does it say, and what does it lack?
        lora = {name: pair for name, pair in memories[i].lora.items() if name != "down"}
        memory = {i: replace(memories[i], lora=lora)}
        with inputs_to(student.layers[i].mlp.down_proj) as neurons:  # [B, T, F'] of each batch
            for n in range(len(batches)):
                teachers[n] = model.run(teachers[n], i, i + 1, module=context)
                students[n] = student.run(students[n], i, i + 1, module=memory)

        rows = kept[i]["down"]
        gram, cross, square = products(neurons, teachers, students, rows)
        a, b, fitted = reduced_rank_regression(gram, cross, module.rank, ridge)
        module.set_lora(i, "down", a, b, kept[i]["neuron"], rows)
        explained[i] = fitted / square.clamp(min=torch.finfo(square.dtype).tiny)
        for n, h in enumerate(neurons):
            added = F.linear(F.linear(h, a.to(dtype)), b.to(dtype))
            students[n] = students[n].index_add(-1, rows, added)
    return explained


def products(neurons, teachers, students, rows):
    """(H^T H [F', F'], H^T R [F', D'], |R|^2) in float64, from lists of [B, T, ...]; R has the channels `rows` only."""
    device = rows.device
    width = neurons[0].shape[-1]
    gram = torch.zeros(width, width, dtype=torch.float64, device=device)
    cross = torch.zeros(width, len(rows), dtype=torch.float64, device=device)
    square = torch.zeros((), dtype=torch.float64, device=device)
    for h, teacher, student in zip(neurons, teachers, students, strict=True):
        # A token counts by 1 / RMS of its hidden state, as the norm that reads it will see it. Else some few with
        # massive activations would decide alone.
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
    """(A [r, F], B [D, r], how much of |R|^2 it explains): H A^T B^T is the best approximation of R, of its rank.

    From H^T H [F, F] and H^T R [F, D], float64. Best with the penalty lambda |A^T B^T|^2 (Mukherjee and Zhu 2011), in
    which lambda is `ridge` times the mean of H^T H's diagonal. r is `rank`, or F or D where that is less. A and B are
    scaled alike, so that one AdamW rate fits both.
    """
    addend = (ridge * gram.diagonal().mean()).clamp(min=torch.finfo(gram.dtype).tiny)  # H may be zero
    damped = gram + addend * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    w = torch.linalg.solve(damped, cross)  # [F, D]: ridge regression, R ~ H W
    fitted = cross.T @ w  # [D, D], symmetric: W^T (H^T H + lambda) W
    _, vectors = torch.linalg.eigh(fitted)  # from the least to the most that a direction of R explains
    r = min(rank, *cross.shape)
    b = vectors[:, vectors.shape[1] - r :]
    a = (w @ b).T
    explained = 2 * (a * (cross @ b).T).sum() - (a @ gram * a).sum()  # |R|^2 - |R - H A^T B^T|^2
    length = a.norm(dim=1).clamp(min=torch.finfo(a.dtype).tiny)  # 0 where nothing is missing
    return a / length[:, None].sqrt(), b * length.sqrt(), explained
