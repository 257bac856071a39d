#!/usr/bin/env bash
# transformers 5.24.0: a tokenizer_class in tokenizer_config.json can overrule tokenizer.json.
#
# A folder holds a tokenizer.json whose pre-tokenizer isolates every digit, as SmolLM2's does, and a
# tokenizer_config.json. With "PreTrainedTokenizerFast", AutoTokenizer gives the ids of the file. With "GPT2Tokenizer" it
# builds GPT-2's own pre-tokenizer around the file's vocabulary and merges: no error, no warning, other ids for the same
# text. transformers 4.57.6 gives the ids of the file in both cases. So a model that was trained with one version is fed
# other ids by the other. Whoever writes such a folder should name PreTrainedTokenizerFast.
#
# Seen, for the text "123" (where 257 is the token "123"):
#   4.57.6 {'file': [16, 17, 18], 'PreTrainedTokenizerFast': [16, 17, 18], 'GPT2Tokenizer': [16, 17, 18]}
#   5.24.0 {'file': [16, 17, 18], 'PreTrainedTokenizerFast': [16, 17, 18], 'GPT2Tokenizer': [257]}
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
export HF_HUB_OFFLINE=1
cat > "$tmp/look.py" <<'PY'
import json
import pathlib
import sys

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

transformers.logging.set_verbosity_error()
letters = {char: id for id, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
one, two, three = letters["1"], letters["2"], letters["3"]
vocab = letters | {"12": 256, "123": 257, "<|endoftext|>": 258}
tokenizer = Tokenizer(models.BPE(vocab, [("1", "2"), ("12", "3")]))
digits = pre_tokenizers.Digits(individual_digits=True)
tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
tokenizer.add_special_tokens(["<|endoftext|>"])
found = {"file": tokenizer.encode("123").ids}
for name in "PreTrainedTokenizerFast", "GPT2Tokenizer":
    folder = pathlib.Path(sys.argv[1], name)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    found[name] = transformers.AutoTokenizer.from_pretrained(folder)("123")["input_ids"]
print(transformers.__version__, found)
split, whole = [one, two, three], [257]
expected = dict.fromkeys(found, split)
if transformers.__version__ == "5.24.0":
    expected["GPT2Tokenizer"] = whole
assert found == expected, f"the behaviour has changed: {found}, not {expected}"
PY
for packages in "transformers==4.57.6 tokenizers==0.22.2" "transformers==5.24.0 tokenizers==0.23.3"; do
    python3 -m venv --clear "$tmp/venv"
    "$tmp/venv/bin/pip" install -q --disable-pip-version-check $packages
    "$tmp/venv/bin/python" "$tmp/look.py" "$tmp/folders"
done
echo "as described"
