"""Some 170 variants of config.json beside transformers, on tiny random models: its numbers, or one sentence.

equal       both load it: the same logits, and the same gradient for a step of training
refused     neither loads it
not here    transformers loads it, model.py lacks something for it or the number means nothing
"""

import json
import os

import pytest
import torch
import torch.nn.functional as F

from data import BadInput
from data.checkpoint import load
from data.families import FAMILIES, parse_config, read_config
from test_model import LLAMA3, NO, make

transformers = pytest.importorskip("transformers")

ALL = ("llama", "qwen2", "qwen3", "mistral", "olmo2")
LLAMA, QWEN2, QWEN3, MISTRAL, OLMO2 = [(kind,) for kind in ALL]
QWEN = QWEN2 + QWEN3


def scaled(**more):
    """RoPE parameters of kind llama3, in which `more` is otherwise."""
    every = {**LLAMA3, "rope_theta": 5e4, **more}
    return {"rope_parameters": {key: value for key, value in every.items() if value != NO}}


def old(**more):
    """The spelling before transformers 5."""
    return {"rope_parameters": NO, **more}


def window(first, width=8, types=NO):
    return {"use_sliding_window": True, "max_window_layers": first, "sliding_window": width, "layer_types": types}


FULL = ["full_attention"] * 3
NESTED = {"full_attention": {"rope_type": "default", "rope_theta": 3e4}}

