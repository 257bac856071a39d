"""A from-scratch decoder (Llama, Qwen, Mistral, OLMo 2) that knowledge offloading enters in three places.

1. `Projection`: each matrix of a block takes a gate z on its output channels, and a LoRA.
2. `Attention`: a memory's keys and values stand before those of the text (Eq. 3).
3. `MLP`: one gate may stand for a whole neuron.

Without gates and memories the model is the pretrained one, the *teacher*. With them it is the *student*. Both use the
same weights until the mask is frozen. Then `koff.materialise` turns the student into a smaller `Model`. The two still
share every matrix from which nothing was cut. `data/checkpoint.py` fills a model from a Hugging Face folder.

Shapes: B batch, T text tokens, M memory tokens, S = M + T keys, D model width, H query heads, G key-value heads,
hd head dimension, F MLP neurons, V vocabulary rows, r LoRA rank. LoRA's two matrices keep their usual names, A and B.

In identifiers, `gate` always means SwiGLU's matrix. The method's gates are called z.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Config:
    """The fields of `config.json`, under its own names. `data/families.py` reads the file."""

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
    qk_norm: str | None  # "head": each head of q and k by itself (Qwen3); "all": all heads at once (OLMo 2)
    post_norm: bool  # the norms come after attention and MLP, not before (OLMo 2)
    eos_token_ids: tuple[int, ...]
    # Ours: for each block the number of channels left in "q", "k", "v", "o", "down" and "neuron" (rows of gate and of
    # up, which are cut together), or None if nothing was cut.
    rows_left: tuple[dict | None, ...] = ()
    raw: dict = field(default_factory=dict, repr=False, compare=False)  # config.json as read

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
    """The name of block i's projection `name` in a `Model`. Hugging Face puts "model." before it."""
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
    # Llama 3.1 lowers the slow frequencies, so that positions beyond the pretraining length still get distinct angles.
    turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)  # within the original context
    low = scaling["low_freq_factor"]
    high = scaling["high_freq_factor"]
    keep = ((turns - low) / (high - low)).clamp(0, 1)  # 1 for fast frequencies, 0 for slow ones
    return keep * frequency + (1 - keep) * frequency / scaling["factor"]


def rope_table(config, start, length, like):
    """(cos, sin), each [length, hd], for the positions from `start` on, in the dtype and on the device of `like`."""
    positions = torch.arange(start, start + length, dtype=torch.float32, device=like.device)
    angles = torch.outer(positions, rope_frequencies(config, like.device))  # [length, hd / 2]
    angles = torch.cat([angles, angles], dim=-1)  # channel i turns with channel i + hd / 2, as in Hugging Face's files
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


def causal_mask(T, S, like):
    """Additive mask [T, S], 0 or -inf, for T text tokens over S keys. The first S - T keys precede the text.

    Returns None for a single token, because it sees every key.
    """
    if T == 1:
        return None
    mask = torch.full((T, S), -math.inf, dtype=like.dtype, device=like.device)
    return mask.triu(S - T + 1)  # row t sees the first S - T + t + 1 keys


