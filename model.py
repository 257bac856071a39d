"""A from-scratch Llama / Qwen decoder; `data/checkpoint.py` fills it from a Hugging Face folder.

It covers Llama 3, 3.1, 3.2 and SmolLM2 (`llama`), Qwen2 and Qwen2.5 (`qwen2`), Qwen3 (`qwen3`), and the backbones
that `koff.py` makes of them. The one thing that an ordinary decoder does not have is the seam: every block takes the
*gates* and the *memory* of one domain as arguments. `None` for both is the unchanged pretrained model (the teacher), so
that teacher and student are the same weights in memory.

Shapes: B batch, T text tokens, M memory tokens, S = M + T keys, D model width, H query heads, G key-value heads,
hd head dimension, F MLP neurons, V vocabulary rows.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint

# Configuration: sizes come from config.json, never from a table ------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """What `config.json` says, under its own names. `kept` is ours: per block, how many channels are left."""

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
    kept: tuple[dict | None, ...] = ()  # {"k", "v", "neuron", "down", ...} -> channels left, None: an untouched block
    raw: dict = field(default_factory=dict, repr=False, compare=False)

    @property
    def shapes(self):
        """The projections of a block: {name: (output channels, fan-in)}."""
        D, F, hd = self.hidden_size, self.intermediate_size, self.head_dim
        q, kv = self.num_attention_heads * hd, self.num_key_value_heads * hd
        return {"q": (q, D), "k": (kv, D), "v": (kv, D), "o": (D, q), "gate": (F, D), "up": (F, D), "down": (D, F)}


def matrix(i, name):
    """Where the projection `name` of block i stands in a `Model`, and behind "model." in a Hugging Face checkpoint."""
    return f"layers.{i}.{'self_attn' if name in 'qkvo' else 'mlp'}.{name}_proj"


# Pieces --------------------------------------------------------------------------------------------------------------


def rope_frequencies(config, device):
    """Inverse wavelengths [hd / 2] (RoFormer, arXiv 2104.09864), stretched for long texts as Llama 3.1 does."""
    channel = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device)
    f = 1.0 / config.rope_theta ** (channel / config.head_dim)
    if (s := config.rope_scaling) is None:
        return f
    turns = s["original_max_position_embeddings"] * f / (2 * math.pi)  # within the original context
    low, high = s["low_freq_factor"], s["high_freq_factor"]
    share = ((turns - low) / (high - low)).clamp(0, 1)  # 1: high frequency, kept; 0: low frequency, divided
    return share * f + (1 - share) * f / s["factor"]


def rope_table(config, start, length, like):
    """(cos, sin), each [length, hd], for the positions from `start` on, in the dtype and on the device of `like`.

    Channel i turns with channel i + hd / 2, as Hugging Face has it; the first half of sin carries the minus.
    """
    positions = torch.arange(start, start + length, dtype=torch.float32, device=like.device)
    angles = torch.outer(positions, rope_frequencies(config, like.device))
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1).to(like.dtype), torch.cat([-sin, sin], dim=-1).to(like.dtype)


def rotate(x, table):
    """Rotate [..., T, hd] by a `rope_table`."""
    cos, sin = table
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def attend(q, k, v):
    """softmax(Q K^T / sqrt(hd)) V, where text token t sees all S - T earlier positions, and the text up to itself.

    q [B, H, T, hd]; k, v [B, G, S, hd] -> [B, H, T, hd]; query head h reads key-value head h G // H.
    """
    (B, H, T, hd), (_, G, S, _) = q.shape, k.shape
    if T == 1:  # nothing to hide: the query heads of a group are rows of one head
        return F.scaled_dot_product_attention(q.reshape(B, G, H // G, hd), k, v).view(B, H, 1, hd)
    if q.device.type == "cpu":
        return CausalRows.apply(q, k, v)
    mask = causal_lower_right(T, S) if T < S else None  # a description, not a tensor: keeps the flash kernel
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=T == S, enable_gqa=True)


class CausalRows(torch.autograd.Function):
    """`attend` from matrix products, some query rows at a time: on a CPU two to three times as fast as torch's kernel.

    Rows meet only the keys that they see, the query heads of a group share one product, and what is T x S is computed
    again in backward (as in FlashAttention, arXiv 2205.14135), so that memory grows with T alone.
    """

    ROWS = 128

    @staticmethod
    def parts(q, k, *beside):
        """Parts of the rows: which, how many keys they see, and q and `beside` there as [B G, (H / G) rows, hd]."""
        T, (B, G, S, _) = q.shape[2], k.shape
        for start in range(0, T, CausalRows.ROWS):
            rows = slice(start, min(start + CausalRows.ROWS, T))
            yield rows, S - T + rows.stop, *(t[:, :, rows].reshape(B * G, -1, t.shape[3]) for t in (q, *beside))

    @staticmethod
    def probabilities(q, k, rows):
        """q [N, n, hd], k [N, s, hd] -> [N, n, s]; the last keys are those of the `rows` themselves."""
        c, p = rows.stop - rows.start, torch.baddbmm(q.new_zeros(()), q, k.mT, beta=0, alpha=q.shape[-1] ** -0.5)
        p.unflatten(1, (-1, c))[..., -c:] += q.new_full((c, c), -math.inf).triu(1)
        return p.softmax(-1)

    @staticmethod
    def forward(ctx, q, k, v):
        y, keys, values = torch.empty_like(q), k.flatten(0, 1), v.flatten(0, 1)  # [B G, S, hd]
        for rows, seen, own in CausalRows.parts(q, k):
            p = CausalRows.probabilities(own, keys[:, :seen], rows)
            y[:, :, rows] = torch.bmm(p, values[:, :seen]).view_as(y[:, :, rows])
        ctx.save_for_backward(q, k, v, y)
        return y

    @staticmethod
    def backward(ctx, grad):
        q, k, v, y = ctx.saved_tensors
        scale, keys, values = q.shape[-1] ** -0.5, k.flatten(0, 1), v.flatten(0, 1)
        mean = (grad * y).sum(-1, keepdim=True)  # of dp under p: what softmax takes off
        dq, (dk, dv) = torch.empty_like(q), (torch.zeros_like(t, dtype=torch.float32) for t in (keys, values))
        for rows, seen, own, g, m in CausalRows.parts(q, k, grad, mean):
            p = CausalRows.probabilities(own, keys[:, :seen], rows)
            dv[:, :seen] += torch.bmm(p.mT, g)
            ds = torch.bmm(g, values[:, :seen].mT).sub_(m).mul_(p).mul_(scale)
            dq[:, :, rows] = torch.bmm(ds, keys[:, :seen]).view_as(q[:, :, rows])
            dk[:, :seen] += torch.bmm(ds.mT, own)
        return dq, dk.view(k.shape).to(k.dtype), dv.view(v.shape).to(v.dtype)


@dataclass
class BlockMemory:
    """One domain's memory in one block, in the dtype of the model.

    lora: projection -> (A [r, in], B [out, r]), the scale in B. keys, values: [G, M, hd] or None; keys after RoPE.
    """

    lora: dict
    keys: torch.Tensor | None = None
    values: torch.Tensor | None = None

    @property
    def length(self):
        return 0 if self.keys is None else self.keys.shape[1]


class Cache:
    """Keys and values of the tokens so far, memory tokens included. `room`: tokens that may follow the first call."""

    def __init__(self, room):
        self.room, self.layers, self.lengths = room, {}, {}

    def extend(self, i, k, v):
        """Append k, v [B, G, T, hd] to block i; return all of its keys and values [B, G, S, hd]."""
        start = self.lengths.get(i, 0)
        end = self.lengths[i] = start + k.shape[2]
        if start == 0:
            shape = (*k.shape[:2], end + self.room, k.shape[3])
            self.layers[i] = k.new_empty(shape), v.new_empty(shape)
        at = torch.arange(start, end, device=k.device)
        for buffer, new in zip(self.layers[i], (k, v), strict=True):
            buffer.index_copy_(2, at, new)
        return tuple(buffer.narrow(2, 0, end) for buffer in self.layers[i])


def project(linear, x, name, gates, memory):
    """y = z * (W x + dW x), biases inside the bracket: a closed gate closes the LoRA with it."""
    y = linear(x)
    if memory is not None and name in memory.lora:
        a, b = memory.lora[name]
        y = y + F.linear(F.linear(x, a), b)
    if gates is not None and name in gates:
        y = y * gates[name]
    return y


class Block(nn.Module):
    """One decoder block. `kept` (see `Config`) makes it the compact one, whose matrices have only the open channels."""

    def __init__(self, c, kept=None):
        super().__init__()
        self.c = c
        D, full = c.hidden_size, {name: rows for name, (rows, _) in c.shapes.items()}
        kept = {**full, "neuron": c.intermediate_size, **(kept or {})}
        self.input_layernorm = nn.RMSNorm(D, eps=c.rms_norm_eps)
        self.self_attn = nn.Module()
        self.self_attn.q_proj = nn.Linear(D, kept["q"], bias=c.qkv_bias)
        self.self_attn.k_proj = nn.Linear(D, kept["k"], bias=c.qkv_bias)
        self.self_attn.v_proj = nn.Linear(D, kept["v"], bias=c.qkv_bias)
        self.self_attn.o_proj = nn.Linear(full["q"], kept["o"], bias=c.o_bias)
        if c.qk_norm:
            self.self_attn.q_norm = nn.RMSNorm(c.head_dim, eps=c.rms_norm_eps)
            self.self_attn.k_norm = nn.RMSNorm(c.head_dim, eps=c.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(D, eps=c.rms_norm_eps)
        self.mlp = nn.Module()
        self.mlp.gate_proj = nn.Linear(D, kept["neuron"], bias=c.mlp_bias)
        self.mlp.up_proj = nn.Linear(D, kept["neuron"], bias=c.mlp_bias)
        self.mlp.down_proj = nn.Linear(kept["neuron"], kept["down"], bias=c.mlp_bias)
        # Where the open channels of a compact block belong; None in a dense one.
        for name in ("q", "k", "v", "o", "down"):
            index = torch.zeros(kept[name], dtype=torch.int64) if kept[name] < full[name] else None
            self.register_buffer(f"{name}_kept", index)

    def forward(self, x, i, rope, gates=None, memory=None, cache=None):
        """x [B, T, D] -> [B, T, D]. `i`: number of this block, for the cache; `rope`: see `rope_table`."""
        x = add(x, self.attention(self.input_layernorm(x), i, rope, gates, memory, cache), self.o_kept)
        return add(x, self.mlp_out(self.post_attention_layernorm(x), gates, memory), self.down_kept)

    def attention(self, x, i, rope, gates, memory, cache):
        c, at = self.c, self.self_attn
        B, T, _ = x.shape
        q = widen(project(at.q_proj, x, "q", gates, memory), self.q_kept, c.shapes["q"][0])
        k = widen(project(at.k_proj, x, "k", gates, memory), self.k_kept, c.shapes["k"][0])
        v = widen(project(at.v_proj, x, "v", gates, memory), self.v_kept, c.shapes["v"][0])
        q, k, v = (t.view(B, T, -1, c.head_dim) for t in (q, k, v))
        if c.qk_norm:
            q, k = at.q_norm(q), at.k_norm(k)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # [B, heads, T, hd]
        q, k = rotate(q, rope), rotate(k, rope)
        if memory is not None and memory.length and (cache is None or not cache.lengths.get(i)):
            # Eq. 3: softmax(Q [K_mem; K]^T) [V_mem; V]. The memory is shared by the batch and bypasses the gates.
            k = torch.cat([memory.keys.expand(B, -1, -1, -1), k], dim=2)  # [B, G, M + T, hd]
            v = torch.cat([memory.values.expand(B, -1, -1, -1), v], dim=2)
        if cache is not None:
            k, v = cache.extend(i, k, v)
        return project(at.o_proj, attend(q, k, v).transpose(1, 2).reshape(B, T, -1), "o", gates, memory)

    def mlp_out(self, x, gates, memory):
        h = F.silu(project(self.mlp.gate_proj, x, "gate", gates, memory))
        h = h * project(self.mlp.up_proj, x, "up", gates, memory)
        if gates is not None and "neuron" in gates:
            h = h * gates["neuron"]
        return project(self.mlp.down_proj, h, "down", gates, memory)


def add(x, y, kept):
    """x [..., D] plus the open channels [..., kept] of y; a closed channel adds nothing."""
    return x + y if kept is None else x.index_add(-1, kept, y)


def widen(y, kept, width, dim=-1):
    """Put the open channels [..., kept] at their places in [..., width]; a closed channel is a zero there."""
    if kept is None:
        return y
    shape = list(y.shape)
    shape[dim] = width
    return y.new_zeros(shape).index_copy(dim, kept, y)


class Model(nn.Module):
    """The decoder. Parameters carry the names of Hugging Face checkpoints, less the leading `model.`."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        kept = config.kept or [None] * config.num_hidden_layers
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, k) for k in kept)
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head(self):
        """The output matrix [V, D]: the embedding itself where the checkpoint ties the two."""
        return self.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def run(self, x, first, last, gates=None, memory=None, cache=None, checkpointing=False):
        """Blocks first .. last - 1 on x [B, T, D].

        gates: block -> {"k", "v", "neuron", "down", ...} -> z, broadcast against [B, T, channels].
        memory: block -> BlockMemory. In blocks with a memory the text's positions start at M.
        """
        T = x.shape[1]
        ropes = {}  # positions depend on what stands before the text, not on the block
        for i in range(first, last):
            own = memory.get(i) if memory else None
            past = (cache.lengths.get(i, 0) if cache else 0) or (own.length if own else 0)
            if past not in ropes:
                ropes[past] = rope_table(self.config, past, T, x)
            args = (x, i, ropes[past], gates.get(i) if gates else None, own, cache)
            x = checkpoint(self.layers[i], *args, use_reentrant=False) if checkpointing else self.layers[i](*args)
        return x

    def logits(self, x):
        """Hidden states [..., D] after the last block -> float32 logits [..., V]."""
        return F.linear(self.norm(x), self.head).float()

    def hidden(self, tokens, gates=None, memory=None, cache=None):
        """tokens [B, T] -> hidden states [B, T, D] after the last block, before its norm."""
        return self.run(self.embed_tokens(tokens), 0, len(self.layers), gates, memory, cache)

    def forward(self, tokens, gates=None, memory=None, cache=None):
        """tokens [B, T] -> logits [B, T, V]."""
        return self.logits(self.hidden(tokens, gates, memory, cache))


