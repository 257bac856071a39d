"""A from-scratch Llama / Qwen decoder, with one seam through which knowledge offloading enters.

It covers Llama 3, 3.1, 3.2 and SmolLM2 (`llama`), Qwen2 and Qwen2.5 (`qwen2`), Qwen3 (`qwen3`), and the sparse
backbones that `koff.py` makes of them. `data/checkpoint.py` fills it from a Hugging Face folder.

The seam is `Projection`: each matrix of a block takes a gate z and a LoRA beside its input, and attention takes a
memory of keys and values. Without them the model is the unchanged pretrained one, the *teacher*. With them it is the
*student*. Both are the same weights in memory, until the mask is frozen; from then on the student is a smaller `Model`,
which shares every matrix from which nothing was cut.

Shapes: B batch, T text tokens, M memory tokens, S = M + T keys, D model width, H query heads, G key-value heads,
hd head dimension, F MLP neurons, V vocabulary rows, r LoRA rank.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Config:
    """What `config.json` says, under its own names (`data/checkpoint.py` reads it). Sizes are never guessed here."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict | None  # llama3 scaling, or None
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    eos_token_ids: tuple[int, ...]
    # Ours: per block how many channels are left, {"q", "k", "v", "o", "neuron", "down"}; None for an untouched block.
    rows_left: tuple[dict | None, ...] = ()
    raw: dict = field(default_factory=dict, repr=False, compare=False)  # the file itself, written back with a backbone

    @property
    def shapes(self):
        """The projections of a block, {name: (output channels, fan-in)}."""
        width = self.hidden_size
        neurons = self.intermediate_size
        queries = self.num_attention_heads * self.head_dim
        keys = self.num_key_value_heads * self.head_dim
        return {
            "q": (queries, width),
            "k": (keys, width),
            "v": (keys, width),
            "o": (width, queries),
            "gate": (neurons, width),
            "up": (neurons, width),
            "down": (width, neurons),
        }


def matrix_name(i, name):
    """Where the projection `name` of block i stands in a `Model`, and behind "model." in a Hugging Face checkpoint."""
    part = "self_attn" if name in ("q", "k", "v", "o") else "mlp"
    return f"layers.{i}.{part}.{name}_proj"


# Positions -----------------------------------------------------------------------------------------------------------


def rope_frequencies(config, device):
    """Angle per position of each pair of channels, [hd / 2] (RoFormer, arXiv 2104.09864)."""
    channel = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device)
    frequency = 1.0 / config.rope_theta ** (channel / config.head_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return frequency
    # Llama 3.1 stretches what turns slowly, so that longer texts than it was pretrained on keep their angles apart.
    turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)  # within the original context
    low = scaling["low_freq_factor"]
    high = scaling["high_freq_factor"]
    unchanged = ((turns - low) / (high - low)).clamp(0, 1)  # 1: turns fast, as it was; 0: divided by the factor
    return unchanged * frequency + (1 - unchanged) * frequency / scaling["factor"]


def rope_table(config, start, length, like):
    """(cos, sin), each [length, hd], for the positions from `start` on, in the dtype and on the device of `like`."""
    positions = torch.arange(start, start + length, dtype=torch.float32, device=like.device)
    angles = torch.outer(positions, rope_frequencies(config, like.device))  # [length, hd / 2]
    angles = torch.cat([angles, angles], dim=-1)  # channel i turns with channel i + hd / 2, as Hugging Face has it
    cos = angles.cos().to(like.dtype)
    sin = angles.sin().to(like.dtype)
    return cos, sin


def rotate(x, rope):
    """Rotate x [B, heads, T, hd] by a `rope_table`."""
    cos, sin = rope
    first, second = x.chunk(2, dim=-1)
    quarter_turn = torch.cat([-second, first], dim=-1)
    return x * cos + quarter_turn * sin


# Attention -----------------------------------------------------------------------------------------------------------


def earlier_mask(T, S, copies, like):
    """What T text tokens may see of S keys, of which S - T stand before the text, as attention adds it: 0 or -inf.

    [copies T, S], a copy for each query head of a group (see `attend`); None where no mask is needed.
    """
    if T == 1 or T == S:  # one token sees everything; a text without anything before it is causal
        return None
    mask = torch.full((T, S), -math.inf, dtype=like.dtype, device=like.device)
    mask = mask.triu(S - T + 1)  # 0 up to there: row t sees the first S - T + t + 1 keys
    return mask.repeat(copies, 1)


