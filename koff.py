"""Knowledge offloading (Galliamov, Choenni, Titov, arXiv 2605.29075): gates, memories, losses, compaction.

    min over z, {M_d}:  sum_d E_{x in D_d} KL(teacher || student(z, M_d))  +  lambda * Omega(z)                   Eq. 1
                        + the same KL on general text with a random module attached, for the gates only           Eq. 2

Shapes as in `model.py`; N is the number of gated upper blocks, K the number of the teacher's logits that are kept.
"""

import math
from bisect import bisect_left
from dataclasses import replace

import torch
from torch import nn

from model import BlockMemory, Cache, Model, matrix

# Hard Concrete gates (Louizos et al. 2018, arXiv 1712.01312) on the output channels of k, v, gate, up and down -------

GAMMA, ZETA = -0.1, 1.1  # the stretch of the concrete distribution; the paper gives none, these are Louizos'
MLP = {"projection": ("gate", "up", "down"), "neuron": ("neuron", "down")}
GATED = ("kv", "qkv", "kv+mlp", "kv+mlp+o")  # the sets that the paper compares, its choice is the third


def p_open(log_alpha, beta):
    """P(z > 0) = sigmoid(log alpha - beta log(-gamma / zeta))  (Louizos, Eq. 12)."""
    return torch.sigmoid(log_alpha - beta * math.log(-GAMMA / ZETA))


