#!/usr/bin/env bash
# peft 0.21.2 with transformers 5.24.0: a model takes adapter_names, which choose an adapter for each row of a batch, and
# ignores them.
#
# A PeftModel with LoRA honours adapter_names, and says so if a name does not exist. Two other models take the same
# argument in forward() without a word, even if no adapter has such a name:
#   - a model of transformers whose adapters came by its own load_adapter(): every row has the adapter loaded last
#   - a PeftModel with prompt learning (CARTRIDGE, PREFIX_TUNING): every row has the active adapter
# There forward() of transformers accepts any keyword. Only generate() of the first refuses the argument. So an evaluation
# by logits gives all rows to one adapter, and its numbers look well.
#
# Seen, for rows that ask for the adapters one, two (the base's own logits are base):
#   PeftModel, LORA: one two, a wrong name is refused
#   load_adapter of transformers: two two, a wrong name is not refused
#   PeftModel, CARTRIDGE: one one, a wrong name is not refused
set -euo pipefail
seen="PeftModel, LORA: one two, a wrong name is refused
load_adapter of transformers: two two, a wrong name is not refused
PeftModel, CARTRIDGE: one one, a wrong name is not refused"
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
export HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore
cat > "$tmp/look.py" <<'PY'
import pathlib
import sys

import torch
import transformers
from peft import CartridgeConfig, LoraConfig, PeftModel, get_peft_model

transformers.logging.set_verbosity_error()
folder = pathlib.Path(sys.argv[1])
config = transformers.LlamaConfig(
    vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
)
torch.manual_seed(0)
transformers.LlamaForCausalLM(config).save_pretrained(folder / "base")
lora = dict(target_modules=["down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
cartridge = dict(num_virtual_tokens=4, task_type="CAUSAL_LM")
for name in "one", "two":
    for kind, settings in ("lora", LoraConfig(**lora)), ("cartridge", CartridgeConfig(**cartridge)):
        model = get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(folder / "base"), settings)
        with torch.no_grad():
            for tensor in model.parameters():
                if tensor.requires_grad:
                    tensor.normal_(std=0.5)
        model.save_pretrained(folder / kind / name)


def base():
    return transformers.AutoModelForCausalLM.from_pretrained(folder / "base").eval()


def with_peft(kind, *names):
    model = PeftModel.from_pretrained(base(), folder / kind / names[0], adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(folder / kind / name, name)
    return model.eval()


text = torch.tensor([[1, 2, 3, 4]])
rows = text.expand(2, -1)


@torch.no_grad()
def look(label, model, kind):
    alone = {name: with_peft(kind, name)(text).logits[0] for name in ("one", "two")}
    alone["base"] = base()(text).logits[0]
    found = []
    for row in model(rows, adapter_names=["one", "two"]).logits:
        found += [name for name, logits in alone.items() if torch.allclose(row, logits, atol=1e-5)]
    try:
        model(rows, adapter_names=["one", "no such adapter"])
        refused = "is not refused"
    except ValueError:
        refused = "is refused"
    print(f"{label}: {' '.join(found)}, a wrong name {refused}")


look("PeftModel, LORA", with_peft("lora", "one", "two"), "lora")
model = base()
for name in "one", "two":
    model.load_adapter(folder / "lora" / name, adapter_name=name)
look("load_adapter of transformers", model.eval(), "lora")
look("PeftModel, CARTRIDGE", with_peft("cartridge", "one", "two"), "cartridge")
PY
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --disable-pip-version-check --no-deps torch==2.13.0
"$tmp/venv/bin/pip" install -q --disable-pip-version-check peft==0.21.2 transformers==5.24.0
"$tmp/venv/bin/python" "$tmp/look.py" "$tmp/folders" 2> "$tmp/errors" | tee "$tmp/said" || cat "$tmp/errors"
if [ "$(cat "$tmp/said")" != "$seen" ]; then
    echo "the behaviour has changed"
    exit 1
fi
echo "as described"