def attend(q, k, v, mask):
    """softmax(Q K^T / sqrt(hd)) V. Text token t sees all S - T earlier positions, and the text up to itself.

    q [B, H, T, hd]; k, v [B, G, S, hd] -> [B, H, T, hd]; query head h reads key-value head h G // H.
    mask: see `earlier_mask`.
    """
    B, H, T, hd = q.shape
    G, S = k.shape[1:3]
    if T == S:
        # On CUDA no fused kernel for float32 lets query heads share keys. With a copy for each head there is one, and
        # the T x S scores are never written out.
        shared = not (q.is_cuda and q.dtype == torch.float32)
        if not shared:
            k = k.repeat_interleave(H // G, dim=1)
            v = v.repeat_interleave(H // G, dim=1)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=shared)
    # Memory or earlier text stands before this text, which the kernel's own causal mask does not know: it takes a mask.
    # The H / G query heads of a group become rows of one head, so that its keys need no copies.
    rows = q.reshape(B, G, H // G * T, hd)
    y = F.scaled_dot_product_attention(rows, k, v, attn_mask=mask)
    return y.reshape(B, H, T, hd)  # not a view: some kernels of a GPU return another layout


@dataclass
class Memory:
    """One domain's memory in one block, in the dtype of the model. (All blocks of a domain together are its module.)

    lora: projection -> (A [r, fan-in], B [rows, r]), alpha / r is in B already.
    keys, values: [G, M, hd]; None: no KV memory. The keys are as after RoPE, at positions 0 .. M - 1.
    """

    lora: dict = field(default_factory=dict)
    keys: torch.Tensor | None = None
    values: torch.Tensor | None = None

    @property
    def length(self):
        """M, the number of memory tokens."""
        return 0 if self.keys is None else self.keys.shape[1]


class Cache:
    """Keys and values of the tokens so far, memory tokens included. `room`: tokens that may follow the first call."""

    def __init__(self, room):
        self.room = room
        self.layers = {}  # block -> (keys, values), each [B, G, length + free room, hd]
        self.lengths = {}  # block -> how much of them is filled

    def length(self, i):
        return self.lengths.get(i, 0)

    def extend(self, i, k, v):
        """Append k, v [B, G, T, hd] to block i; return all of its keys and values [B, G, S, hd]."""
        start = self.length(i)
        end = start + k.shape[2]
        if start == 0:
            B, G, _, hd = k.shape
            shape = (B, G, end + self.room, hd)
            self.layers[i] = (k.new_empty(shape), v.new_empty(shape))
        keys, values = self.layers[i]
        keys[:, :, start:end] = k
        values[:, :, start:end] = v
        self.lengths[i] = end
        return keys[:, :, :end], values[:, :, :end]


# The seam ------------------------------------------------------------------------------------------------------------


class Projection(nn.Linear):
    """y = z * (W x + B A x): one matrix with its gate and its LoRA.

    Once the mask is final the closed channels are cut out (`koff.materialise`): `weight` keeps the rows of those that
    are left, and `kept` [rows] says which of the `channels` they are. It is None while all of them are there.
    """

    def __init__(self, fan_in, channels, bias, rows):
        super().__init__(fan_in, rows, bias=bias)
        self.channels = channels
        kept = torch.zeros(rows, dtype=torch.int64) if rows < channels else None
        self.register_buffer("kept", kept)

    def reset_parameters(self):
        """Random numbers, as for any other linear layer; but none where every channel is gone, of which torch warns."""
        if self.weight.numel():
            super().reset_parameters()

    def forward(self, x, z=None, lora=None):
        """x [batch, T, fan-in] -> [batch, T, channels]. z [channels]: gates; lora: (A [r, fan-in], B [rows, r])."""
        y = F.linear(x, self.weight, self.bias)  # [B, T, rows]
        if lora is not None:
            a, b = lora
            y = y + F.linear(F.linear(x, a), b)
        if z is not None:
            y = z * y  # the gate covers the LoRA too: no memory can bring a closed channel back
        if self.kept is not None:
            whole = y.new_zeros(*y.shape[:-1], self.channels)  # a channel that was cut out is zero
            y = whole.index_copy(-1, self.kept, y)
        return y


class Attention(nn.Module):
    def __init__(self, c, rows):
        super().__init__()
        self.head_dim = c.head_dim
        for name in ("q", "k", "v", "o"):
            channels, fan_in = c.shapes[name]
            bias = c.o_bias if name == "o" else c.qkv_bias
            setattr(self, f"{name}_proj", Projection(fan_in, channels, bias, rows[name]))
        self.q_norm = nn.RMSNorm(c.head_dim, eps=c.rms_norm_eps) if c.qk_norm else None
        self.k_norm = nn.RMSNorm(c.head_dim, eps=c.rms_norm_eps) if c.qk_norm else None

    def forward(self, x, i, rope, mask, z, memory, cache):
        B, T, _ = x.shape
        heads = (B, T, -1, self.head_dim)
        lora = memory.lora
        q = self.q_proj(x, z.get("q"), lora.get("q")).view(heads)  # [B, T, H, hd]
        k = self.k_proj(x, z.get("k"), lora.get("k")).view(heads)  # [B, T, G, hd]
        v = self.v_proj(x, z.get("v"), lora.get("v")).view(heads)  # [B, T, G, hd]
        if self.q_norm is not None:  # Qwen3 normalises each head
            q = self.q_norm(q)
            k = self.k_norm(k)
        q = rotate(q.transpose(1, 2), rope)  # [B, H, T, hd]
        k = rotate(k.transpose(1, 2), rope)  # [B, G, T, hd]
        v = v.transpose(1, 2)

        # Eq. 3: softmax(Q [K_mem; K]^T) [V_mem; V]. The memory is shared by the batch and passes no gate. With a cache
        # it enters once, before the first text: afterwards the cache holds it.
        if memory.length and (cache is None or cache.length(i) == 0):
            keys = memory.keys.expand(B, -1, -1, -1)  # [B, G, M, hd]
            values = memory.values.expand(B, -1, -1, -1)
            k = torch.cat([keys, k], dim=2)  # [B, G, M + T, hd]
            v = torch.cat([values, v], dim=2)
        if cache is not None:
            k, v = cache.extend(i, k, v)

        y = attend(q, k, v, mask)  # [B, H, T, hd]
        y = y.transpose(1, 2).reshape(B, T, -1)  # [B, T, H hd]
        return self.o_proj(y, z.get("o"), lora.get("o"))


class MLP(nn.Module):
    def __init__(self, c, rows):
        super().__init__()
        # A neuron is a row of gate, a row of up and a column of down. Where it was cut out, all three are gone.
        neurons = rows["neuron"]
        self.gate_proj = Projection(c.hidden_size, neurons, c.mlp_bias, neurons)
        self.up_proj = Projection(c.hidden_size, neurons, c.mlp_bias, neurons)
        self.down_proj = Projection(neurons, c.hidden_size, c.mlp_bias, rows["down"])

    def forward(self, x, z, memory):
        lora = memory.lora
        gate = self.gate_proj(x, z.get("gate"), lora.get("gate"))  # [B, T, F]
        up = self.up_proj(x, z.get("up"), lora.get("up"))  # [B, T, F]
        h = F.silu(gate) * up
        if "neuron" in z:  # one gate for all three parts of a neuron
            h = h * z["neuron"]
        return self.down_proj(h, z.get("down"), lora.get("down"))


# The teacher's: every gate open, no memory.
NO_GATES = {}
NO_MEMORY = Memory()


class Block(nn.Module):
    """One decoder block. rows_left (see `Config`): how many channels each of its matrices has left."""

    def __init__(self, c, rows_left=None):
        super().__init__()
        rows = {name: channels for name, (channels, _) in c.shapes.items()}
        rows["neuron"] = c.intermediate_size
        rows.update(rows_left or {})
        self.input_layernorm = nn.RMSNorm(c.hidden_size, eps=c.rms_norm_eps)
        self.self_attn = Attention(c, rows)
        self.post_attention_layernorm = nn.RMSNorm(c.hidden_size, eps=c.rms_norm_eps)
        self.mlp = MLP(c, rows)

    def forward(self, x, i, rope, mask, z=NO_GATES, memory=NO_MEMORY, cache=None):
        """x [B, T, D] -> [B, T, D]. i: number of this block, for the cache; rope and mask: see `Model.run`;
        z {name: [channels]}; memory: `Memory`."""
        h = self.input_layernorm(x)
        x = x + self.self_attn(h, i, rope, mask, z, memory, cache)
        return x + self.mlp(self.post_attention_layernorm(x), z, memory)


# The decoder ---------------------------------------------------------------------------------------------------------


class Model(nn.Module):
    """The decoder. Parameters carry the names of Hugging Face checkpoints, less the leading `model.`.

    The methods take z {block: {name: [channels]}}, the gates, and module {block: `Memory`}, one domain's memory module.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        rows_left = config.rows_left or [None] * config.num_hidden_layers
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, rows) for rows in rows_left)
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head(self):
        """The output matrix [V, D]: the embedding itself where the checkpoint ties the two."""
        return self.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def run(self, x, first, last, z=None, module=None, cache=None, checkpointing=False):
        """Blocks first .. last - 1 on x [B, T, D] -> [B, T, D]. checkpointing: recompute them in backward."""
        T = x.shape[1]
        z = z or {}
        module = module or {}
        heads_a_group = self.config.num_attention_heads // self.config.num_key_value_heads
        ropes = {}  # where the text starts -> what the blocks in which it starts there have in common
        masks = {}
        for i in range(first, last):
            memory = module.get(i, NO_MEMORY)
            # In a block with a KV memory the text's positions start at M: its M tokens stand before the text. Once a
            # cache is filled, they start where it ends (it holds the memory as well).
            start = cache.length(i) if cache else 0
            if start == 0:
                start = memory.length
            if start not in ropes:
                ropes[start] = rope_table(self.config, start, T, like=x)
                masks[start] = earlier_mask(T, start + T, heads_a_group, like=x)
            inputs = (x, i, ropes[start], masks[start], z.get(i, NO_GATES), memory, cache)
            if checkpointing:
                x = checkpoint(self.layers[i], *inputs, use_reentrant=False)
            else:
                x = self.layers[i](*inputs)
        return x

    def hidden(self, tokens, z=None, module=None, cache=None):
        """tokens [B, T] -> hidden states [B, T, D] after the last block, before the final norm."""
        x = self.embed_tokens(tokens)
        return self.run(x, 0, len(self.layers), z, module, cache)

    def logits(self, x):
        """Hidden states [..., D] after the last block -> float32 logits [..., V]."""
        return F.linear(self.norm(x), self.head).float()

    def forward(self, tokens, z=None, module=None, cache=None):
        """tokens [B, T] -> logits [B, T, V]."""
        return self.logits(self.hidden(tokens, z, module, cache))


@torch.inference_mode()
def generate(
    model, tokens, steps, vocab_size, eos=(), temperature=0.0, top_p=1.0, module=None, generator=None
):  # fmt: skip
    """Continue tokens [B, T] (rows of equal length); yield one [B] per step until every row has met an id of `eos`.

    temperature 0 is greedy; `top_p` keeps the smallest set of tokens with that probability. Rows of the vocabulary from
    `vocab_size` on are padding and never sampled. A finished row repeats its eos id. Raises ValueError for more tokens
    than the model's context has.
    """
    B, T = tokens.shape
    M = max([memory.length for memory in (module or {}).values()], default=0)
    limit = model.config.max_position_embeddings
    if M + T + steps > limit:
        have = f"{M} memory tokens, {T} of the prompt and {steps} new ones"
        raise ValueError(f"{have} exceed the model's context of {limit}; shorten the prompt or ask for less.")

    cache = Cache(room=steps)
    stop = torch.tensor(list(eos), dtype=tokens.dtype, device=tokens.device)
    done = torch.zeros(B, dtype=torch.bool, device=tokens.device)
    last = tokens[:, -1]
    x = tokens  # first the whole prompt, then one token at a time
    for _ in range(steps):
        hidden = model.hidden(x, module=module, cache=cache)
        logits = model.logits(hidden[:, -1])[:, :vocab_size]  # [B, V]
        if temperature == 0:
            new = logits.argmax(-1)
        else:
            best = logits.amax(-1, keepdim=True)
            p = ((logits - best).double() / temperature).softmax(-1)  # nothing overflows, however small the temperature
            p, order = p.sort(dim=-1, descending=True)
            before = p.cumsum(-1) - p  # probability of all better tokens
            before[:, 0] = -1.0  # the best token always stays
            p = p.masked_fill(before >= top_p, 0)
            drawn = torch.multinomial(p, 1, generator=generator)  # places in the order, [B, 1]
            new = order.gather(1, drawn)[:, 0]
        last = torch.where(done, last, new)
        done = done | torch.isin(last, stop)
        yield last
        if done.all():
            return
        x = last[:, None]
