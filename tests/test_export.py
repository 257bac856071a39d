"""What other libraries make of an export: transformers the masked model's logits, peft those of each module."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import eval as evaluation
import koff
import train
from data import export
from data.checkpoint import load, parse_config
from data.run import Run
from model import BlockMemory, Model
from test_train import CONFIG, flags, world  # noqa: F401 (a fixture)

KINDS = {
    "llama": {},
    "llama with biases": dict(attention_bias=True, mlp_bias=True),
    "qwen2": dict(model_type="qwen2"),
    "qwen3, untied": dict(model_type="qwen3", tie_word_embeddings=False),
}


@torch.enable_grad()
def finished(where, kind="llama", **more):
    """A finished run on another random base model whose LoRA has been moved away from zero by a high rate."""
    torch.manual_seed(2)
    config = CONFIG | KINDS[kind]
    model = Model(parse_config(config))
    names = {n: n if n.startswith("lm_head") else f"model.{n}" for n, _ in model.named_parameters()}
    state = {names[n]: torch.randn_like(p) * 0.2 + (p.ndim == 1) for n, p in model.named_parameters()}
    save_file(state, where / "base/model.safetensors")
    (where / "base/config.json").write_text(json.dumps(config))
    assert train.main(flags(where, lora_rate=0.05, **more)) == 0
    return where / "runs/one"


def masked(where, out):
    """tokens -> logits of the pretrained model under the run's final mask, and with a memory: the reference."""
    base, run = load(where / "base"), Run(out, "cpu", torch.float32)
    gates, mask = run.gates(base)
    z = gates.by_block({name: m.float() for name, m in mask.items()}, torch.float32)
    return run, lambda tokens, memory=None: base(tokens, gates=z, memory=memory)


def close(a, b):
    return torch.allclose(a, b, atol=1e-4 * max(1.0, b.abs().max().item()), rtol=0)


TOKENS = torch.randint(4000, (2, 20), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [dict(), dict(granularity="projection"), dict(gated="kv+mlp+o"), dict(gated="qkv")])
def test_transformers_and_peft_give_the_logits_of_the_run(world, kind, shape, capsys):  # noqa: F811
    if "gated" in shape and kind != "llama with biases":
        pytest.skip("one kind of model is enough for the other sets of gates")
    out = finished(world, kind, **shape, sparsity=0.02)
    run, reference = masked(world, out)
    assert evaluation.main(["export", str(out), "hf"]) == 0 and evaluation.main(["export", str(out), "peft"]) == 0
    assert "peft attaches keys and values to all blocks or none; 3 keys and values in 2 of 3" in capsys.readouterr().out
    theirs = AutoModelForCausalLM.from_pretrained(out / "export/hf", dtype=torch.float32)
    assert close(theirs(TOKENS).logits, reference(TOKENS)) and not close(
        theirs(TOKENS).logits, load(world / "base")(TOKENS)
    )
    state = load_file(out / "export/hf/model.safetensors")
    assert {n: t.shape for n, t in state.items()} == {
        n: t.shape for n, t in load_file(world / "base/model.safetensors").items()
    }
    assert AutoTokenizer.from_pretrained(out / "export/hf").encode("Der Kernel") == run.tokenizer.encode("Der Kernel")
    mask = {n[5:]: m.bool() for n, m in load_file(out / "gates.safetensors").items() if n.startswith("mask.")}
    assert (state["model.layers.1.self_attn.k_proj.weight"].abs().sum(1) > 0).tolist() == mask["k"][0].tolist()
    for name, lora in whole_modules(world, run, lora_only=True).items():
        adapted = PeftModel.from_pretrained(theirs, out / "export/peft" / name)
        found = adapted(TOKENS).logits
        assert close(found, reference(TOKENS, lora)) and not close(found, reference(TOKENS))
        theirs = adapted.unload()


def whole_modules(where, run, lora_only=False):
    """{domain: its memory for the masked model, which has all channels}."""
    base = load(where / "base")
    kept = koff.kept_channels(run.gates(base)[1], base.config, run.settings.first(len(base.layers))[0], "cpu")
    whole = {name: export.expand_memory(blocks, kept, base.config) for name, blocks in run.modules.items()}
    return {n: {i: BlockMemory(m.lora) if lora_only else m for i, m in blocks.items()} for n, blocks in whole.items()}


@torch.no_grad()
def test_keys_and_values_in_all_blocks_are_a_cartridge_and_a_merged_lora_makes_it_whole(world):  # noqa: F811
    out = finished(world, memory_blocks=-1)
    run, reference = masked(world, out)
    assert evaluation.main(["export", str(out), "peft"]) == 0
    assert evaluation.main(["export", str(out), "hf"]) == 0
    assert evaluation.main(["export", str(out), "hf", "--module", "french"]) == 0
    whole = whole_modules(world, run)["french"]
    kv = {i: BlockMemory({}, m.keys, m.values) for i, m in whole.items()}
    for base, memory in ("hf", kv), ("hf-french", whole):
        theirs = AutoModelForCausalLM.from_pretrained(out / "export" / base, dtype=torch.float32)
        adapted = PeftModel.from_pretrained(theirs, out / "export/peft/french-kv").eval()
        assert close(adapted(TOKENS).logits, reference(TOKENS, memory))
        assert not close(adapted(TOKENS).logits, theirs(TOKENS).logits)
    assert close(theirs(TOKENS).logits, reference(TOKENS, {i: BlockMemory(m.lora) for i, m in whole.items()}))


def test_an_export_that_differs_is_not_kept_and_a_folder_is_not_overwritten(world, capsys, monkeypatch):  # noqa: F811
    out, expand = finished(world), export.expand
    assert evaluation.main(["export", str(out), "hf", "--module", "dutch"]) == 2
    assert "no module 'dutch'" in capsys.readouterr().err

    def wrong(small, kept):
        dense = expand(small, kept)
        dense.layers[1].self_attn.v_proj.weight[0] += 0.1
        return dense

    for form in "hf", "peft":
        monkeypatch.setattr(export, "expand", wrong)
        assert evaluation.main(["export", str(out), form]) == 2
        err = capsys.readouterr().err
        assert "differs from the run by" in err and err.count("\n") == 1 and not (out / "export" / form).exists()
        monkeypatch.undo()
        assert evaluation.main(["export", str(out), form]) == 0
        assert evaluation.main(["export", str(out), form]) == 2 and "is there already" in capsys.readouterr().err
