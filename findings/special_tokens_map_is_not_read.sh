#!/usr/bin/env bash
# transformers: special_tokens_map.json and added_tokens.json do not count once tokenizer_config.json has a field
# added_tokens_decoder.
#
# Model folders hold up to four files that name special tokens. Tools and people edit the short ones. The field
# added_tokens_decoder, which transformers writes into every tokenizer_config.json, switches two of them off without a
# word: an end-of-text token that special_tokens_map.json names does not exist, its text is spelt out in many ids, and a
# generation that waits for it never ends. Without that field the same two files are read, and add the token.
#
# Seen, with transformers 4.57.6 and 5.24.0 alike:
#   without the field   eos_token '<|stop|>'  ids of 'a<|stop|>': 2
#   with the field      eos_token None        ids of 'a<|stop|>': 9
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
tokenizer = Tokenizer(models.BPE(letters, []))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.add_special_tokens(["<|user|>"])
flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
decoder = {"256": {"content": "<|user|>", **flags}}
found = {}
for name, more in ("without the field", {}), ("with the field", {"added_tokens_decoder": decoder}):
    folder = pathlib.Path(sys.argv[1], name)
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **more}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|stop|>"}))
    (folder / "added_tokens.json").write_text(json.dumps({"<|stop|>": 257}))
    read = transformers.AutoTokenizer.from_pretrained(folder)
    found[name] = (read.eos_token, len(read("a<|stop|>")["input_ids"]))
print(transformers.__version__, found)
expected = {"without the field": ("<|stop|>", 2), "with the field": (None, 9)}
assert found == expected, f"the behaviour has changed: {found}, not {expected}"
PY
for packages in "transformers==4.57.6 tokenizers==0.22.2" "transformers==5.24.0 tokenizers==0.23.3"; do
    python3 -m venv --clear "$tmp/venv"
    "$tmp/venv/bin/pip" install -q --disable-pip-version-check $packages
    "$tmp/venv/bin/python" "$tmp/look.py" "$(mktemp -d -p "$tmp")"
done
echo "as described"
