"""Knowledge offloading (Galliamov, Choenni, Titov, arXiv 2605.29075): the paper's method, and registries for forks.

    min over z, {M_d}:  sum_d E_{x in D_d} KL(teacher || student(z, M_d))  +  lambda * Omega(z)                   Eq. 1
                        + the same KL on general text with a random module attached; only the gates are updated   Eq. 2

The paper's symbols, and where they are:

    f_theta        the frozen pretrained model, `model.Model`. The teacher is this model without gates and module.
                   (By default it also reads the text from which the KV memory starts: `Trainer.ask_teacher`.)
    z              gates on output channels. They are learned as log alpha (`Gates`) and sampled by `hard_concrete`.
    M_d            the memory module of domain d, `MemoryModule`. Its part in one block is a `model.Memory`.
    dW_d x         LoRA, B A x in `model.Projection`
    K_mem, V_mem   `Memory.keys` and `Memory.values` (Eq. 3)
    Omega(z)       how far the sparsity (`Gates.sparsity`) is below its target. `Hinge` is lambda times Omega.
    KL             `kl_topk`, on the teacher's K = 100 most likely tokens and on all others as one more outcome
    s*             the target sparsity, by one of two counts: `removed_paper`, `removed_physical`
    materialise    closed channels leave the matrices: `Gates.final_mask`, `materialise`

Our additions and the paper's alternatives are in `data/`. They enter through the registries below:

    data/scores.py       how much each gate matters
    data/starts.py       how gates and memories start: from a score, from keys and values of a text
    data/penalties.py    a lambda that adapts (the default), a Lagrangian
    data/objectives.py   other treatments of the outcomes outside the top K; next-token training
    data/solve.py        least squares, once the mask is final: a repair of the backbone, LoRA on `down`
    data/fast.py         equivalent functions in less time and memory

Shapes as in `model.py`. N is the number of blocks that a `Gates` or a `MemoryModule` covers.
"""

import math
from dataclasses import replace

import torch
from torch import nn

from model import Memory, Model, matrix_name

# Gates on output channels: Hard Concrete (Louizos et al. 2018, arXiv 1712.01312) -------------------------------------

GAMMA, ZETA = -0.1, 1.1  # the stretch of the concrete distribution, from Louizos et al.; the paper gives none


def probability_open(log_alpha, beta):
    """P(z > 0) = sigmoid(log alpha - beta log(-gamma / zeta))  (Louizos, Eq. 12)."""
    return torch.sigmoid(log_alpha - beta * math.log(-GAMMA / ZETA))


