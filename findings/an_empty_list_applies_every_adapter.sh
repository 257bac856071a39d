#!/usr/bin/env bash
# llama.cpp's server: a request with an empty list of LoRA adapters gets all of them.
#
# The server's documentation says of a request's field "lora": an adapter that is not in the list has scale 0. That holds
# for a list with an entry. An empty list counts as no list, and then every loaded adapter acts with the scale that it was
# loaded with, several of them at once. Whoever asks for the base model in this way gets the sum of all adapters, without
# a message. An entry with scale 0 has the effect that an empty list should have.
#
# Seen with xllamacpp 2026.10.11549 (llama.cpp's server as a Python package); each adapter alone, both and none have four
# different log probabilities of the next token:
#   no field: both
#   []: both
#   one with scale 1: the first
#   one with scale 0: none
set -euo pipefail
seen="no field: both
[]: both
one with scale 1: the first
one with scale 0: none"
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cat > "$tmp/look.py" <<'PY'
import pathlib
import sys

import gguf
import numpy as np
import xllamacpp

folder = pathlib.Path(sys.argv[1])
rng = np.random.default_rng(0)


def random(*shape):
    return rng.normal(0, 0.3, shape).astype(np.float32)


def write(name, tensors, adapter=False):
    writer = gguf.GGUFWriter(folder / f"{name}.gguf", "llama")
    if adapter:
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", 2)
    else:
        writer.add_context_length(64)
        writer.add_embedding_length(32)
        writer.add_block_count(1)
        writer.add_feed_forward_length(64)
        writer.add_head_count(2)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list([f"<{i}>" for i in range(50)])
        writer.add_token_scores([0.0] * 50)
        writer.add_token_types([gguf.TokenType.UNKNOWN] + [gguf.TokenType.NORMAL] * 49)
    for tensor, numbers in tensors.items():
        writer.add_tensor(tensor, numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


block = {f"blk.0.attn_{name}.weight": random(32, 32) for name in ("q", "k", "v", "output")}
block |= {"blk.0.ffn_gate.weight": random(64, 32), "blk.0.ffn_up.weight": random(64, 32)}
block |= {f"{name}_norm.weight": np.ones(32, np.float32) for name in ("blk.0.attn", "blk.0.ffn", "output")}
write("base", block | {"blk.0.ffn_down.weight": random(32, 64), "token_embd.weight": random(50, 32)})
for name in "one", "two":
    lora = {"blk.0.ffn_down.weight.lora_a": random(2, 64), "blk.0.ffn_down.weight.lora_b": random(32, 2)}
    write(name, lora, adapter=True)


def server(*names):
    params = xllamacpp.CommonParams()
    params.model.path = str(folder / "base.gguf")
    params.n_ctx = 64
    params.verbosity = 0
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(folder / f"{name}.gguf"), 1.0) for name in names]
    return xllamacpp.Server(params)


def answer(server, **more):
    asked = {"prompt": [5, 17, 33, 2, 41], "n_predict": 1, "temperature": 0.0, "n_probs": 1, "cache_prompt": False}
    (entry,) = server.handle_completions(asked | more)["choices"][0]["logprobs"]["content"]
    return entry["id"], round(entry["logprob"], 4)


meaning = {"none": (), "the first": ("one",), "the second": ("two",), "both": ("one", "two")}
meaning = {answer(server(*names)): words for words, names in meaning.items()}
assert len(meaning) == 4
loaded = server("one", "two")
print("no field:", meaning[answer(loaded)])
print("[]:", meaning[answer(loaded, lora=[])])
print("one with scale 1:", meaning[answer(loaded, lora=[{"id": 0, "scale": 1.0}])])
print("one with scale 0:", meaning[answer(loaded, lora=[{"id": 0, "scale": 0.0}])])
PY
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --disable-pip-version-check gguf==0.19.0 xllamacpp==2026.10.11549
"$tmp/venv/bin/python" "$tmp/look.py" "$tmp" 2> "$tmp/errors" | grep -E "^(no field|\[\]|one with)" | tee "$tmp/said" ||
    cat "$tmp/errors"
if [ "$(cat "$tmp/said")" != "$seen" ]; then
    echo "the behaviour has changed"
    exit 1
fi
echo "as described"
