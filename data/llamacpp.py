"""GGUF files for llama.cpp: the pruned model in its own size, each module as a LoRA adapter.

Of llama.cpp's architectures we take `deci`: Llama with sizes for each block. (In its `llama` every block has the sizes
of the first.) Where it differs from `model.Model`:

    Only the MLP can be smaller. Closed channels of other matrices are zeros.
    An MLP without neurons loses its block's attention, too, and Q8_0 needs widths that are multiples of 32. Some closed
    neurons therefore stay, as zeros (`neurons_left`).
    In a head of q or k, a channel turns with its neighbour, not with the one hd / 2 places on (`interleave`).

tests/test_llamacpp.py compares llama.cpp's log probabilities, text and token ids with those of the run.
"""

import re
from dataclasses import replace

import torch

import koff
from data import BadInput
from data.checkpoint import checkpoint_name, tensors_of
from data.special_tokens import TOKENIZER, read_json, read_templates
from data.tokenizer import DIGITS, GPT2, pattern_of
from model import matrix_name, rope_frequencies

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # types of tokens

QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|")
# llama.cpp's names for a pattern and `ignore_merges`.
NAMES = {(GPT2, False): "gpt-2", (DIGITS, False): "smollm", (QWEN2, False): "qwen2", (LLAMA3, True): "llama-bpe"}
# The pattern of our own base model cuts off the last of several spaces before a digit; DIGITS does not.
SPACES = DIGITS.replace(r"\s+(?=\p{N})|", "")


def neurons_left(kept, config, dtype):
    """The channels with which `koff.materialise` takes only neurons out of the dense model of `data.export.expand`."""
    group = 32 if dtype == "q8_0" else 1
    places = torch.arange(config.intermediate_size)
    is_open = torch.stack([torch.isin(places, index["neuron"]) for index in kept.values()])  # [N, F]
    count = is_open.sum(1, keepdim=True)
    more = (count.clamp(min=1) / group).ceil() * group - count
    is_open |= (~is_open).cumsum(1) <= more
    return koff.kept_channels({"neuron": is_open}, config, min(kept), "cpu")


def new_file(path):
    """(the package gguf, its writer for a file). BadInput if the package is not installed."""
    try:
        import gguf
    except ImportError:
        raise BadInput("export gguf needs a package: pip install gguf.") from None
    return gguf, gguf.GGUFWriter(path, "deci")


def write_backbone(path, run, model, dtype):
    """Write the `model` that a run has become; see `write`. BadInput if llama.cpp cannot express it."""
    config = model.config
    if config.qk_norm or config.post_norm:
        raise BadInput(f"llama.cpp has no {config.model_type} with blocks of different widths; export hf instead.")
    gguf, writer = new_file(path)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length([len(layer.mlp.up_proj.weight) for layer in model.layers])
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    add_tokenizer(gguf, writer, run)
    tensors = {checkpoint_name(name): tensor for name, tensor in model.state_dict().items()}
    if config.rope_scaling:
        plain = rope_frequencies(replace(config, rope_scaling=None), "cpu")
        tensors["rope_freqs.weight"] = plain / rope_frequencies(config, "cpu")  # llama.cpp divides by it
    return write(gguf, writer, tensors, config, dtype)


def write_adapter(path, lora, config):
    """Write the LoRA of {block: Memory} for the model of `config`; see `write`."""
    gguf, writer = new_file(path)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")  # without an alpha: our B already contains the scale
    tensors = {}
    for name, tensor in tensors_of(lora).items():
        _, i, part, half = name.split(".")  # layers.7.down.lora_A
        tensors[f"{checkpoint_name(matrix_name(i, part))}.weight.{half.lower()}"] = tensor
    return write(gguf, writer, tensors, config, "f32")


def write(gguf, writer, tensors, config, dtype):
    """Complete a file. Its matrices have the type `dtype`, vectors f32. tensors {name in a checkpoint: tensor}.

    Returns its tensors {name in llama.cpp: tensor} twice: as the file holds them, and as they should be.
    """
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.DECI, config.num_hidden_layers)
    expected = {}
    for name, tensor in tensors.items():
        kind = dtype if tensor.ndim > 1 else "f32"
        if kind == "q8_0" and tensor.shape[1] % 32:
            print(f"{name} stays in bf16: {tensor.shape[1]} numbers in a row are no multiple of 32.")
            kind = "bf16"
        kind = gguf.GGMLQuantizationType[kind.upper()]
        name = names.get_name(name, (".weight", ".bias", ".weight.lora_a", ".weight.lora_b"))
        numbers = gguf.quants.quantize(interleave(name, tensor, config).float().numpy(), kind)
        writer.add_tensor(name, numbers, raw_dtype=kind)
        expected[name] = torch.from_numpy(numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    written = {tensor.name: torch.tensor(tensor.data) for tensor in gguf.GGUFReader(writer.path).tensors}
    return written, expected


def interleave(name, tensor, config):
    """`tensor` with rows in llama.cpp's order: in a head of q or k, channels j and j + hd / 2 become neighbours."""
    if not re.search(r"attn_[qk]\..*(weight|bias|lora_b)$", name):
        return tensor
    halves = tensor.unflatten(0, (-1, 2, config.head_dim // 2))  # [heads, 2, hd / 2, ...]
    return halves.transpose(1, 2).flatten(0, 2)


def add_tokenizer(gguf, writer, run):
    """Add tokenizer and chat template to a file. BadInput if llama.cpp would make other ids."""
    folder = run.folder / "backbone"
    file = read_json(folder / TOKENIZER)
    ids = run.tokenizer.ids
    pattern = pattern_of(file["pre_tokenizer"])
    if pattern == SPACES and not re.search("(?m)^[ĠĊĉč]{2,}$", "\n".join(ids)):
        pattern = DIGITS  # without tokens of several spaces both make the same ids
    pre = NAMES.get((pattern, bool(file["model"].get("ignore_merges"))))
    # Merges and the ids of two special tokens. Without an eos llama.cpp would take token 11 for it.
    more = gguf.SpecialVocab(folder, True, ("bos", "eos"), run.config.vocab_size)
    bos = run.tokenizer.bos
    if pre is None or "eos" not in more.special_token_ids or bos not in ([], [more.special_token_ids.get("bos")]):
        raise BadInput(f"{folder}: llama.cpp lacks its pre-tokenizer, its bos or its eos_token; export hf instead.")
    more.add_special_token = {"bos": bool(bos)}
    templates = read_templates(folder)
    more.chat_template = templates.get("default") if isinstance(templates, dict) else templates
    more.add_to_gguf(writer, quiet=True)
    if file.get("normalizer"):
        print("llama.cpp does not normalise text as this tokenizer does; give it text in the form NFC.")
    texts = {id: text for text, id in ids.items()}
    kinds = dict.fromkeys(texts, NORMAL)
    for text, token in run.tokenizer.added.items():
        kinds[ids[text]] = CONTROL if token.get("special") else USER_DEFINED
    rows = range(run.config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([texts.get(id, f"[PAD{id}]") for id in rows])
    writer.add_token_types([kinds.get(id, UNUSED) for id in rows])