# Generation ----------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def generate(model, tokens, steps, vocab_size, eos=(), temperature=0.0, top_p=1.0, memory=None, generator=None):
    """Continue tokens [B, T] (rows of equal length); yield one [B] per step until every row has met an id of `eos`.

    temperature 0 is greedy; `top_p` keeps the smallest set of tokens with that probability. Rows of the vocabulary from
    `vocab_size` on are padding and never sampled. A finished row repeats its eos id.
    """
    (B, T), limit = tokens.shape, model.config.max_position_embeddings
    M = max((block.length for block in (memory or {}).values()), default=0)
    if M + T + steps > limit:
        have = f"{M} memory tokens, {T} of the prompt and {steps} new ones"
        raise ValueError(f"{have} exceed the model's context of {limit}; shorten the prompt or ask for less.")
    cache, stop = Cache(steps), torch.tensor(list(eos), dtype=tokens.dtype, device=tokens.device)
    done, last = torch.zeros(B, dtype=torch.bool, device=tokens.device), tokens[:, -1]
    x = tokens
    for _ in range(steps):
        x = model.hidden(x, memory=memory, cache=cache)
        logits = model.logits(x[:, -1])[:, :vocab_size]  # [B, V]
        if temperature == 0:
            new = logits.argmax(-1)
        else:
            p, order = (logits / temperature).softmax(-1).sort(dim=-1, descending=True)
            p[:, 1:] = p[:, 1:].masked_fill((p.cumsum(-1) - p)[:, 1:] >= top_p, 0)  # the first token always stays
            new = order.gather(1, torch.multinomial(p, 1, generator=generator))[:, 0]
        last = torch.where(done, last, new)
        done = done | torch.isin(last, stop)
        yield last
        if done.all():
            return
        x = last[:, None]
