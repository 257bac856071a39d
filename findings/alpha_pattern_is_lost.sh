#!/usr/bin/env bash
# llama.cpp: an adapter of peft whose ranks differ from layer to layer has another strength there.
#
# peft 0.21.2 multiplies the LoRA of a layer by its alpha / its rank, and rank_pattern and alpha_pattern may give each layer
# its own. convert_lora_to_gguf.py writes lora_alpha only, without a warning, and llama.cpp divides that by the rank of
# each matrix. An adapter with alpha = rank in every layer, so scale 1 everywhere, is too strong in every layer of a
# smaller rank: by the factor largest rank / own rank. Whoever fills the smaller ranks with zeros has the same product and
# one rank, which every program reads alike.
#
# The converter is the one in the source of llama-cpp-python 0.3.36; xllamacpp 2026.10.11549 runs llama.cpp on a CPU.
#
# Seen, for rank 2 in the lower layer and 8 in the upper one (o_proj is zero, so only the MLP acts):
#   peft's scales: 1 1
#   llama.cpp has the log probabilities of peft with scales 4 1
set -euo pipefail
seen="peft's scales: 1 1
llama.cpp has the log probabilities of peft with scales 4 1"
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
export HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore
cat > "$tmp/make.py" <<'PY'
import pathlib
import sys

import gguf
import torch
import transformers
from peft import LoraConfig, get_peft_model

folder = pathlib.Path(sys.argv[1])
config = transformers.LlamaConfig(
    vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
    architectures=["LlamaForCausalLM"],
)  # fmt: skip
torch.manual_seed(0)
model = transformers.LlamaForCausalLM(config)
with torch.no_grad():
    for name, tensor in model.named_parameters():
        if "norm" not in name:
            tensor.normal_(std=0.0 if "o_proj" in name else 0.3)
model.save_pretrained(folder / "base")

# The base for llama.cpp. Tokens have no text: the prompt is given as ids.
writer = gguf.GGUFWriter(folder / "base.gguf", "llama")
writer.add_context_length(64)
writer.add_embedding_length(32)
writer.add_block_count(2)
writer.add_feed_forward_length(64)
writer.add_head_count(2)
writer.add_layer_norm_rms_eps(config.rms_norm_eps)
writer.add_tokenizer_model("llama")
writer.add_tokenizer_pre("default")
writer.add_token_list([f"<{i}>" for i in range(50)])
writer.add_token_scores([0.0] * 50)
writer.add_token_types([gguf.TokenType.UNKNOWN] + [gguf.TokenType.NORMAL] * 49)
names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
for name, tensor in model.state_dict().items():
    writer.add_tensor(names.get_name(name, try_suffixes=[".weight"]), tensor.numpy())
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()

lower = {"layers.0.mlp.down_proj": 2}
settings = LoraConfig(
    r=8, lora_alpha=8, rank_pattern=lower, alpha_pattern=lower, target_modules=["down_proj"],
    init_lora_weights=False, task_type="CAUSAL_LM",
)  # fmt: skip
adapted = get_peft_model(model, settings)
with torch.no_grad():
    for tensor in adapted.parameters():
        if tensor.requires_grad:
            tensor.normal_(std=0.2)
adapted.save_pretrained(folder / "lora")
PY
cat > "$tmp/look.py" <<'PY'
import pathlib
import sys

import torch
import transformers
import xllamacpp
from peft import PeftModel

folder = pathlib.Path(sys.argv[1])
prompt = [5, 17, 33, 2, 41]
params = xllamacpp.CommonParams()
params.model.path = str(folder / "base.gguf")
params.n_ctx = 64
params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(folder / "lora.gguf"), 1.0)]
server = xllamacpp.Server(params)
answer = server.handle_completions({"prompt": prompt, "max_tokens": 1, "temperature": 0.0, "logprobs": 50})
found = torch.empty(50)
for entry in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
    found[entry["id"]] = entry["logprob"]

base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
adapted = PeftModel.from_pretrained(base, folder / "lora")
layers = [layer.mlp.down_proj for layer in adapted.base_model.model.model.layers]
scales = [layer.scaling["default"] for layer in layers]
print("peft's scales:", *[f"{scale:g}" for scale in scales])
for given in scales, [4.0, 1.0]:
    for layer, scale in zip(layers, given, strict=True):
        layer.scaling["default"] = scale
    with torch.no_grad():
        expected = adapted(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
    if torch.allclose(found, expected, atol=0.01):
        print("llama.cpp has the log probabilities of peft with scales", *[f"{scale:g}" for scale in given])
PY
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --disable-pip-version-check --no-deps torch==2.13.0
"$tmp/venv/bin/pip" install -q --disable-pip-version-check peft==0.21.2 transformers==5.24.0 gguf==0.19.0 \
    xllamacpp==2026.10.11549
"$tmp/venv/bin/pip" download -q --disable-pip-version-check --no-deps --no-binary llama-cpp-python -d "$tmp" \
    llama-cpp-python==0.3.36
tar -xzf "$tmp"/llama_cpp_python-0.3.36.tar.gz -C "$tmp"
converter="$tmp/llama_cpp_python-0.3.36/vendor/llama.cpp/convert_lora_to_gguf.py"
run() { "$tmp/venv/bin/python" "$@" 2> "$tmp/errors" || { cat "$tmp/errors"; exit 1; }; }
run "$tmp/make.py" "$tmp"
run "$converter" --base "$tmp/base" "$tmp/lora" --outfile "$tmp/lora.gguf"
run "$tmp/look.py" "$tmp" | grep -E "^(peft|llama.cpp has)" | tee "$tmp/said"
if [ "$(cat "$tmp/said")" != "$seen" ]; then
    echo "the behaviour has changed"
    exit 1
fi
echo "as described"