def hard_concrete(log_alpha, beta, u):
    """z in [0, 1] for uniform noise u in (0, 1), differentiable in log_alpha  (Louizos, Eq. 10 and 11)."""
    s = torch.sigmoid((torch.logit(u) + log_alpha) / beta)
    return (s * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


class Gates(nn.Module):
    """log alpha of every gate in blocks first .. first + N - 1, one [N, channels] parameter per gated projection.

    granularity "projection" is the paper's: gate, up and down each on its own. "neuron" has one gate per MLP neuron, on
    silu(gate) * up: it frees a row of gate, a row of up and a column of down.
    """

    def __init__(self, config, first, granularity="neuron", beta=2 / 3, gated="kv+mlp", start=3.0):
        super().__init__()
        self.config, self.first, self.beta = config, first, beta
        width = {name: rows for name, (rows, _) in config.shapes.items()} | {"neuron": config.intermediate_size}
        parts = [name for part in gated.split("+") for name in (MLP[granularity] if part == "mlp" else part)]
        shape = {name: (config.num_hidden_layers - first, width[name]) for name in parts}
        self.log_alpha = nn.ParameterDict({name: torch.full(shape[name], start) for name in shape})
        with torch.device("meta"):
            self.total = sum(p.numel() for p in Model(config).parameters())  # tied embeddings count once

    def by_block(self, z, dtype):
        """{name: [N, channels]} -> {block: {name: [channels]}}, the form that `Model` takes; cast once, not per use."""
        rows = {name: t.to(dtype).unbind() for name, t in z.items()}
        return {self.first + i: {name: r[i] for name, r in rows.items()} for i in range(len(rows["k"]))}

    def sample(self, dtype, generator=None):
        """One draw of all gates, differentiable."""
        z = {}
        for name, a in self.log_alpha.items():
            u = torch.empty_like(a).uniform_(1e-6, 1 - 1e-6, generator=generator)
            z[name] = hard_concrete(a, self.beta, u)
        return self.by_block(z, dtype)

    def p_open(self):
        return {name: p_open(a, self.beta) for name, a in self.log_alpha.items()}

    def removed(self, opened, count):
        """Parameters removed, a scalar, for {name: [N, channels]} of P(open), or of 0 and 1: exact in float64.

        count "paper": closed channels x fan-in. "physical": parameters missing from the compact backbone, which follow
        from the joint state: a neuron lives only if its gate *and* its up are open. Gates are independent, so that
        expectations of products are products of expectations.
        """
        c, D, n = self.config, self.config.hidden_size, len(opened["k"])
        fan_in = {name: columns for name, (_, columns) in c.shapes.items()} | {"neuron": 2 * D}
        closed = {name: (1 - p).sum() for name, p in opened.items()}
        if count == "paper":
            return sum(closed[name] * fan_in[name] for name in opened)
        bias = {"q": c.qkv_bias, "k": c.qkv_bias, "v": c.qkv_bias, "o": c.o_bias}
        attention = sum(closed[name] * (fan_in[name] + bias[name]) for name in opened if name in bias)
        if "down" not in opened:
            return attention
        neurons = opened["neuron"] if "neuron" in opened else opened["gate"] * opened["up"]
        alive, down = neurons.sum(-1), opened["down"].sum(-1)  # [N]
        mlp = 2 * D * alive + alive * down + (2 * alive + down if c.mlp_bias else 0)
        dense = 3 * D * c.intermediate_size + (2 * c.intermediate_size + D if c.mlp_bias else 0)
        return attention + (n * dense - mlp.sum())

    def sparsity(self, opened=None, count="physical"):
        """Share of all parameters removed: expected (differentiable) by default, exact for a mask."""
        opened = self.p_open() if opened is None else {name: m.double() for name, m in opened.items()}
        return self.removed(opened, count) / self.total

    def uniform_share(self, target, count):
        """The share f of channels that, closed at random in every projection, removes `target` (budget "module")."""
        low, high = 0.0, 1.0
        for _ in range(50):
            f = (low + high) / 2
            opened = {name: torch.full(a.shape, 1 - f, dtype=torch.float64) for name, a in self.log_alpha.items()}
            low, high = (f, high) if self.removed(opened, count) / self.total < target else (low, f)
        return high

    def behind(self, target, count, budget, share):
        """[n]: by how much the expected cost is behind (below 0: ahead of) what should be closed, as shares.

        budget "global": all gates compete for one target. "module": each projection of each block has to close `share`.
        """
        if budget == "global":
            return (target - self.sparsity(count=count)).view(1)
        return torch.cat([share - (1 - p).mean(-1) for p in self.p_open().values()])

    @torch.no_grad()
    def final_mask(self, target, count, budget, multiple=1):
        """{name: bool [N, channels]}: gates close in order of log alpha until the exact count reaches `target`.

        With budget "module" the order is the rank within the gate's own projection. A block's open neurons (granularity
        "neuron") are rounded to a `multiple`, which GPUs like; the other gates then make up for it. Overshoots by one
        gate at most, by one multiple of neurons where hardly any other gate is closed.
        """
        flat = {name: a.float().cpu() for name, a in self.log_alpha.items()}
        multiple = multiple if "neuron" in flat else 1
        rank = flat["neuron"].argsort(dim=-1, stable=True).argsort(-1) if multiple > 1 else None
        if budget == "module":
            flat = {name: a.argsort(-1).argsort(-1) / a.shape[-1] for name, a in flat.items()}
        order = torch.cat([a.flatten() for a in flat.values()]).argsort(stable=True)

        def mask(closed):
            still = torch.ones(len(order), dtype=torch.bool)
            still[order[:closed]] = False
            parts = still.split([a.numel() for a in flat.values()])
            still = {name: part.view_as(a) for (name, a), part in zip(flat.items(), parts, strict=True)}
            if multiple > 1:
                kept = (still["neuron"].sum(-1, keepdim=True) / multiple).round() * multiple
                still["neuron"] = rank >= rank.shape[-1] - kept
            return still

        def reach(mask):
            def enough(closed):
                return self.sparsity(mask(closed), count).item() >= target

            return mask(bisect_left(range(len(order)), True, key=enough))

        found = reach(mask)
        return found if multiple == 1 else reach(lambda closed: mask(closed) | {"neuron": found["neuron"]})

    @torch.no_grad()
    def spread(self, score, centre=3.0, half=2.0):
        """Start log alpha at `centre` -+ `half`, linear in the rank of `score` {name: [N, channels]} over all gates."""
        flat = torch.cat([s.flatten() for s in score.values()])
        rank = flat.argsort().argsort().float() / max(1, len(flat) - 1)
        parts = rank.split([s.numel() for s in score.values()])
        for a, part in zip(self.log_alpha.values(), parts, strict=True):
            a.copy_((centre - half + 2 * half * part).view_as(a))


class Penalty:
    """lambda Omega(z) of Eq. 1, for the `behind` of the gates, with multipliers [2] that follow it.

    hinge: Omega is what is missing, 0 at the target and beyond. The paper's "auto-scaling" is not given; here lambda
    grows by 3% a step while more than 0.002 is missing and shrinks by as much while not.
    lagrangian: lambda_1 gap + lambda_2 gap^2, whose multipliers climb their own gradients (Sheared LLaMA, arXiv
    2310.06694). It pulls back what went too far, so that it lands on the target. lambda_2 begins at `start`, lambda_1
    climbs slowly: with both from 0 the sparsity swings around the target for hundreds of steps.
    """

    def __init__(self, kind, start, scaled, device):
        self.kind, self.start, self.scaled = kind, start, scaled
        self.multipliers = torch.tensor([0.0, start] if kind == "lagrangian" else [start, 0.0], device=device)

    def __call__(self, behind):
        gap, square = behind.mean(), behind.square().mean()
        if self.kind == "lagrangian":
            loss = self.multipliers[0] * gap + self.multipliers[1] * square
            self.multipliers = self.multipliers + self.start * torch.stack([0.05 * gap, square]).detach()
            return loss
        omega = behind.clamp(min=0).mean()
        loss = self.multipliers[0] * omega
        if self.scaled:
            step = torch.where(omega.detach() > 0.002, 1.03, 1 / 1.03)
            self.multipliers = (self.multipliers * step).clamp(1.0, 1e6)
        return loss


def fisher_scores(model, gates, batches):
    """{name: [N, channels]}: squared gradient, per sequence, of the next-token loss with respect to each gate at 1,
    per parameter that the gate frees. (The KL to the teacher has gradient zero there.) `batches`: token tensors [B, T];
    each is scaled to a sum of one, or domains that the model knows badly, of large gradients, would decide alone.
    """
    c, D = model.config, model.config.hidden_size
    frees = {name: columns for name, (_, columns) in c.shapes.items()} | dict.fromkeys(("gate", "up", "neuron"), 3 * D)
    score = {name: torch.zeros_like(a) for name, a in gates.log_alpha.items()}
    for tokens in batches:
        B = len(tokens)
        z = {n: s.new_ones(s.shape[0], B, 1, s.shape[1]).requires_grad_() for n, s in score.items()}
        with torch.no_grad():
            x = model.run(model.embed_tokens(tokens), 0, gates.first)
        x = model.run(x, gates.first, c.num_hidden_layers, gates.by_block(z, x.dtype))
        loss = in_chunks(model, x[:, :-1].flatten(0, 1), next_token, tokens[:, 1:].flatten())
        squares = [g.square().sum(dim=(1, 2)) for g in torch.autograd.grad(loss, list(z.values()))]
        whole = sum(q.sum() for q in squares)
        for (name, s), square in zip(score.items(), squares, strict=True):
            s += square / whole / frees[name]
    return score


# Memory: LoRA on five projections, and M trainable keys and values per block, in blocks first .. L - 1 -----------


LORA = ("k", "v", "gate", "up", "down")


class Memory(nn.Module):
    """The module of one domain. LoRA A [N, r, in], B [N, out, r]; keys and values [N, G, M, hd], keys after RoPE."""

    def __init__(self, config, first, rank, alpha, kv_tokens):
        super().__init__()
        self.first, self.scale, n = first, alpha / rank if rank else 0.0, config.num_hidden_layers - first
        self.lora_a, self.lora_b = nn.ParameterDict(), nn.ParameterDict()
        for name in LORA if rank else ():
            rows, columns = config.shapes[name]
            bound = columns**-0.5  # Kaiming-uniform with a = sqrt(5), as peft; B = 0: training starts at the teacher
            self.lora_a[name] = torch.empty(n, rank, columns).uniform_(-bound, bound)
            self.lora_b[name] = torch.zeros(n, rows, rank)
        self.keys = self.values = None
        if kv_tokens:
            shape = (n, config.num_key_value_heads, kv_tokens, config.head_dim)
            self.keys = nn.Parameter(torch.randn(shape) * 0.02)
            self.values = nn.Parameter(torch.randn(shape) * 0.02)

    @torch.no_grad()
    def init_from_text(self, model, tokens):
        """Keys and values become what the frozen model computes on `tokens` [M] of the domain's own text."""
        cache = Cache(0)
        model.hidden(tokens[None], cache=cache)
        for j, kept in enumerate((self.keys, self.values)):
            kept.copy_(torch.stack([cache.layers[i][j][0] for i in range(self.first, model.config.num_hidden_layers)]))

    def by_block(self, dtype):
        """{block: BlockMemory} in `dtype`, the form that `Model` takes."""
        a = {name: t.to(dtype).unbind() for name, t in self.lora_a.items()}
        b = {name: (t * self.scale).to(dtype).unbind() for name, t in self.lora_b.items()}
        n = len(next(self.parameters()))
        keys, values = ([None] * n if t is None else t.to(dtype).unbind() for t in (self.keys, self.values))
        return {
            self.first + i: BlockMemory({name: (a[name][i], b[name][i]) for name in a}, keys[i], values[i])
            for i in range(n)
        }


# Distillation: KL(teacher || student) on the teacher's top-K logits --------------------------------------------------


def set_apart(logits, index):
    """Logits [n, V] in place -> exp(logits - shift) with zeros at `index` [n, K]; returns what is left to know of them:

    the logits at `index` [n, K]; and [n, 1] each: shift, the largest of the others; their logsumexp; that of all. The
    others are summed by themselves and not got by subtraction, so that a tail of 1e-9 is exact.
    """
    top = logits.gather(-1, index)
    shift = logits.scatter_(-1, index, float("-inf")).amax(-1, keepdim=True)
    rest = shift + logits.sub_(shift).exp_().sum(-1, keepdim=True).log()
    return top, shift, rest, torch.logaddexp(top.logsumexp(-1, keepdim=True), rest)


@torch.no_grad()
def teacher_answer(model, hidden, top=100, chunk=256):
    """hidden [n, D] -> (index [n, K], log-probabilities [n, K], log-probability of the rest [n, 1])."""
    parts = []
    for h in hidden.split(chunk):
        logits = model.logits(h)
        value, index = logits.topk(min(top, logits.shape[-1] - 1), dim=-1)
        _, _, rest, log_z = set_apart(logits, index)
        parts.append((index, value - log_z, rest - log_z))
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def divergence(logits, answer, tail="bucket"):
    """Summed KL(teacher || student) for student logits [n, V], and its gradient, which takes the place of the logits.

    (In the place of: a new vocabulary-sized tensor costs more time than what is computed with it.) In the top K the
    gradient is that of a softmax, q - p; `tail` says what becomes of the mass outside, and gives the gradient there:

    bucket: it is one more outcome on both sides, so that none leaks there unseen (default); q (1 - p_tail / q_tail).
    renormalise: both top-K distributions are scaled to one, the tail is not looked at; 0.
    drop: sum over the top K of p log(p / q) with the true probabilities, no term for the tail; q sum(p), which takes
    the place of q in the top K too.
    """
    index, log_p, log_p_tail = answer
    if tail == "renormalise":
        log_p, log_q = log_p.log_softmax(-1), logits.gather(-1, index).log_softmax(-1)
        p, mass, value, grad = log_p.exp(), 1.0, 0.0, logits.zero_()
    else:
        top, shift, log_rest, log_z = set_apart(logits, index)
        log_q, p = top - log_z, log_p.exp()
        if tail == "bucket":
            gap = log_p_tail - (log_rest - log_z)
            mass, value, outside = 1.0, (log_p_tail.exp() * gap).sum(), 1 - gap.exp()  # q - p_tail q / q_tail
        else:
            mass = outside = p.sum(-1, keepdim=True)
            value = 0.0
        grad = logits.mul_((shift - log_z).exp() * outside)
    grad.scatter_(-1, index, mass * log_q.exp() - p)
    return value + (p * (log_p - log_q)).sum(), grad


def next_token(logits, targets):
    """Summed cross-entropy of logits [n, V] against targets [n]: the divergence from a teacher that is certain."""
    index = targets.unsqueeze(-1)
    return divergence(logits, (index, torch.zeros_like(index, dtype=logits.dtype), None), "drop")


class _InChunks(torch.autograd.Function):
    """`in_chunks`, forward and gradient in the same pass."""

    @staticmethod
    def forward(ctx, x, model, loss, size, *beside):
        grad, total, learn = torch.empty_like(x), x.new_zeros((), dtype=torch.float32), ctx.needs_input_grad[0]
        for into, rows, *others in zip(*(t.split(size) for t in (grad, x, *beside)), strict=True):
            with torch.set_grad_enabled(learn):
                rows = rows.detach().requires_grad_(learn)
                logits = model.logits(rows)
            value, slope = loss(logits.detach(), *others)
            if learn:
                into.copy_(torch.autograd.grad(logits, rows, slope)[0])
            total += value
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    def backward(ctx, scale):
        return ctx.saved_tensors[0] * scale, *[None] * (len(ctx.needs_input_grad) - 1)


def in_chunks(model, x, loss, *beside, size=256):
    """Scalar sum of a loss over the rows of hidden x [n, D], which gets a gradient; logits of `size` rows at a time.

    loss: (logits [rows, V], chunks of `beside` [n, ...]) -> (value, gradient [rows, V], in the place of the logits).
    """
    return _InChunks.apply(x, model, loss, size, *beside)


def distill(model, hidden, answer, tokens, objective="kl", tail="bucket"):
    """Mean loss per token for the student's hidden [B, T, D]: objective "kl", "next-token" or "blend", half of each."""
    share, loss = 0.5 if objective == "blend" else 1.0, 0.0
    if objective != "next-token":
        rows = hidden.flatten(0, 1)
        total = in_chunks(model, rows, lambda logits, *a: divergence(logits, a, tail), *answer)
        loss = loss + share * total / len(rows)
    if objective != "kl":
        T = tokens.shape[1]
        rows, targets = hidden.narrow(1, 0, T - 1).flatten(0, 1), tokens.narrow(1, 1, T - 1).flatten()
        loss = loss + share * in_chunks(model, rows, next_token, targets) / len(rows)
    return loss


# Compaction: the closed channels leave the tensors -------------------------------------------------------------------


def kept_channels(mask, config, first, device):
    """{block: {projection: int64 [kept]}}: open channels of {name: bool [N, channels]}; "gate", "up" as "neuron"."""
    n = config.num_hidden_layers - first
    rows = {name: torch.ones(n, width, dtype=torch.bool) for name, (width, _) in config.shapes.items()} | mask
    neuron = mask["neuron"] if "neuron" in mask else rows["gate"] & rows["up"]
    rows |= dict.fromkeys(("neuron", "gate", "up"), neuron)
    return {first + i: {name: row[i].nonzero()[:, 0].to(device) for name, row in rows.items()} for i in range(n)}


@torch.no_grad()
def compact(model, kept):
    """The physically smaller model of `kept_channels`: its output is that of `model` with the same 0/1 gates."""
    c, state, sizes = model.config, dict(model.state_dict()), [None] * model.config.num_hidden_layers
    for i, index in kept.items():
        sizes[i] = {name: len(index[name]) for name in ("q", "k", "v", "o", "neuron", "down")}
        for name, (rows, _) in c.shapes.items():
            for own in (f"{matrix(i, name)}.weight", f"{matrix(i, name)}.bias"):
                if own in state and len(index[name]) < rows:
                    state[own] = state[own][index[name]]
            if name not in ("gate", "up") and len(index[name]) < rows:
                state[f"layers.{i}.{name}_kept"] = index[name]
        if len(index["neuron"]) < c.intermediate_size:
            down = f"{matrix(i, 'down')}.weight"
            state[down] = state[down][:, index["neuron"]].contiguous()
    config = replace(c, kept=tuple(sizes), raw={**c.raw, "koff_kept": sizes})
    with torch.device("meta"):
        small = Model(config)
    small.load_state_dict(state, assign=True)
    return small.requires_grad_(False)


def laid_out(blocks, kept, lay):
    """{block: BlockMemory} with `lay`(tensor, dim, index, name) done to the rows of B and, for down, the columns of A,
    in the blocks of `kept_channels`."""
    out = dict(blocks)
    for i in blocks.keys() & kept.keys():
        lora = {}
        for name, (a, b) in blocks[i].lora.items():
            a = lay(a, 1, kept[i]["neuron"], "gate") if name == "down" else a
            lora[name] = a, lay(b, 0, kept[i][name], name)
        out[i] = BlockMemory(lora, blocks[i].keys, blocks[i].values)
    return out


def compact_memory(blocks, kept):
    """{block: BlockMemory} for the model that `compact` makes. Differentiable."""
    return laid_out(blocks, kept, lambda t, dim, index, _: t.index_select(dim, index))
