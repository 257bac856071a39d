"""Logits against transformers, on tiny random models of awkward shapes and on a real one; what the loader refuses."""

import json
import os
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from data import BadInput
from data.checkpoint import load
from model import Cache, Memory, attend, causal_mask, generate

transformers = pytest.importorskip("transformers")

COMMON = dict(
    vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=512, eos_token_id=[3, 5],
)  # fmt: skip
LLAMA3 = dict(
    rope_type="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
)
NO = "<no such key>"


def make(folder, kind, tied=True, sharded=False, old_rope=False, **more):
    """Write a random model with transformers; norms and biases are random too. Returns it."""
    torch.manual_seed(0)
    name = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "mistral": "Mistral", "olmo2": "Olmo2"}[kind]
    shape = {**COMMON, "head_dim": 8} if kind == "qwen2" else COMMON  # its class takes hidden / heads
    config = getattr(transformers, f"{name}Config")(**{**shape, "tie_word_embeddings": tied, **more})
    model = getattr(transformers, f"{name}ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * (0.3 if p.ndim == 1 else 0.15) + (p.ndim == 1))
    model.save_pretrained(folder, max_shard_size="40KB" if sharded else "1GB")
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    rope = raw.get("rope_parameters")
    if old_rope and rope:  # the spelling of transformers 4
        del raw["rope_parameters"]
        raw["rope_theta"] = rope.pop("rope_theta")
        raw["rope_scaling"] = rope if rope["rope_type"] != "default" else None
        path.write_text(json.dumps(raw))
    return model


CASES = {
    "llama": dict(kind="llama"),
    "llama3-scaled": dict(kind="llama", rope_parameters={**LLAMA3, "rope_theta": 500000.0}, sharded=True),
    "llama3-scaled-old-keys": dict(kind="llama", rope_parameters={**LLAMA3, "rope_theta": 500000.0}, old_rope=True),
    "llama-untied-biases": dict(kind="llama", tied=False, attention_bias=True, mlp_bias=True),
    "qwen2": dict(kind="qwen2", tied=False, sharded=True),
    "qwen3": dict(kind="qwen3"),
    "qwen3-untied-old-keys": dict(kind="qwen3", tied=False, old_rope=True),
    "mistral": dict(kind="mistral", sliding_window=None),
    "mistral-window-at-the-context": dict(kind="mistral", sliding_window=512, tied=False),
    "mistral-window-above": dict(kind="mistral", sliding_window=4096, old_rope=True, sharded=True),
    "mistral-awkward": dict(
        kind="mistral", sliding_window=None, hidden_size=46, num_attention_heads=9, num_key_value_heads=3, head_dim=10
    ),
    "olmo2": dict(kind="olmo2"),
    "olmo2-untied-biases": dict(kind="olmo2", tied=False, attention_bias=True, sharded=True),
    "olmo2-awkward": dict(
        kind="olmo2", hidden_size=54, intermediate_size=77, num_attention_heads=9, num_key_value_heads=3,
        attention_bias=True, old_rope=True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(tmp_path, case):
    peer = make(tmp_path, **CASES[case])
    if CASES[case].get("sharded"):
        assert (tmp_path / "model.safetensors.index.json").exists()
    tokens = torch.randint(0, 97, (2, 130))
    with torch.no_grad():
        assert (load(tmp_path)(tokens) - peer(tokens).logits).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["llama", "qwen3", "olmo2"])
def test_cached_decoding_equals_the_whole_text(tmp_path, kind):
    make(tmp_path, kind)
    model, tokens = load(tmp_path), torch.randint(0, 97, (2, 20))
    cache = Cache(20)
    parts = [model(tokens[:, a:b], cache=cache) for a, b in ((0, 9), (9, 10), (10, 17), (17, 20))]
    assert (torch.cat(parts, 1) - model(tokens)).abs().max() < 1e-5


def test_generate_stops_at_any_eos_and_never_samples_padding(tmp_path):
    peer = make(tmp_path, "llama")
    model, prompt = load(tmp_path), torch.randint(6, 97, (1, 7))
    ours = torch.cat([t for t in generate(model, prompt, 30, 97)])
    theirs = peer.generate(prompt, max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=0)[0, 7:]
    assert ours.tolist() == theirs.tolist()
    stop = ours[4].item()
    until = [t.item() for t in generate(model, prompt, 30, 97, eos=(1, stop))]
    assert until == ours.tolist()[: ours.tolist().index(stop) + 1]
    draw = torch.Generator().manual_seed(0)
    drawn = [t for t in generate(model, prompt.expand(8, -1), 40, 20, temperature=3.0, generator=draw)]
    assert torch.cat(drawn).max() < 20
    nucleus = torch.cat([t for t in generate(model, prompt, 20, 97, temperature=1.0, top_p=1e-9, generator=draw)])
    assert nucleus.tolist() == ours[:20].tolist()


def test_a_prefix_as_memory_equals_running_the_prefix(tmp_path):
    for kind in ("llama", "qwen3", "olmo2"):
        make(tmp_path / kind, kind)
        model, tokens = load(tmp_path / kind), torch.randint(0, 97, (2, 40))
        tokens[1, :12] = tokens[0, :12]
        cache = Cache(0)
        model(tokens[:1, :12], cache=cache)
        memory = {i: Memory({}, k[0], v[0]) for i, (k, v) in cache.layers.items()}
        expected = model(tokens)[:, 12:]
        assert (model(tokens[:, 12:], memories=memory) - expected).abs().max() < 1e-5
        cached = Cache(28)  # the memory also stands at the start of a cache
        parts = [model(tokens[:, a:b], memories=memory, cache=cached) for a, b in ((12, 30), (30, 31), (31, 40))]
        assert (torch.cat(parts, 1) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("T,S", [(7, 7), (5, 12), (1, 9), (128, 140), (300, 345)])
def test_row_t_sees_what_it_may(T, S):
    """Against softmax(Q K^T / sqrt(hd)) V written out, with its gradient, for query heads that share keys."""
    q, k, v = (torch.randn(2, *n, 16, requires_grad=True) for n in ((6, T), (2, S), (2, S)))
    visible = torch.arange(S) <= torch.arange(T)[:, None] + S - T  # row t sees the first S - T + t + 1 keys
    keys, values = (x.repeat_interleave(3, dim=1) for x in (k, v))  # query head h reads key-value head h // (H / G)
    scores = (q @ keys.mT / 4).masked_fill(~visible, -torch.inf)
    expected = scores.softmax(-1) @ values
    ours = attend(q, k, v, causal_mask(T, S, like=q))
    assert (ours - expected).abs().max() < 1e-5
    weight = torch.randn(2, 6, T, 16)
    for a, b in zip(*(torch.autograd.grad(y, (q, k, v), weight) for y in (ours, expected)), strict=True):
        assert (a - b).abs().max() < 1e-4


REFUSED = [
    ({"model_type": "mamba"}, "model_type 'mamba' is not implemented"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "RoPE scaling 'yarn'"),
    ({"layer_types": ["sliding_attention"] * 3}, "layer_types other than full_attention"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "RoPE by layer type"),
    ({"hidden_act": "gelu"}, "activation 'gelu'"),
]


KINDS = [
    ({"rms_norm_eps": None}, "rms_norm_eps is None"),
    ({"rms_norm_eps": "1e-6"}, "rms_norm_eps is '1e-6'"),
    ({"max_position_embeddings": None}, "max_position_embeddings is None"),
    ({"max_position_embeddings": "2048"}, "max_position_embeddings is '2048'"),
    ({"hidden_size": -48}, "hidden_size is -48"),
    ({"hidden_size": 48.5}, "hidden_size is 48.5"),
    ({"num_key_value_heads": 2.0}, "num_key_value_heads is 2.0"),
    ({"head_dim": "16"}, "head_dim is '16'"),
    ({"attention_bias": None}, "attention_bias is None"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
    ({"rope_parameters": None, "rope_theta": "x"}, "rope_theta is 'x'"),
    ({"rope_parameters": None, "rope_scaling": [1]}, "is not a valid config.json"),
    ({"eos_token_id": [[1]]}, "is not a valid config.json"),
]


@pytest.mark.parametrize("change,message", KINDS)
def test_a_field_of_another_kind_is_refused_by_name(tmp_path, change, message):
    make(tmp_path, "llama")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(BadInput, match=re.escape(message)):
        load(tmp_path)


@pytest.mark.parametrize("change,message", REFUSED)
def test_what_is_not_implemented_is_refused_by_name(tmp_path, change, message):
    make(tmp_path, "llama")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(BadInput, match=message):
        load(tmp_path)


@pytest.mark.parametrize("context,window", [(512, 511), (512, 8), (4097, NO), (131_072, 4096)])
def test_mistral_with_a_window_that_hides_something_is_refused(tmp_path, context, window):
    """A missing window is one of 4096 tokens."""
    make(tmp_path, "mistral", sliding_window=None)
    path = tmp_path / "config.json"
    raw = json.loads(path.read_text()) | {"max_position_embeddings": context, "sliding_window": window}
    path.write_text(json.dumps({key: value for key, value in raw.items() if value != NO}))
    with pytest.raises(BadInput) as said:
        load(tmp_path)
    assert str(said.value) == f"{path}: sliding-window attention is not implemented; choose a model without it."
    path.write_text(json.dumps({**raw, "sliding_window": context}))
    load(tmp_path)


def test_damaged_checkpoints(tmp_path):
    make(tmp_path, "llama")
    path = tmp_path / "model.safetensors"
    whole, state = path.read_bytes(), load_file(path)
    path.write_bytes(whole[:-100])
    with pytest.raises(BadInput, match="truncated"):
        load(tmp_path)
    save_file({**state, "model.norm.weight": torch.ones(7)}, path)
    with pytest.raises(BadInput, match=r"model.norm.weight has shape \[7\]"):
        load(tmp_path)
    save_file({**state, "model.extra": torch.ones(7)}, path)
    with pytest.raises(BadInput, match=r"holds model.extra"):
        load(tmp_path)
    save_file({k: v for k, v in state.items() if k != "model.norm.weight"}, path)
    with pytest.raises(BadInput, match=r"1 tensors are missing, model.norm.weight"):
        load(tmp_path)
    save_file({**state, "lm_head.weight": state["model.embed_tokens.weight"] + 1}, path)
    with pytest.raises(BadInput, match="differs from the embedding"):
        load(tmp_path)
    path.unlink()
    with pytest.raises(BadInput, match="does not exist"):
        load(tmp_path)


def test_the_end_of_a_turn_may_stand_in_the_generation_config(tmp_path):
    peer = make(tmp_path, "llama")
    peer.generation_config.eos_token_id = [5, 42]
    peer.generation_config.save_pretrained(tmp_path)
    assert load(tmp_path).config.eos_token_ids == (3, 5, 42)
    for wrong in ("x", [[3]], None, {"eos_token_id": "end"}, {"eos_token_id": [[1]]}, {"eos_token_id": [None]}):
        (tmp_path / "generation_config.json").write_text(json.dumps(wrong))
        with pytest.raises(BadInput, match=r"is not a valid generation_config\.json"):
            load(tmp_path)
    (tmp_path / "generation_config.json").write_text(100_000 * "[")
    with pytest.raises(BadInput, match=r"is not a valid generation_config\.json"):
        load(tmp_path)


def test_a_tied_matrix_by_its_other_name_and_a_single_file_beside_an_index(tmp_path):
    peer, tokens = make(tmp_path, "llama"), torch.randint(0, 97, (1, 12))
    state = load_file(tmp_path / "model.safetensors")
    state["lm_head.weight"] = state.pop("model.embed_tokens.weight")  # what safetensors' save_model may leave
    save_file(state, tmp_path / "model.safetensors")
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with torch.no_grad():
        assert (load(tmp_path)(tokens) - peer(tokens).logits).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64])
def test_weights_that_are_no_floating_point_numbers_are_refused(tmp_path, dtype):
    make(tmp_path, "llama")
    state = load_file(tmp_path / "model.safetensors")
    try:
        save_file({**state, "model.norm.weight": torch.ones(48).to(dtype)}, tmp_path / "model.safetensors")
    except KeyError:
        pytest.skip(f"this version of safetensors has no {dtype}")
    with pytest.raises(BadInput, match=r"model\.norm\.weight is .* not floating point"):
        load(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(tmp_path, value):
    make(tmp_path, "llama")
    state = load_file(tmp_path / "model.safetensors")
    state["model.norm.weight"][7] = value
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(BadInput, match=r"model\.norm\.weight has numbers that are NaN or infinite"):
        load(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_weights_of_any_floating_point_kind_are_read(tmp_path, dtype):
    make(tmp_path, "llama")
    state = load_file(tmp_path / "model.safetensors")
    norm = state["model.norm.weight"].to(dtype)
    save_file({**state, "model.norm.weight": norm}, tmp_path / "model.safetensors")
    assert torch.equal(load(tmp_path).norm.weight, norm.float())


def test_a_weight_beyond_float32_is_refused(tmp_path):
    make(tmp_path, "llama")
    state = load_file(tmp_path / "model.safetensors")
    save_file(
        {**state, "model.norm.weight": torch.full((48,), 1e300, dtype=torch.float64)}, tmp_path / "model.safetensors"
    )
    with pytest.raises(BadInput, match="NaN or infinite"):
        load(tmp_path)


def test_a_tensor_that_two_shards_hold_is_refused(tmp_path):
    make(tmp_path, "llama", sharded=True)
    first, second = sorted(tmp_path.glob("model-*.safetensors"))[:2]
    name, tensor = max(load_file(first).items())
    save_file({**load_file(second), name: tensor + 1}, second)
    with pytest.raises(BadInput, match=f"holds {name}, which was there before"):
        load(tmp_path)


INDEXES = ["", "[]", "null", 100_000 * "[", '{"weight_map": [1]}', '{"weight_map": {"x": 3}}']
UNTRUSTED = ["../secret.safetensors", "..", "", "/tmp/x.safetensors", "a\\b.safetensors", "\ud800.safetensors", "x.bin"]


@pytest.mark.parametrize("text", INDEXES, ids=lambda text: text[:20])
def test_an_index_that_is_none_is_refused(tmp_path, text):
    make(tmp_path, "llama")
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(BadInput, match="no valid weight_map"):
        load(tmp_path)


@pytest.mark.parametrize("name", UNTRUSTED)
def test_a_shard_outside_the_folder_or_without_a_plain_name_is_refused(tmp_path, name):
    make(tmp_path, "llama")
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(BadInput, match="not a plain"):
        load(tmp_path)


FILES = ["config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json"]


@pytest.mark.parametrize("name", FILES)
def test_a_folder_in_place_of_a_file_is_refused(tmp_path, name):
    make(tmp_path, "llama")
    (tmp_path / ("model.safetensors" if "index" in name else name)).unlink()
    (tmp_path / name).mkdir()
    with pytest.raises(BadInput, match=name):
        load(tmp_path)


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "model").write_text("")
    with pytest.raises(BadInput, match="Not a directory"):
        load(tmp_path / "model")


def test_smollm2(tmp_path):
    folder = os.environ.get("KOFF_SMOLLM2")
    if not folder:
        pytest.skip("KOFF_SMOLLM2 does not name the folder of a SmolLM2 checkpoint")
    peer = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model = load(folder)
    tokens = torch.randint(0, 49152, (1, 200), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (model(tokens) - peer(tokens).logits).abs().max() < 1e-4
    prompt = tokens[:, :16]
    theirs = peer.generate(prompt, max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0)[0, 16:]
    assert torch.cat(list(generate(model, prompt, 64, 49152))).tolist() == theirs.tolist()