VARIANTS = [
    # What is left out, null or of another kind.
    (ALL, {}, "equal"),
    (LLAMA + QWEN + OLMO2, {"max_position_embeddings": NO}, "equal"),
    (MISTRAL, {"max_position_embeddings": NO, "sliding_window": None}, "equal"),
    (ALL, {"max_position_embeddings": 10}, "equal"),
    (ALL, {"max_position_embeddings": None}, "refused"),
    (ALL, {"max_position_embeddings": "512"}, "refused"),
    (ALL, {"max_position_embeddings": 0}, "not here"),
    (ALL, {"rms_norm_eps": NO}, "equal"),
    (ALL, {"rms_norm_eps": 0.5}, "equal"),
    (ALL, {"rms_norm_eps": None}, "refused"),
    (ALL, {"rms_norm_eps": "1e-6"}, "refused"),
    (ALL, {"rms_norm_eps": 1}, "refused"),
    (ALL, {"tie_word_embeddings": NO}, "refused"),  # not tied, then, and this file has one matrix only
    (ALL, {"tie_word_embeddings": None}, "refused"),
    (ALL, {"tie_word_embeddings": 1}, "refused"),
    (LLAMA + QWEN3 + OLMO2, {"attention_bias": NO}, "equal"),
    (LLAMA + QWEN3 + OLMO2, {"attention_bias": None}, "refused"),
    (LLAMA + QWEN3 + OLMO2, {"attention_bias": True}, "refused"),  # the file has no biases
    (QWEN2, {"attention_bias": False}, "equal"),
    (QWEN2 + MISTRAL, {"attention_bias": None}, "equal"),
    (MISTRAL, {"attention_bias": True}, "equal"),
    (LLAMA, {"mlp_bias": NO}, "equal"),
    (LLAMA, {"mlp_bias": None}, "refused"),
    (LLAMA, {"mlp_bias": True}, "refused"),
    (QWEN + MISTRAL + OLMO2, {"mlp_bias": True}, "equal"),
    (QWEN + MISTRAL + OLMO2, {"mlp_bias": "x"}, "equal"),
    (ALL, {"qk_norm": "x", "use_qk_norm": False, "post_norm": False, "norm_after": True}, "equal"),  # of the family
    (ALL, {"hidden_act": NO}, "equal"),
    (ALL, {"hidden_act": "swish"}, "equal"),
    (ALL, {"hidden_act": None}, "refused"),
    (ALL, {"hidden_act": "SiLU"}, "refused"),
    (ALL, {"hidden_act": ["silu"]}, "refused"),
    (ALL, {"hidden_act": "gelu"}, "not here"),
    # Sizes.
    (ALL, {"hidden_size": -48}, "refused"),
    (ALL, {"hidden_size": 48.5}, "refused"),
    (ALL, {"hidden_size": 47}, "refused"),
    (ALL, {"hidden_size": 10**30}, "refused"),
    (ALL, {"vocab_size": 96}, "refused"),
    (ALL, {"vocab_size": 98}, "refused"),
    (ALL, {"vocab_size": True}, "refused"),
    (ALL, {"intermediate_size": 0}, "refused"),
    (ALL, {"intermediate_size": "80"}, "refused"),
    (ALL, {"num_hidden_layers": 4, "layer_types": NO}, "refused"),
    (ALL, {"num_hidden_layers": 3.0}, "refused"),
    (ALL, {"num_attention_heads": None}, "refused"),
    (ALL, {"num_attention_heads": 5}, "refused"),
    (ALL, {"num_attention_heads": 0}, "refused"),
    (ALL, {"num_key_value_heads": 4}, "refused"),
    (ALL, {"num_key_value_heads": None}, "refused"),  # as many as there are heads, then
    (ALL, {"num_key_value_heads": NO}, "refused"),
    (ALL, {"head_dim": 12}, "refused"),
    (ALL, {"head_dim": "16"}, "refused"),
    (QWEN + MISTRAL + OLMO2, {"head_dim": None}, "refused"),
    (MISTRAL + OLMO2, {"head_dim": NO}, "refused"),  # 48 / 6, then
    (QWEN2, {"head_dim": NO}, "equal"),
    # RoPE in the new spelling and in the old one, and both at once: the older one counts.
    (ALL, {"rope_parameters": NO}, "equal"),
    (ALL, {"rope_parameters": None}, "equal"),
    (ALL, {"rope_parameters": {}}, "equal"),
    (ALL, {"rope_parameters": []}, "refused"),
    (ALL, {"rope_parameters": False}, "refused"),
    (ALL, {"rope_parameters": {"rope_theta": 3e4}}, "equal"),
    (ALL, {"rope_parameters": {"rope_theta": 30000}}, "equal"),
    (ALL, {"rope_parameters": {"rope_theta": None}}, "refused"),
    (ALL, {"rope_parameters": {"rope_theta": "1e4"}}, "refused"),
    (ALL, {"rope_parameters": {"rope_theta": 10**400}}, "refused"),
    (ALL, {"rope_parameters": {"rope_theta": 0}}, "not here"),
    (ALL, {"rope_parameters": {"rope_type": "default"}, "rope_theta": 7e4}, "equal"),
    (ALL, {"rope_parameters": {"rope_type": None}}, "refused"),
    (ALL, {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "not here"),
    (ALL, {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "not here"),
    (ALL, {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "not here"),
    (ALL, {"rope_parameters": {"rope_type": "linear"}}, "refused"),
    (ALL, old(rope_theta=5e4), "equal"),
    (ALL, old(rope_theta=None), "refused"),
    (ALL, old(rope_theta=5e4, rope_scaling=None), "equal"),
    (ALL, old(rope_theta=5e4, rope_scaling=LLAMA3), "equal"),
    (ALL, old(rope_theta=5e4, rope_scaling={**LLAMA3, "rope_theta": 3e4}), "equal"),
    (ALL, old(rope_scaling={"type": "linear", "factor": 1}), "equal"),
    (ALL, old(rope_scaling=[LLAMA3]), "refused"),
    (ALL, old(rope_scaling="llama3"), "refused"),
    (ALL, {"rope_scaling": LLAMA3}, "equal"),
    (ALL, {"rope_scaling": {}}, "equal"),
    (ALL, scaled(), "equal"),
    (ALL, scaled(factor=1, high_freq_factor=8), "equal"),
    (ALL, scaled(factor=0.5), "equal"),
    (ALL, scaled(factor=None), "refused"),
    (ALL, scaled(factor="8"), "refused"),
    (ALL, scaled(factor=NO), "refused"),
    (ALL, scaled(factor=10**400), "refused"),
    (ALL, scaled(low_freq_factor=5.0), "not here"),  # above the high one: nothing lies between
    (ALL, scaled(low_freq_factor=0), "refused"),
    (ALL, scaled(original_max_position_embeddings=NO), "equal"),
    (ALL, scaled(original_max_position_embeddings=None), "refused"),
    (ALL, {**scaled(), "original_max_position_embeddings": 16}, "equal"),  # beside it: that is what counts
    (ALL, {**scaled(), "original_max_position_embeddings": None}, "refused"),
    (QWEN, {"rope_parameters": NESTED}, "refused"),
    (LLAMA, {"rope_parameters": NESTED}, "not here"),
    (QWEN, {"rope_parameters": {"full_attention": None}}, "refused"),
    (ALL, {"partial_rotary_factor": None}, "equal"),
    (ALL, {"partial_rotary_factor": 1.0}, "equal"),
    (ALL, {"partial_rotary_factor": 0.5}, "not here"),
    (ALL, scaled(partial_rotary_factor=1), "equal"),
    (ALL, scaled(partial_rotary_factor=None), "refused"),
    (ALL, scaled(partial_rotary_factor=0.5), "refused"),
    # Windows and kinds of layers.
    (QWEN, {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 0}, "equal"),
    (QWEN, window(0), "not here"),
    (QWEN, window(-1), "not here"),
    (QWEN, window(2), "not here"),
    (QWEN, window(3), "equal"),
    (QWEN, window(NO), "equal"),
    (QWEN, window(0, width=None), "equal"),
    (QWEN, window(0, types=None), "not here"),
    (QWEN, window(0, types=FULL), "equal"),
    (QWEN, window(0, types=[*FULL[1:], "sliding_attention"]), "not here"),
    (QWEN, window(None), "refused"),
    (QWEN, window(3, width="8"), "refused"),
    (QWEN, {"use_sliding_window": None}, "refused"),
    (QWEN, {"max_window_layers": 1.5}, "refused"),
    (LLAMA + OLMO2, {"sliding_window": 8, "use_sliding_window": True}, "equal"),  # these have none
    (MISTRAL, {"sliding_window": None}, "equal"),
    (MISTRAL, {"sliding_window": NO}, "equal"),  # 4096, then
    (MISTRAL, {"sliding_window": NO, "max_position_embeddings": 4096}, "equal"),
    (MISTRAL, {"sliding_window": NO, "max_position_embeddings": 4097}, "not here"),
    (MISTRAL, {"sliding_window": 512}, "equal"),  # as long as the context
    (MISTRAL, {"sliding_window": 511}, "not here"),
    (MISTRAL, {"sliding_window": 8}, "not here"),
    (MISTRAL, {"sliding_window": 8, "use_sliding_window": False, "max_window_layers": 3}, "not here"),  # Qwen's
    (MISTRAL, {"sliding_window": 8, "layer_types": FULL}, "not here"),
    (MISTRAL, {"sliding_window": "8"}, "refused"),
    (MISTRAL, {"sliding_window": 8.0}, "refused"),
    (ALL, {"layer_types": FULL}, "equal"),
    (ALL, {"layer_types": []}, "refused"),
    (ALL, {"layer_types": FULL[1:]}, "refused"),
    (ALL, {"layer_types": ["x"] * 3}, "refused"),
    (ALL, {"layer_types": [1, 2, 3]}, "refused"),
    (ALL, {"layer_types": "full_attention"}, "refused"),
    (QWEN, {"layer_types": ["chunked_attention"] * 3}, "refused"),
    # What changes no number, or every one.
    (ALL, {"eos_token_id": None}, "equal"),
    (ALL, {"eos_token_id": -1}, "equal"),
    (ALL, {"eos_token_id": "3"}, "refused"),
    (ALL, {"eos_token_id": True}, "refused"),
    (ALL, {"eos_token_id": [[3]]}, "refused"),
    (ALL, {"eos_token_id": 10**30}, "not here"),
    (ALL, {"use_cache": False}, "equal"),
    (ALL, {"attention_dropout": 0.1}, "equal"),
    (LLAMA, {"pretraining_tp": 2}, "equal"),
    (ALL, {"dtype": NO, "torch_dtype": "bfloat16"}, "equal"),
    (ALL, {"dtype": NO}, "equal"),
    (ALL, {"architectures": None}, "equal"),
    (ALL, {"quantization_config": {}}, "refused"),
    (ALL, {"per_layer_config": {"0": {"rms_norm_eps": 0.5}}}, "refused"),
    (ALL, {"configuration_files": ["config.4.0.json"]}, "refused"),
    (ALL, {"model_type": None}, "refused"),
    (ALL, {"model_type": ["llama"]}, "refused"),
    (ALL, {"model_type": "mamba"}, "refused"),
]  # fmt: skip

# The same with models of other shapes: what they are made with, then what is written into their config.json.
SHAPES = [
    (LLAMA + QWEN + OLMO2, {"num_key_value_heads": 6}, {"num_key_value_heads": None}, "equal"),
    (LLAMA + OLMO2, {"num_key_value_heads": 6}, {"num_key_value_heads": NO}, "equal"),
    (QWEN + MISTRAL, {"num_key_value_heads": 6}, {"num_key_value_heads": NO}, "refused"),  # 32, and 8
    (MISTRAL, {"num_attention_heads": 8, "num_key_value_heads": 8}, {"num_key_value_heads": NO}, "equal"),
    (LLAMA + MISTRAL + OLMO2, {"head_dim": 8}, {"head_dim": NO}, "equal"),
    (LLAMA + MISTRAL, {"head_dim": 8}, {"head_dim": None}, "equal"),
    (OLMO2, {"head_dim": 8}, {"head_dim": None}, "refused"),
    (QWEN3, {"head_dim": 128}, {"head_dim": NO}, "equal"),
    (QWEN3, {"head_dim": 128}, {"head_dim": None}, "refused"),
    (QWEN + MISTRAL + OLMO2, {"hidden_size": 46, "head_dim": 8}, {}, "equal"),
    (LLAMA, {"head_dim": 20}, {"num_attention_heads": 30, "num_key_value_heads": 10, "head_dim": 4}, "refused"),
    (QWEN2 + MISTRAL, {"head_dim": 20}, {"num_attention_heads": 30, "num_key_value_heads": 10, "head_dim": 4}, "equal"),
    (ALL, {"tied": False}, {"tie_word_embeddings": NO}, "equal"),
    (ALL, {"tied": False}, {"tie_word_embeddings": True}, "not here"),  # it has two different matrices
    (LLAMA + QWEN3 + OLMO2, {"attention_bias": True}, {}, "equal"),
    (LLAMA, {"mlp_bias": True}, {}, "equal"),
]  # fmt: skip

# The text of the file: what stands in place of its last brace, or all of it.
TEXTS = {
    ', "rms_norm_eps": 0.5}': "equal",  # twice: the last one counts
    ', "unknown": NaN}': "equal",
    ', "rms_norm_eps": NaN}': "not here",
    ', "rms_norm_eps": Infinity}': "not here",
    ', "rms_norm_eps": 1' + 400 * "0" + "}": "refused",
    ', "unknown": ' + 100_000 * "[" + 100_000 * "]" + "}": "refused",
    "}x": "refused",
}
WHOLE_TEXTS = ["", "null", "[]", "3", '"llama"', "{}", "\ufeff{}"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A function that makes each model once: (kind, shape) -> its folder."""
    folders = {}

    def of(kind, **shape):
        key = kind + json.dumps(shape)
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp(kind)
            make(folders[key], kind, **shape)
        return folders[key]

    return of


def write(folder, source, text):
    """A checkpoint with the weights of another and a config.json of its own."""
    os.symlink(source / "model.safetensors", folder / "model.safetensors")
    (folder / "config.json").write_text(text)


def changed(source, change):
    raw = json.loads((source / "config.json").read_text()) | change
    return json.dumps({key: value for key, value in raw.items() if value != NO})


def theirs(folder):
    """transformers' model; an error, too, where it would leave a weight at random."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    return model.eval()


def step(logits, weight, tokens):
    """The gradient that a step of training would take for one matrix."""
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    return torch.autograd.grad(loss, weight)[0]


def verdict(folder):
    """The word of the tables above. Fails where both load a model and differ, and where only we load one."""
    tokens = torch.randint(97, (1, 130), generator=torch.Generator().manual_seed(0))
    try:
        ours = load(folder)
    except BadInput as error:
        assert "\n" not in str(error)
        ours = None
    try:
        peer = theirs(folder)
        expected = peer(tokens).logits
    except Exception:
        return "refused" if ours is None else "loaded here only"
    if ours is None:
        return "not here"
    weight = ours.layers[0].self_attn.k_proj.weight.requires_grad_()
    logits = ours(tokens)
    gradient = step(logits, weight, tokens)
    expected_gradient = step(expected, peer.model.layers[0].self_attn.k_proj.weight, tokens)
    assert (logits - expected).abs().max() < 1e-4
    assert (gradient - expected_gradient).abs().max() < 1e-4 * expected_gradient.abs().max()
    return "equal"


def cases(table):
    """A parameter for each kind of model in each row of a table."""
    every = []
    for kinds, *row, expected in table:
        for kind in kinds:
            every.append(pytest.param(kind, *row, expected, id=f"{kind} {str(row)[:90]} {expected}"))
    return every


@pytest.mark.parametrize("kind,change,expected", cases(VARIANTS))
def test_a_config_gives_the_numbers_of_transformers_or_one_sentence(tmp_path, made, kind, change, expected):
    write(tmp_path, made(kind), changed(made(kind), change))
    assert verdict(tmp_path) == expected


@pytest.mark.parametrize("kind,shape,change,expected", cases(SHAPES))
def test_so_does_a_model_of_another_shape(tmp_path, made, kind, shape, change, expected):
    source = made(kind, **shape)
    write(tmp_path, source, changed(source, change))
    assert verdict(tmp_path) == expected


@pytest.mark.parametrize("end", TEXTS, ids=lambda end: end[:30])
def test_so_does_an_odd_text(tmp_path, made, end):
    text = changed(made("llama"), {})
    write(tmp_path, made("llama"), text[:-1] + end)
    assert verdict(tmp_path) == TEXTS[end]


@pytest.mark.parametrize("text", WHOLE_TEXTS)
def test_what_is_no_config_is_refused(tmp_path, made, text):
    write(tmp_path, made("llama"), text)
    assert verdict(tmp_path) == "refused"


@pytest.mark.parametrize("kind", FAMILIES)
def test_what_a_config_leaves_out_is_as_in_the_class_of_transformers(kind):
    sizes = dict(
        vocab_size=97, hidden_size=256, intermediate_size=80, num_hidden_layers=3, num_attention_heads=64,
        sliding_window=None,
    )  # fmt: skip
    ours, theirs = parse_config({"model_type": kind, **sizes}), transformers.CONFIG_MAPPING[kind](**sizes)
    for name in ("num_key_value_heads", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.head_dim == getattr(theirs, "head_dim", 256 // 64)
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.o_bias == getattr(theirs, "attention_bias", False)
    assert ours.mlp_bias == getattr(theirs, "mlp_bias", False)


# Where transformers would be of no help: it takes hours, or does not know the field.


@pytest.mark.parametrize("blocks", [10**9, 10**30])
def test_a_mistyped_number_of_blocks_is_not_built(tmp_path, made, blocks):
    write(tmp_path, made("llama"), changed(made("llama"), {"num_hidden_layers": blocks, "layer_types": None}))
    with pytest.raises(BadInput, match=f"{blocks} blocks"):
        read_config(tmp_path)


KEPT = [None, 3, "xyz", [1, 2, 3], [None], [None] * 4, [{"q": -1}, None, None], [{"q": "3"}, None, None]]


@pytest.mark.parametrize("kept", KEPT, ids=str)
def test_channels_left_of_another_kind_are_refused(tmp_path, made, kept):
    write(tmp_path, made("llama"), changed(made("llama"), {"koff_kept": kept}))
    with pytest.raises(BadInput):
        load(tmp_path)
