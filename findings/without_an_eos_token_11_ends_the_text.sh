#!/usr/bin/env bash
# llama.cpp: in a GGUF without an end-of-text token, token 11 of a byte-level BPE ends the text.
#
# tokenizer.ggml.eos_token_id is optional, and the file of a model that has no such token lacks it. llama.cpp then takes a
# default by the kind of tokenizer: 11 for "gpt2", the kind of every byte-level BPE. That is a token like any other: a
# comma in the vocabularies of GPT-2, Llama 3 and Qwen 2, which begin with the printable bytes. Where the model writes a
# comma, the text ends, and the server says that the model has stopped by itself. Whoever has no such token must name one
# that the model never writes.
#
# Seen with xllamacpp 2026.10.11549 (llama.cpp's server as a Python package), on a model whose greedy text is the tokens
# 9, 10, 11, 12 and so on, with six of them asked for:
#   no eos: <9><10><11>, stop
#   eos 40: <9><10><11><12><13><14>, length
set -euo pipefail
seen="no eos: <9><10><11>, stop
eos 40: <9><10><11><12><13><14>, length"
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cat > "$tmp/look.py" <<'PY'
import pathlib
import sys

import gguf
import numpy as np
import xllamacpp

folder = pathlib.Path(sys.argv[1])
V = 64
ONES = np.ones(V, np.float32)


def text(name, eos):
    """Greedy text behind token 8, and why it ended."""
    path = folder / f"{name}.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(V)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"<{i}>" for i in range(V)])
    writer.add_token_types([gguf.TokenType.NORMAL] * V)
    writer.add_token_merges(["< 1"])
    if eos is not None:
        writer.add_eos_token_id(eos)
    # The block adds nothing. Each token has a direction of its own, and the output matrix takes it to the next token.
    tensors = {"token_embd.weight": np.eye(V, dtype=np.float32), "output_norm.weight": ONES}
    tensors["output.weight"] = np.roll(np.eye(V, dtype=np.float32), 1, axis=0)
    for part in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        tensors[f"blk.0.{part}.weight"] = np.zeros((V, V), np.float32)
    for part in ("attn_norm", "ffn_norm"):
        tensors[f"blk.0.{part}.weight"] = ONES
    for tensor, numbers in tensors.items():
        writer.add_tensor(tensor, numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx = 64
    params.verbosity = 0
    asked = {"prompt": [8], "n_predict": 6, "temperature": 0.0}
    (choice,) = xllamacpp.Server(params).handle_completions(asked)["choices"]
    return f"{choice['text']}, {choice['finish_reason']}"


print("no eos:", text("none", None))
print("eos 40:", text("some", 40))
PY
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --disable-pip-version-check gguf==0.19.0 xllamacpp==2026.10.11549
"$tmp/venv/bin/python" "$tmp/look.py" "$tmp" 2> "$tmp/errors" | grep -E "^(no eos|eos 40)" | tee "$tmp/said" ||
    cat "$tmp/errors"
if [ "$(cat "$tmp/said")" != "$seen" ]; then
    echo "the behaviour has changed"
    exit 1
fi
echo "as described"