def hard_concrete(log_alpha, beta, u):
    """z in [0, 1] for uniform noise u in (0, 1), differentiable in log_alpha  (Louizos, Eq. 10 and 11)."""
    s = torch.sigmoid((torch.logit(u) + log_alpha) / beta)
    return (s * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


# Registry of gate families, {name: (probability, draw)}: probability(log_alpha, beta) is P(z > 0), and
# draw(log_alpha, beta, u) is z.
FAMILIES = {"hard-concrete": (probability_open, hard_concrete)}

# The sets of projections that the paper gates and compares; its choice is "kv+mlp".
GATED = {
    "kv": ("k", "v"),
    "qkv": ("q", "k", "v"),
    "kv+mlp": ("k", "v", "gate", "up", "down"),
    "kv+mlp+o": ("k", "v", "gate", "up", "down", "o"),
}

# Registry of scores that decide where log alpha starts: (model, gates, token tensors of each domain) ->
# {name: [N, channels]}. None: every gate starts at the same log alpha; the paper gives no start. `data/scores.py` adds
# the Fisher score and "surgeon", the default.
SCORES = {"constant": None}


# Two counts of what is removed. p_open {name: [N, channels]}: P(z > 0), or a 0/1 mask in float64 ----------------------


def removed_paper(config, p_open):
    """Closed channels x fan-in, a scalar. This is our reading of the paper, which does not define its count."""
    removed = 0
    for name, p in p_open.items():
        if name == "neuron":
            fan_in = 2 * config.hidden_size  # a row of gate and a row of up
        else:
            fan_in = config.shapes[name][1]
        removed = removed + (1 - p).sum() * fan_in
    return removed


def removed_physical(config, p_open):
    """Parameters missing from the materialised backbone, a scalar.

    For probabilities it is the expected number: gates are independent, so P(both open) is the product of the two.
    """
    removed = 0
    for name, p in p_open.items():
        if name in ("q", "k", "v", "o"):
            has_bias = config.o_bias if name == "o" else config.qkv_bias
            removed = removed + (1 - p).sum() * (config.shapes[name][1] + has_bias)  # a row and its bias
    if "down" not in p_open:  # the MLP has no gates: in `GATED` gate, up and down come together
        return removed

    # A neuron lives only if its row of gate *and* its row of up are open.
    neurons = p_open["neuron"] if "neuron" in p_open else p_open["gate"] * p_open["up"]  # [N, F]
    down = p_open["down"]  # [N, D]
    before = len(down) * mlp_size(config, config.intermediate_size, config.hidden_size)
    after = mlp_size(config, neurons.sum(-1), down.sum(-1))  # [N]
    return removed + (before - after.sum())


def mlp_size(config, neurons, rows):
    """Parameters of an MLP with that many neurons and rows of down. Both may be numbers or tensors."""
    size = 2 * config.hidden_size * neurons + neurons * rows  # gate and up, then down
    if config.mlp_bias:
        size = size + 2 * neurons + rows
    return size


COUNTS = {"physical": removed_physical, "paper": removed_paper}


def count_parameters(module):
    return sum(p.numel() for p in module.parameters())


# The gates of a run --------------------------------------------------------------------------------------------------


class Gates(nn.Module):
    """log alpha of every gate in the blocks from `first_block` on: one parameter [N, channels] per gated projection.

    granularity "projection" is the paper's: gate, up and down each have their own gates. With "neuron" (the default of
    a run) one gate covers a whole MLP neuron: closing it frees a row of gate, a row of up and a column of down.
    """

    def __init__(
        self, config, first_block, granularity="projection", beta=2 / 3, gated="kv+mlp", family="hard-concrete",
        start=3.0,
    ):  # fmt: skip
        super().__init__()
        self.config = config
        self.first_block = first_block
        self.beta = beta
        self.family = family
        self.blocks = config.num_hidden_layers - first_block  # N
        names = GATED[gated]
        if granularity == "neuron":  # one gate takes the place of "gate" and "up"; k, v and down keep their own
            names = ["neuron" if name == "gate" else name for name in names if name != "up"]
        log_alpha = {}
        for name in names:
            channels = config.intermediate_size if name == "neuron" else config.shapes[name][0]
            log_alpha[name] = torch.full((self.blocks, channels), start)
        self.log_alpha = nn.ParameterDict(log_alpha)  # which sorts the names of a plain dict
        with torch.device("meta"):  # nothing is allocated there: we only count the unpruned model's parameters
            self.total = count_parameters(Model(config))

    def sample(self, dtype, generator=None):
        """One draw of all gates in the form that `Model` takes, differentiable in log alpha."""
        _, draw = FAMILIES[self.family]
        z = {}
        for name, log_alpha in self.log_alpha.items():
            u = torch.empty_like(log_alpha).uniform_(1e-6, 1 - 1e-6, generator=generator)
            z[name] = draw(log_alpha, self.beta, u)
        return self.by_block(z, dtype)

    def by_block(self, z, dtype):
        """{name: [N, channels]} -> {block: {name: [channels]}}, the form that `Model` takes."""
        blocks = {self.first_block + n: {} for n in range(self.blocks)}
        for name, values in z.items():
            for n, row in enumerate(values.to(dtype).unbind()):
                blocks[self.first_block + n][name] = row
        return blocks

    def p_open(self):
        """{name: [N, channels]}: the probability that each gate is not zero."""
        probability, _ = FAMILIES[self.family]
        return {name: probability(log_alpha, self.beta) for name, log_alpha in self.log_alpha.items()}

    def sparsity(self, mask=None, count="physical"):
        """The removed share of all parameters, by `COUNTS[count]`. Without a mask it is the expected share, which is
        differentiable; with a 0/1 mask {name: [N, channels]} it is exact."""
        if mask is None:
            p_open = self.p_open()
        else:
            p_open = {name: rows.double() for name, rows in mask.items()}
        return COUNTS[count](self.config, p_open) / self.total

    @torch.no_grad()
    def final_mask(self, target, count="physical", adjust=None):
        """{name: bool [N, channels]}, True is open. The gates with the lowest log alpha close, in all blocks together:
        as few as the exact sparsity needs to reach `target`.

        adjust: mask -> mask, a hook that changes each candidate before it is counted (`data.fast.final_mask`).
        """
        log_alpha = torch.cat([a.float().cpu().flatten() for a in self.log_alpha.values()])
        order = log_alpha.argsort(stable=True)

        def mask_with(closed):  # the first `closed` gates of the order are closed
            is_open = torch.ones(len(order), dtype=torch.bool)
            is_open[order[:closed]] = False
            mask = split_like(is_open, self.log_alpha)
            return adjust(mask) if adjust else mask

        # Sparsity never falls when one more gate closes. So bisection finds the smallest sufficient number.
        low = 0
        high = len(order)
        while low < high:
            middle = (low + high) // 2
            if self.sparsity(mask_with(middle), count) >= target:
                high = middle
            else:
                low = middle + 1
        return mask_with(low)


def split_like(flat, like):
    """Cut a vector over all gates into {name: [N, channels]}, in the shapes and the order of `like`."""
    sizes = [tensor.numel() for tensor in like.values()]
    parts = {}
    for (name, tensor), part in zip(like.items(), flat.split(sizes), strict=True):
        parts[name] = part.view(tensor.shape)
    return parts


class Hinge(nn.Module):
    """lambda * Omega(z) of Eq. 1, with Omega = max(0, target - sparsity). The target may rise: `Trainer.target`."""

    def __init__(self, start):
        super().__init__()
        self.register_buffer("multiplier", torch.tensor(float(start)))  # lambda

    def forward(self, sparsity, target):
        return self.multiplier * (target - sparsity).clamp(min=0)


# Registry of penalties, {name: class}: class(first lambda) is a module, module(expected sparsity, target) the loss.
# Buffers are saved with a checkpoint, `multiplier` is logged. `data/penalties.py` has the default, a hinge whose lambda
# adapts.
PENALTIES = {"hinge": Hinge}


# The memory module of a domain: LoRA on five projections, and M trainable keys and values ----------------------------


class MemoryModule(nn.Module):
    """M_d, in float32, in the blocks from `first_block` on.

    LoRA A [N, r, fan-in] and B [N, channels, r]; keys and values [N, G, M, hd], keys after RoPE.
    """

    def __init__(self, config, first_block, rank, alpha, kv_tokens, lora=("k", "v", "gate", "up", "down")):
        super().__init__()
        self.first_block = first_block
        self.blocks = config.num_hidden_layers - first_block  # N
        self.rank = rank
        self.scale = alpha / rank if rank else 0.0
        self.lora_a = nn.ParameterDict()
        self.lora_b = nn.ParameterDict()
        for name in lora if rank else ():  # rank 0: no LoRA
            channels, fan_in = config.shapes[name]
            bound = fan_in**-0.5  # Kaiming-uniform with a = sqrt(5), as in peft
            self.lora_a[name] = torch.empty(self.blocks, rank, fan_in).uniform_(-bound, bound)
            self.lora_b[name] = torch.zeros(self.blocks, channels, rank)  # at first LoRA adds nothing
        self.keys = None
        self.values = None
        if kv_tokens:
            shape = (self.blocks, config.num_key_value_heads, kv_tokens, config.head_dim)
            self.keys = nn.Parameter(torch.randn(shape) * 0.02)
            self.values = nn.Parameter(torch.randn(shape) * 0.02)

    def parameter_groups(self):
        """{"lora": [...], "kv": [...]}: all parameters, grouped by learning rate (`Trainer.adamw`)."""
        lora = [*self.lora_a.values(), *self.lora_b.values()]
        kv = [] if self.keys is None else [self.keys, self.values]
        return {"lora": lora, "kv": kv}

    def by_block(self, dtype):
        """{block: `Memory`} in `dtype`, the form that `Model` takes, with gradients to this module."""
        memories = {self.first_block + n: Memory() for n in range(self.blocks)}
        for name in self.lora_a:
            a = self.lora_a[name].to(dtype).unbind()  # N tensors [r, fan-in]
            b = (self.scale * self.lora_b[name]).to(dtype).unbind()
            for n in range(self.blocks):
                memories[self.first_block + n].lora[name] = (a[n], b[n])
        if self.keys is not None:
            keys = self.keys.to(dtype).unbind()
            values = self.values.to(dtype).unbind()
            for n in range(self.blocks):
                memories[self.first_block + n].keys = keys[n]
                memories[self.first_block + n].values = values[n]
        return memories


# Registry of kinds of memory: classes with the interface of `MemoryModule`. A fork may add a tensor field to
# `model.Memory`; it is saved, loaded and counted like the others.
MEMORIES = {"lora+kv": MemoryModule}


# Distillation: KL(teacher || student) on the teacher's top-K outcomes ------------------------------------------------


def top_and_rest(logits, index):
    """log p of the outcomes at `index` [n, K], and of all other outcomes together [n, 1], under logits [n, V].

    The others are summed directly: computed as 1 minus the sum of the top, a rest of 1e-9 would vanish in rounding.
    """
    top = logits.gather(-1, index)
    others = logits.scatter(-1, index, float("-inf"))  # a copy without the top
    rest = others.logsumexp(-1, keepdim=True)
    log_total = torch.logaddexp(top.logsumexp(-1, keepdim=True), rest)  # logsumexp of all logits
    return top - log_total, rest - log_total


@torch.no_grad()
def teacher_topk(model, hidden, top=100):
    """The teacher's side of the KL for hidden states [n, D]: index [n, K], log p there [n, K], of the rest [n, 1]."""
    logits = model.logits(hidden)
    K = min(top, logits.shape[-1] - 1)  # at least one outcome is outside
    index = logits.topk(K, dim=-1).indices
    return index, *top_and_rest(logits, index)


def kl_topk(logits, index, log_p, log_p_rest, next_tokens=None):
    """KL(teacher || student) of each row, [n], for the student's logits [n, V] and the three parts of `teacher_topk`.

    The paper does not say how it treats outcomes outside the top K. Here they count as one more outcome for teacher and
    student, so that mass which moves there is penalised too. (Objectives of other kinds need the next tokens.)
    """
    log_q, log_q_rest = top_and_rest(logits, index)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    kl_rest = (log_p_rest.exp() * (log_p_rest - log_q_rest)).squeeze(-1)
    return kl + kl_rest


# Registry of objectives: functions with the arguments of `kl_topk`. `data/objectives.py` has others.
OBJECTIVES = {"kl": kl_topk}


def distill(model, hidden, teacher):
    """The mean KL per token for the student's hidden states [B, T, D] and a `teacher_topk`; a scalar.

    This is the readable form. Training calls an equivalent in `data/fast.py`, which never holds all logits at once.
    Final norm and output matrix have no gates, so they are those of `model`.
    """
    logits = model.logits(hidden.flatten(0, 1))  # [B T, V]
    return kl_topk(logits, *teacher).mean()


# Materialising the mask: closed channels leave the matrices ----------------------------------------------------------


def kept_channels(mask, config, first_block, device):
    """{block: {name: int64 [kept]}}: places of the open channels of mask {name: bool [N, channels]}.

    A neuron stays only if its row of gate and its row of up are open; "neuron", "gate" and "up" list the same neurons.
    """
    blocks = config.num_hidden_layers - first_block
    is_open = {}
    for name, (channels, _) in config.shapes.items():
        is_open[name] = torch.ones(blocks, channels, dtype=torch.bool)  # a projection without gates keeps everything
    is_open.update(mask)
    neurons = mask["neuron"] if "neuron" in mask else is_open["gate"] & is_open["up"]
    for name in ("neuron", "gate", "up"):
        is_open[name] = neurons
    kept = {}
    for n in range(blocks):
        kept[first_block + n] = {name: rows[n].nonzero()[:, 0].to(device) for name, rows in is_open.items()}
    return kept


def materialise(model, kept):
    """`model` cut down to the channels of `kept_channels`: its output is that of `model` with the same 0/1 gates."""
    c = model.config
    state = dict(model.state_dict())
    rows_left = [None] * c.num_hidden_layers
    for i, index in kept.items():
        rows_left[i] = {name: len(index[name]) for name in ("q", "k", "v", "o", "neuron", "down")}
        for name, (channels, _) in c.shapes.items():
            if len(index[name]) == channels:
                continue
            # 1. The rows of closed channels go.
            for key in (f"{matrix_name(i, name)}.weight", f"{matrix_name(i, name)}.bias"):
                if key in state:
                    state[key] = state[key][index[name]]
            # 2. In the output cut channels are zeros, and `kept` says where the open ones go. (Not for neurons: `MLP`.)
            if name not in ("gate", "up"):
                state[f"{matrix_name(i, name)}.kept"] = index[name]
        if len(index["neuron"]) < c.intermediate_size:
            down = f"{matrix_name(i, 'down')}.weight"
            state[down] = state[down][:, index["neuron"]].contiguous()  # 3. The columns of cut neurons go.
    with torch.device("meta"):
        small = Model(replace(c, rows_left=tuple(rows_left)))
    small.load_state_dict(state, assign=True)
    return small.requires_grad_(False)


def materialise_memories(memories, kept):
    """{block: `Memory`} for the model of `materialise`: LoRA loses the same rows and columns as its matrix.

    Differentiable, so that a module can be trained on the smaller model.
    """
    small = dict(memories)
    for i in memories.keys() & kept.keys():  # blocks with gates and blocks with memories may differ
        lora = {}
        for name, (a, b) in memories[i].lora.items():
            if name == "down":
                a = a.index_select(1, kept[i]["neuron"])
            lora[name] = (a, b.index_select(0, kept[i][name]))
        small[i] = replace(memories[i], lora=lora)
    return small