def attend(q, k, v, mask):
    """softmax(Q K^T / sqrt(hd) + mask) V: q [B, H, T, hd]; k, v [B, G, S, hd]; mask [T, S] -> [B, H, T, hd].

    Query head h reads key-value head h // (H / G).
    """
    copies = q.shape[1] // k.shape[1]  # H / G
    k = k.repeat_interleave(copies, dim=1)  # [B, H, S, hd]
    v = v.repeat_interleave(copies, dim=1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@dataclass
class Memory:
    """The memory of one domain in one block, in the model's dtype. A dict {block: `Memory`} is called `memories`.

    lora: projection -> (A [r, fan-in], B [rows, r]). B is already scaled by alpha / r.
    keys, values: [G, M, hd], or None without a KV memory. Keys are stored after RoPE, at positions 0 .. M - 1.
    """

    lora: dict = field(default_factory=dict)
    keys: torch.Tensor | None = None
    values: torch.Tensor | None = None

    @property
    def length(self):
        """M, the number of memory tokens."""
        return 0 if self.keys is None else self.keys.shape[1]


class Cache:
    """Keys and values of the tokens so far, memory tokens included. `room`: how many tokens may follow the prompt."""

    def __init__(self, room):
        self.room = room
        self.layers = {}  # block -> (keys, values), each [B, G, length + free room, hd]
        self.lengths = {}  # block -> the filled length

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


# A block -------------------------------------------------------------------------------------------------------------


class Projection(nn.Module):
    """y = z * (W x + bias + B A x): one matrix with its gate and its LoRA (first place where the method enters).

    Where one module reads a whole text, `data.fast.merged` puts W + B A in place of W.

    After `koff.materialise`, `weight` has only the rows of open channels. `kept` [rows] holds their places among the
    `channels`; the other channels are zero in the output. Without cut channels `kept` is None.
    """

    def __init__(self, fan_in, channels, bias, rows):
        super().__init__()
        self.channels = channels
        self.weight = nn.Parameter(torch.empty(rows, fan_in))  # uninitialised: a checkpoint fills it
        self.bias = nn.Parameter(torch.empty(rows)) if bias else None
        kept = torch.zeros(rows, dtype=torch.int64) if rows < channels else None
        self.register_buffer("kept", kept)

    def forward(self, x, z=None, lora=None):
        """x [B, T, fan-in] -> [B, T, channels]. lora: (A [r, fan-in], B [rows, r]).

        z: [channels], while no row is cut; or [B, T, channels], a gate for each token (data/scores.py).
        """
        y = F.linear(x, self.weight, self.bias)  # [B, T, rows]
        if lora is not None:
            a, b = lora
            y = y + F.linear(F.linear(x, a), b)
        if z is not None:
            y = z * y  # the gate covers the LoRA too: no memory can reopen a closed channel
        if self.kept is not None:
            whole = y.new_zeros(*y.shape[:-1], self.channels)
            y = whole.index_copy(-1, self.kept, y)
        return y


class Attention(nn.Module):
    attend = staticmethod(attend)  # `data.fast.enable` replaces it by an equivalent that copies no keys

    def __init__(self, c, rows):
        super().__init__()
        self.head_dim = c.head_dim
        self.qk_norm = c.qk_norm
        for name in ("q", "k", "v", "o"):
            channels, fan_in = c.shapes[name]
            bias = c.o_bias if name == "o" else c.qkv_bias
            setattr(self, f"{name}_proj", Projection(fan_in, channels, bias, rows[name]))
        if c.qk_norm:
            widths = {"head": (c.head_dim, c.head_dim), "all": (c.shapes["q"][0], c.shapes["k"][0])}
            q_width, k_width = widths[c.qk_norm]
            self.q_norm = nn.RMSNorm(q_width, eps=c.rms_norm_eps)
            self.k_norm = nn.RMSNorm(k_width, eps=c.rms_norm_eps)

    def forward(self, x, i, rope, mask, z, memory, cache):
        B, T, _ = x.shape
        heads = (B, T, -1, self.head_dim)
        lora = memory.lora
        q = self.q_proj(x, z.get("q"), lora.get("q"))  # [B, T, H hd]
        k = self.k_proj(x, z.get("k"), lora.get("k"))  # [B, T, G hd]
        v = self.v_proj(x, z.get("v"), lora.get("v"))  # [B, T, G hd]
        if self.qk_norm == "all":
            q = self.q_norm(q)
            k = self.k_norm(k)
        q = q.view(heads)  # [B, T, H, hd]
        k = k.view(heads)
        if self.qk_norm == "head":
            q = self.q_norm(q)
            k = self.k_norm(k)
        q = rotate(q.transpose(1, 2), rope)  # [B, H, T, hd]
        k = rotate(k.transpose(1, 2), rope)  # [B, G, T, hd]
        v = v.view(heads).transpose(1, 2)

        # Second place, Eq. 3: softmax(Q [K_mem; K]^T) [V_mem; V]. All sequences of a batch share the memory, and no
        # gate applies to it. With a cache the memory enters once, before the first text, and stays there.
        if memory.length and (cache is None or cache.length(i) == 0):
            keys = memory.keys.expand(B, -1, -1, -1)  # [B, G, M, hd]
            values = memory.values.expand(B, -1, -1, -1)
            k = torch.cat([keys, k], dim=2)  # [B, G, M + T, hd]
            v = torch.cat([values, v], dim=2)
        if cache is not None:
            k, v = cache.extend(i, k, v)

        y = self.attend(q, k, v, mask)  # [B, H, T, hd]
        y = y.transpose(1, 2).reshape(B, T, -1)  # [B, T, H hd]
        return self.o_proj(y, z.get("o"), lora.get("o"))


class MLP(nn.Module):
    def __init__(self, c, rows):
        super().__init__()
        # A neuron is a row of gate, a row of up and a column of down. A cut neuron loses all three for good. So gate
        # and up never need `kept`: their channels are simply the neurons that are left.
        neurons = rows["neuron"]
        self.gate_proj = Projection(c.hidden_size, neurons, c.mlp_bias, neurons)
        self.up_proj = Projection(c.hidden_size, neurons, c.mlp_bias, neurons)
        self.down_proj = Projection(neurons, c.hidden_size, c.mlp_bias, rows["down"])

    def forward(self, x, z, memory):
        lora = memory.lora
        gate = self.gate_proj(x, z.get("gate"), lora.get("gate"))  # [B, T, F]
        up = self.up_proj(x, z.get("up"), lora.get("up"))  # [B, T, F]
        h = F.silu(gate) * up
        if "neuron" in z:  # third place: one gate for all three parts of a neuron
            h = h * z["neuron"]
        return self.down_proj(h, z.get("down"), lora.get("down"))


# Defaults of `Block.forward`, which make it the teacher.
NO_GATES = {}
NO_MEMORY = Memory()


class Block(nn.Module):
    """One decoder block. rows_left (see `Config`): the number of channels left in each of its matrices."""

    def __init__(self, c, rows_left=None):
        super().__init__()
        rows = {name: channels for name, (channels, _) in c.shapes.items()}
        rows["neuron"] = c.intermediate_size
        rows.update(rows_left or {})
        self.post_norm = c.post_norm
        first_norm = "post_feedforward_layernorm" if c.post_norm else "input_layernorm"
        setattr(self, first_norm, nn.RMSNorm(c.hidden_size, eps=c.rms_norm_eps))
        self.post_attention_layernorm = nn.RMSNorm(c.hidden_size, eps=c.rms_norm_eps)
        self.self_attn = Attention(c, rows)
        self.mlp = MLP(c, rows)

    def forward(self, x, i, rope, mask, z=NO_GATES, memory=NO_MEMORY, cache=None):
        """x [B, T, D] -> [B, T, D]. i: number of this block, for the cache; rope, mask: see `Model.run`;
        z {name: [channels]}; memory: `Memory`."""
        return self.add_mlp(self.add_attention(x, i, rope, mask, z, memory, cache), z, memory)

    def add_attention(self, x, i, rope, mask, z=NO_GATES, memory=NO_MEMORY, cache=None):
        if self.post_norm:
            return x + self.post_attention_layernorm(self.self_attn(x, i, rope, mask, z, memory, cache))
        return x + self.self_attn(self.input_layernorm(x), i, rope, mask, z, memory, cache)

    def add_mlp(self, x, z=NO_GATES, memory=NO_MEMORY):
        if self.post_norm:
            return x + self.post_feedforward_layernorm(self.mlp(x, z, memory))
        return x + self.mlp(self.post_attention_layernorm(x), z, memory)


# The decoder ---------------------------------------------------------------------------------------------------------


class Model(nn.Module):
    """The decoder. Parameters carry the names of Hugging Face checkpoints, without the leading `model.`.

    Arguments of all methods: z {block: {name: [channels]}} are the gates; memories {block: `Memory`} are those of one
    domain.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        rows_left = config.rows_left or [None] * config.num_hidden_layers
        embedding = torch.empty(config.vocab_size, config.hidden_size)  # uninitialised, like `Projection`
        self.embed_tokens = nn.Embedding.from_pretrained(embedding, freeze=False)
        self.layers = nn.ModuleList(Block(config, rows) for rows in rows_left)
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = Projection(config.hidden_size, config.vocab_size, False, config.vocab_size)

    @property
    def head(self):
        """The output matrix [V, D]: the embedding itself where the checkpoint ties the two."""
        return self.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def run(self, x, start, stop, z=None, memories=None, cache=None, checkpointing=False):
        """Blocks start .. stop - 1 on x [B, T, D] -> [B, T, D]. checkpointing: recompute them in backward."""
        T = x.shape[1]
        z = z or {}
        memories = memories or {}
        # One table and one mask for each position at which text starts: M in a block with a KV memory, 0 in one
        # without. They may differ, because RoPE is relative: each block counts from its own first key.
        ropes = {}
        masks = {}
        for i in range(start, stop):
            memory = memories.get(i, NO_MEMORY)
            # In a block with a KV memory the text starts at position M, behind M memory tokens. A filled cache holds
            # memory and earlier text: new text starts at its end.
            position = memory.length
            if cache is not None and cache.length(i) > 0:
                position = cache.length(i)
            if position not in ropes:
                ropes[position] = rope_table(self.config, position, T, like=x)
                masks[position] = causal_mask(T, position + T, like=x)
            inputs = (x, i, ropes[position], masks[position], z.get(i, NO_GATES), memory, cache)
            if checkpointing:
                x = checkpoint(self.layers[i], *inputs, use_reentrant=False)
            else:
                x = self.layers[i](*inputs)
        return x

    def hidden(self, tokens, z=None, memories=None, cache=None):
        """tokens [B, T] -> hidden states [B, T, D] after the last block, before the final norm."""
        x = self.embed_tokens(tokens)
        return self.run(x, 0, len(self.layers), z, memories, cache)

    def logits(self, x):
        """Hidden states [..., D] after the last block -> float32 logits [..., V]."""
        return F.linear(self.norm(x), self.head).float()

    def forward(self, tokens, z=None, memories=None, cache=None):
        """tokens [B, T] -> logits [B, T, V]."""
        return self.logits(self.hidden(tokens, z, memories, cache))


@torch.inference_mode()
def generate(
    model, tokens, steps, vocab_size, eos=(), temperature=0.0, top_p=1.0, memories=None, generator=None
):  # fmt: skip
    """Continue tokens [B, T] (rows of equal length); yield one [B] per step until every row has had an id of `eos`.

    temperature 0 is greedy. `top_p` keeps the smallest set of tokens with that probability. Vocabulary rows from
    `vocab_size` on are padding and are never sampled. A finished row repeats its eos id. Raises ValueError if memory,
    prompt and new tokens exceed the model's context.
    """
    B, T = tokens.shape
    M = max([memory.length for memory in (memories or {}).values()], default=0)
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
        hidden = model.hidden(x, memories=memories, cache=cache)
        logits = model.logits(hidden[:, -1])[:, :vocab_size]  # [B, V]
        if temperature == 0:
            new = logits.argmax(-1)
        else:
            best = logits.amax(-1, keepdim=True)
            p = ((logits - best).double() / temperature).softmax(-1)  # no overflow, however small the temperature
            p, order = p.sort(dim=-1, descending=True)
            before = p.cumsum(-1) - p  # probability of all better tokens
            before[:, 0] = -1.0  # below any top_p, so that the best token always stays
            p = p.masked_fill(before >= top_p, 0)
            drawn = torch.multinomial(p, 1, generator=generator)  # places in the order, [B, 1]
            new = order.gather(1, drawn)[:, 0]
        last = torch.where(done, last, new)
        done = done | torch.isin(last, stop)
        yield last
        if done.all():
            return
        x = last[:, None]
