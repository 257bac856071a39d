"""What other libraries make of an export: transformers the masked model's logits, peft those of each module."""

import copy
import json
import shutil
from dataclasses import dataclass

import peft
import pytest
import torch
import transformers
from packaging import version
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import eval as evaluation
import koff
import train
from data import export, fast
from data.checkpoint import load, save_module
from data.families import parse_config
from data.run import Run
from data.settings import LORA
from model import Memory, Model, generate, matrix_name
from test_train import CONFIG, flags, world  # noqa: F401 (a fixture)

KINDS = {
    "llama": {},
    "llama with biases": dict(attention_bias=True, mlp_bias=True),
    "qwen2": dict(model_type="qwen2"),
    "qwen3, untied": dict(model_type="qwen3", tie_word_embeddings=False),
    "mistral": dict(model_type="mistral", sliding_window=None),
    "olmo2": dict(model_type="olmo2"),
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
    if kind == "olmo2":
        more |= dict(repair="none", solve_tokens=0)  # there nothing has a closed form
    assert train.main(flags(where, lora_rate=0.05, **more)) == 0
    return where / "runs/one"


def masked(where, out):
    """tokens -> logits of the pretrained model under the run's final mask, and with a module: the reference. What is
    open of o_proj and down is the backbone's, in which it may have been repaired."""
    base, run = load(where / "base"), Run(out, "cpu", torch.float32)
    gates, mask = run.gates(base)
    for i, index in koff.kept_channels(mask, base.config, gates.first_block, "cpu").items():
        whole, small = base.layers[i], run.backbone.layers[i]
        whole.self_attn.o_proj.weight[index["o"]] = small.self_attn.o_proj.weight
        whole.mlp.down_proj.weight[index["down"][:, None], index["neuron"]] = small.mlp.down_proj.weight
    z = gates.by_block({name: m.float() for name, m in mask.items()}, torch.float32)
    return run, lambda tokens, module=None: base(tokens, z=z, memories=module)


def close(a, b):
    return torch.allclose(a, b, atol=1e-4 * max(1.0, b.abs().max().item()), rtol=0)


TOKENS = torch.randint(4000, (2, 20), generator=torch.Generator().manual_seed(3))


SHAPES = [dict(lora="kv+mlp"), dict(granularity="projection"), dict(gated="kv+mlp+o", repair="none"), dict(gated="qkv")]


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
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


def test_transformers_continues_a_text_with_the_tokenizer_of_the_export(world):  # noqa: F811
    out = finished(world)
    assert evaluation.main(["export", str(out), "hf"]) == 0
    run = Run(out, "cpu", torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(out / "export/hf", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(out / "export/hf")
    given = tokenizer("Der Kernel", return_tensors="pt")
    found = theirs.generate(**given, max_new_tokens=12, do_sample=False)[0]
    prompt = torch.tensor([run.tokenizer.encode("Der Kernel")])
    ours = list(generate(run.backbone, prompt, 12, run.tokenizer.vocab_size, run.backbone.config.eos_token_ids))
    expected = prompt[0].tolist() + torch.cat(ours).tolist()
    assert found.tolist() == expected and tokenizer.decode(found) == run.tokenizer.decode(expected)
    assert tokenizer.eos_token_id in run.backbone.config.eos_token_ids


def whole_modules(where, run, lora_only=False):
    """{domain: its module for the masked model, which has all channels}."""
    base = load(where / "base")
    gates, mask = run.gates(base)
    kept = koff.kept_channels(mask, base.config, gates.first_block, "cpu")
    whole = {name: export.expand_memories(module, kept, base.config) for name, module in run.modules.items()}
    return {n: {i: Memory(m.lora) if lora_only else m for i, m in module.items()} for n, module in whole.items()}


@torch.no_grad()
def test_keys_and_values_in_all_blocks_are_a_cartridge_and_a_merged_lora_makes_it_whole(world):  # noqa: F811
    out = finished(world, memory_blocks=3)
    run, reference = masked(world, out)
    assert evaluation.main(["export", str(out), "peft"]) == 0
    assert evaluation.main(["export", str(out), "hf"]) == 0
    assert evaluation.main(["export", str(out), "hf", "--module", "french"]) == 0
    whole = whole_modules(world, run)["french"]
    kv = {i: Memory(keys=m.keys, values=m.values) for i, m in whole.items()}
    for base, module in ("hf", kv), ("hf-french", whole):
        theirs = AutoModelForCausalLM.from_pretrained(out / "export" / base, dtype=torch.float32)
        adapted = PeftModel.from_pretrained(theirs, out / "export/peft/french-kv").eval()
        assert close(adapted(TOKENS).logits, reference(TOKENS, module))
        assert not close(adapted(TOKENS).logits, theirs(TOKENS).logits)
    assert close(theirs(TOKENS).logits, reference(TOKENS, {i: Memory(m.lora) for i, m in whole.items()}))


GENERATES = version.parse(transformers.__version__) < version.parse("5.24") or version.parse(
    peft.__version__
) > version.parse("0.21.2")


@torch.no_grad()
def test_lora_and_keys_and_values_act_together_without_merging(world):  # noqa: F811
    out = finished(world, memory_blocks=3)
    run, reference = masked(world, out)
    assert evaluation.main(["export", str(out), "hf"]) == 0 and evaluation.main(["export", str(out), "peft"]) == 0
    whole = whole_modules(world, run)["french"]
    theirs = AutoModelForCausalLM.from_pretrained(out / "export/hf", dtype=torch.float32)
    theirs.load_adapter(out / "export/peft/french")
    both = PeftModel.from_pretrained(theirs, out / "export/peft/french-kv").eval()
    assert close(both(TOKENS).logits, reference(TOKENS, whole))
    if not GENERATES:
        pytest.skip("with transformers 5.24 and peft 0.21.2 generate() leaves out the keys and values")
    prompt = TOKENS[:1]
    found = both.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False)
    ids = prompt
    for _ in range(8):
        ids = torch.cat([ids, reference(ids, whole)[:, -1:].argmax(-1)], 1)
    assert found.tolist() == ids.tolist()


@torch.no_grad()
def test_each_row_of_a_batch_has_its_own_module(world):  # noqa: F811
    """`adapter_names` of peft. Only PeftModel has it: a model of transformers takes the argument and ignores it."""
    out = finished(world)
    run, reference = masked(world, out)
    assert evaluation.main(["export", str(out), "hf"]) == 0 and evaluation.main(["export", str(out), "peft"]) == 0
    whole = whole_modules(world, run, lora_only=True)
    theirs = AutoModelForCausalLM.from_pretrained(out / "export/hf", dtype=torch.float32)
    adapted = PeftModel.from_pretrained(theirs, out / "export/peft/french", adapter_name="french")
    adapted.load_adapter(out / "export/peft/german", "german")
    names = ["german", "__base__", "french", "german"]
    tokens = TOKENS[:1].expand(4, -1)  # the same text: rows differ by their modules only
    found = adapted(tokens, adapter_names=names).logits
    texts = adapted.generate(
        input_ids=tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=6, do_sample=False, adapter_names=names
    )
    assert not close(found[0], found[1]) and not close(found[1], found[2]) and not close(found[0], found[2])
    for name, logits, text in zip(names, found, texts, strict=True):
        module = whole.get(name)  # None for "__base__"
        ids = TOKENS[:1]
        assert close(logits, reference(ids, module)[0])
        for _ in range(6):
            ids = torch.cat([ids, reference(ids, module)[:, -1:].argmax(-1)], 1)
        assert text.tolist() == ids[0].tolist()
    assert close(adapted(TOKENS).logits, reference(TOKENS, whole["french"]))  # without names, the first module again


@torch.no_grad()
def test_blocks_of_different_rank_have_one_rank_in_the_adapter_and_are_merged(world, monkeypatch):  # noqa: F811
    """Runs of an earlier version have such modules. Zeros fill the smaller ranks. Otherwise llama.cpp would multiply each
    by lora_alpha / its own rank."""
    monkeypatch.setitem(KINDS, "deep", dict(num_hidden_layers=12))
    out = finished(world, "deep", blocks=11, rank=8, alpha=2.0)
    memories = Run(out).memories("french")
    ranks = {i: 1 + 5 * i % 8 for i in memories}
    for i, r in ranks.items():
        memories[i].lora = {name: (a[:r], b[:, :r]) for name, (a, b) in memories[i].lora.items()}
    save_module(out / "modules/french.safetensors", memories, Run(out).config.raw["koff_fingerprint"])
    run, reference = masked(world, out)
    for given in (["hf"], ["hf", "--module", "french"], ["peft"]):
        assert evaluation.main(["export", str(out), *given]) == 0
    config = json.loads((out / "export/peft/french/adapter_config.json").read_text())
    largest = max(ranks.values())
    assert config["r"] == config["lora_alpha"] == largest and not config.keys() & {"rank_pattern", "alpha_pattern"}
    theirs, merged = (
        AutoModelForCausalLM.from_pretrained(out / "export" / n, dtype=torch.float32) for n in ("hf", "hf-french")
    )
    adapted = PeftModel.from_pretrained(theirs, out / "export/peft/french")
    for i, r in ranks.items():
        layer = adapted.base_model.model.model.layers[i].mlp.down_proj
        assert (layer.r["default"], layer.scaling["default"]) == (largest, 1.0)
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert not a[r:].any() and not b[:, r:].any()
    logits = reference(TOKENS, whole_modules(world, run, lora_only=True)["french"])
    assert close(adapted(TOKENS).logits, logits) and close(merged(TOKENS).logits, logits)
    assert not close(logits, reference(TOKENS))


def test_adapters_are_never_for_the_export_of_another_run_nor_for_two_modules_at_once(world, capsys):  # noqa: F811
    shutil.copy(world / "data/german.txt", world / "data/german-kv.txt")
    out = finished(world)
    assert evaluation.main(["export", str(out), "peft"]) == 2 and "german-kv is the name" in capsys.readouterr().err
    (world / "data/german-kv.txt").unlink()
    assert train.main([*flags(world, out=out), "--fresh"]) == 0
    assert evaluation.main(["export", str(out), "hf"]) == 0
    assert train.main([*flags(world, out=out, seed=1), "--fresh"]) == 0
    assert evaluation.main(["export", str(out), "peft"]) == 2 and "is of another run" in capsys.readouterr().err
    shutil.rmtree(out / "export")
    assert evaluation.main(["export", str(out), "peft"]) == 0


def test_a_module_without_lora_has_nothing_to_merge(world, capsys):  # noqa: F811
    assert train.main(flags(world, rank=0)) == 0
    out = world / "runs/one"
    assert evaluation.main(["export", str(out), "hf", "--module", "french"]) == 2
    assert "french has no LoRA to merge" in capsys.readouterr().err and not (out / "export/hf-french").exists()


def without_lora(out, name):
    """Rewrite a module of a run, as `train.py --add TEXT --rank 0` makes one."""
    run = Run(out)
    memories = {i: Memory(keys=memory.keys, values=memory.values) for i, memory in run.memories(name).items()}
    save_module(out / f"modules/{name}.safetensors", memories, run.config.raw["koff_fingerprint"])


def test_a_module_without_lora_beside_one_that_has_it(world):  # noqa: F811
    out = finished(world, rank=2, alpha=2.0)
    without_lora(out, "french")
    assert evaluation.main(["export", str(out), "peft"]) == 0
    exported = {path.name for path in (out / "export/peft").iterdir()}
    assert "german" in exported and "french" not in exported


def test_an_export_that_differs_is_not_kept_and_a_folder_is_not_overwritten(world, capsys, monkeypatch):  # noqa: F811
    out = finished(world, lora="kv+mlp")
    expand, expand_memories = export.expand, export.expand_memories
    save, back = export.save_file, export.save_backbone
    assert evaluation.main(["export", str(out), "hf", "--module", "dutch"]) == 2
    assert "no module 'dutch'" in capsys.readouterr().err

    def other_weight(small, kept):
        dense = expand(small, kept)
        dense.layers[1].self_attn.v_proj.weight[0] += 0.1
        return dense

    def other_module(module, kept, config):
        dense = expand_memories(module, kept, config)
        dense[2].lora["v"][1].add_(0.1)
        return dense

    def other_file(tensors, path, metadata):
        name = max(tensors)
        save(tensors | {name: tensors[name] + 1e-3}, path, metadata)

    def other_checkpoint(folder, dense, source, **about):
        back(folder, copy.deepcopy(dense).half(), source, **about)

    for given, name, fault, words in (
        (["hf"], "expand", other_weight, "differs from the run by"),
        (["peft"], "expand", other_weight, "differs from the run by"),
        (["hf", "--module", "french"], "expand_memories", other_module, "differs from the run by"),
        (["peft"], "expand_memories", other_module, "differs from the run by"),
        (["peft"], "save_file", other_file, "was not written as it is"),
        (["hf"], "save_backbone", other_checkpoint, "was not written as it is"),
    ):
        monkeypatch.setattr(export, name, fault)
        assert evaluation.main(["export", str(out), *given]) == 2
        err = capsys.readouterr().err
        assert words in err and err.count("\n") == 1 and not list((out / "export").iterdir())
        monkeypatch.undo()
    for form in "hf", "peft":
        assert evaluation.main(["export", str(out), form]) == 0
        assert evaluation.main(["export", str(out), form]) == 2 and "is there already" in capsys.readouterr().err


# The arithmetic, on a tiny model ---------------------------------------------------------------------------------------


@dataclass
class Scaled(Memory):
    """What a fork may make of a memory: a field of its own."""

    scale: float = 1.0


def closed(model):
    """`kept_channels` with 3 closed neurons and 2 closed rows of k and of down in the upper two of three blocks."""
    torch.manual_seed(4)
    mask = {}
    for name, channels, count in ("k", 16, 2), ("down", 24, 2), ("neuron", 40, 3):
        mask[name] = torch.ones(2, channels, dtype=torch.bool)
        for row in mask[name]:
            row[torch.randperm(channels)[:count]] = False
    return koff.kept_channels(mask, model.config, 1, "cpu"), mask


def random_module(model):
    """LoRA of rank 2 in every block: also in the lowest, which has no gates."""
    module = {}
    for i in range(3):
        lora = {}
        for name in LORA["kv+mlp"]:
            channels, fan_in = model.config.shapes[name]
            lora[name] = (torch.randn(2, fan_in), torch.randn(channels, 2))
        module[i] = Scaled(lora, torch.randn(2, 5, 8), torch.randn(2, 5, 8), scale=2.0 + i)
    return module


@pytest.mark.parametrize("kind", KINDS)
def test_expanding_is_the_inverse_of_materialising_bit_for_bit(tiny, kind):
    model = tiny(**KINDS[kind])
    kept, mask = closed(model)
    small = koff.materialise(model, kept)
    dense = export.expand(small, kept)
    assert dense.state_dict().keys() == model.state_dict().keys() and not dense.config.rows_left
    for (name, theirs), ours in zip(model.state_dict().items(), dense.state_dict().values(), strict=True):
        expected = theirs.clone()
        for i in (1, 2):
            for part, rows in ("k", "k"), ("down", "down"), ("gate", "neuron"), ("up", "neuron"):
                if name.startswith(matrix_name(i, part)):
                    expected[~mask[rows][i - 1]] = 0
            if name == f"{matrix_name(i, 'down')}.weight":
                expected[:, ~mask["neuron"][i - 1]] = 0
        assert torch.equal(ours, expected)
    again = koff.materialise(dense, kept)
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in small.state_dict().items())

    module = koff.materialise_memories(random_module(model), kept)
    whole = export.expand_memories(module, kept, model.config)
    assert [memory.scale for memory in whole.values()] == [2.0, 3.0, 4.0] and whole[0] is module[0]
    assert (whole[1].lora["up"][1][~mask["neuron"][0]] == 0).all()
    assert (whole[2].lora["down"][0][:, ~mask["neuron"][1]] == 0).all()
    back = koff.materialise_memories(whole, kept)
    for i, memory in module.items():
        for name, (a, b) in memory.lora.items():
            assert torch.equal(back[i].lora[name][0], a) and torch.equal(back[i].lora[name][1], b)
        assert back[i].keys is memory.keys and back[i].values is memory.values


def test_merging_adds_ba_and_leaves_the_run_as_it_is(tiny):
    model = tiny()
    kept, _ = closed(model)
    small = koff.materialise(model, kept)
    before = {name: tensor.clone() for name, tensor in small.state_dict().items()}
    whole = export.expand_memories(koff.materialise_memories(random_module(model), kept), kept, model.config)
    dense = export.expand(small, kept)
    merged, _ = fast.merged(dense, whole)
    for i, memory in whole.items():
        for name, (a, b) in memory.lora.items():
            weight = f"{matrix_name(i, name)}.weight"
            assert torch.equal(merged.state_dict()[weight], dense.state_dict()[weight] + b @ a)
    # The lowest block has no gates: its weights are the run's own tensors.
    assert all(torch.equal(small.state_dict()[name], tensor) for name, tensor in before.items())
