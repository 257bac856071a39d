"""llama.cpp reads what `eval.py export RUN gguf` writes: the run's token ids, log probabilities and text, with and without LoRA."""

import json
import os
import sys
import urllib.request

import pytest
import torch

gguf = pytest.importorskip("gguf", reason="export gguf needs the package gguf")
xl = pytest.importorskip("xllamacpp", reason="llama.cpp comes with the package xllamacpp")

from safetensors.torch import save_file

import eval as evaluation
import koff
import train
from data import export, llamacpp
from data.families import parse_config
from data.run import Run
from data.special_tokens import read_templates
from data.tokenizer import DIGITS, GPT2
from model import Memory, Model, generate
from test_export import KINDS, Scaled, finished, without_lora
from test_train import ROOT, flags, world  # noqa: F401 (a fixture)

TEXT = (ROOT / "data/handbook/german.txt").read_text(encoding="utf-8")[-1500:]


DOT = 14  # the full stop in the shipped tokenizer


class LlamaCpp:
    """llama.cpp with a backbone and adapters for it, all of them switched off; in float32 throughout."""

    def __init__(self, folder, names=()):
        self.names = names
        given = xl.CommonParams()
        given.model.path = str(folder / "backbone.gguf")
        given.lora_adapters = [xl.CommonAdapterLoraInfo(str(folder / f"{name}.gguf"), 0.0) for name in names]
        given.n_ctx, given.n_parallel, given.warmup, given.fit_params, given.verbosity = 256, 1, False, False, 0
        given.cpuparams.n_threads = given.cpuparams_batch.n_threads = 1
        given.cache_type_k = given.cache_type_v = xl.ggml_type.GGML_TYPE_F32
        given.flash_attn_type = xl.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED  # it rounds to float16
        self.server = xl.Server(given)

    def ids(self, text):
        """Token ids of a text. (This one question has no method in the package.)"""
        body = json.dumps({"content": text, "add_special": True, "parse_special": True}).encode()
        kind = {"Content-Type": "application/json"}
        asked = urllib.request.Request(f"{self.server.listening_address}/tokenize", body, kind)
        with urllib.request.urlopen(asked) as answer:
            return json.loads(answer.read())["tokens"]

    def continued(self, prompt, steps, module=None, **more):
        """[(id, {id: log p of the likeliest})] of the tokens that follow `prompt`, ids, under one module or none."""
        lora = [{"id": i, "scale": float(name == module)} for i, name in enumerate(self.names)]
        asked = {"prompt": prompt, "n_predict": steps, "n_probs": 20, "lora": lora, **more}
        choice = self.server.handle_completions(asked)["choices"][0]
        return [(c["id"], {t["id"]: t["logprob"] for t in c["top_logprobs"]}) for c in choice["logprobs"]["content"]]


def lora_of(run, module):
    return {i: Memory(memory.lora) for i, memory in run.memories(module).items()} if module else None


@torch.no_grad()
def difference(run, theirs, tokens, module=None):
    """The largest difference of a log probability, over the 20 likeliest tokens after each of `tokens`, ids of a text."""
    expected = run.backbone(torch.tensor([tokens]), memories=lora_of(run, module))[0].log_softmax(-1)
    worst = 0.0
    for end, row in enumerate(expected, start=1):
        # One prompt for each place. A full stop always follows: half a character would not be reported.
        [(_, top)] = theirs.continued(tokens[:end], 1, module, temperature=0.0, logit_bias=[[DOT, 1000.0]])
        worst = max([worst, *(abs(row[id].item() - p) for id, p in top.items())])
    return worst


def same_numbers(run, theirs, places=60):
    """Whether ids and log probabilities are the run's with each module by turns, on one server."""
    tokens = run.tokenizer.encode(TEXT, bos=True)
    worst = max(difference(run, theirs, tokens[:places], module) for module in (None, *run.names, None))
    return theirs.ids(TEXT) == tokens and worst < 1e-3


LLAMA3_ROPE = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                   original_max_position_embeddings=64)  # fmt: skip
CASES = {
    "a module on every matrix": ("llama", dict(lora="kv+mlp")),
    "gates on gate and up, biases": ("llama with biases", dict(granularity="projection")),
    "gates on o, biases": ("llama with biases", dict(gated="kv+mlp+o", repair="none")),
    "gates on q": ("llama", dict(gated="qkv")),
    "attention only": ("llama", dict(gated="kv", sparsity=0.01)),
    "qwen2": ("qwen2", {}),
    "mistral": ("mistral", {}),
    "untied": ("untied", {}),
    "scaled RoPE": ("scaled RoPE", dict(lora="kv+mlp")),
}


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_gives_the_numbers_of_the_run(world, case, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setitem(KINDS, "untied", dict(tie_word_embeddings=False))
    monkeypatch.setitem(KINDS, "scaled RoPE", dict(rope_scaling=LLAMA3_ROPE, rope_theta=500.0, rms_norm_eps=1e-3))
    kind, more = CASES[case]
    out = finished(world, kind, **{"sparsity": 0.02, **more})
    assert evaluation.main(["export", str(out), "gguf", "--dtype", "f32"]) == 0
    assert "french, german: keys and values stay here" in capsys.readouterr().out
    run = Run(out, "cpu", torch.float32)
    assert same_numbers(run, LlamaCpp(out / "export/gguf", run.names))


SHORT = dict(preset="solved", device="cpu", dtype="float32", fisher_sequences=4, repair_tokens=1024, solve_tokens=1024,
             curvature_tokens=512, kv_passages=2, kv_places=4, eval_windows=1)  # fmt: skip


@pytest.fixture(scope="module")
def solved(tmp_path_factory):
    """A short run of the shipped model."""
    out = tmp_path_factory.mktemp("solved") / "run"
    given = dict(SHORT, out=out, domains="german,french")
    assert train.main([x for name, value in given.items() for x in (f"--{name.replace('_', '-')}", str(value))]) == 0
    return out


def exported(out, dtype, where, *more):
    assert evaluation.main(["export", str(out), "gguf", "--dtype", dtype, "--out", str(where), *more]) == 0
    return where


def test_the_shipped_model_says_the_same_and_changes_modules_by_request(solved, tmp_path):
    run = Run(solved, "cpu", torch.float32)
    theirs = LlamaCpp(exported(solved, "f32", tmp_path / "f32"), run.names)
    assert same_numbers(run, theirs, 200)
    prompt = run.tokenizer.encode("Die Datei /etc/")
    texts = {}
    for module in None, *run.names, None:
        ours = generate(
            run.backbone, torch.tensor([prompt]), 24, run.tokenizer.vocab_size, memories=lora_of(run, module)
        )
        expected = [token.item() for token in ours]
        found = [id for id, _ in theirs.continued(prompt, 24, module, temperature=0.0, ignore_eos=True)]
        assert found == expected and texts.setdefault(module, found) == found
    assert len(set(map(tuple, texts.values()))) == 3


@torch.no_grad()
def test_rounded_matrices_load_too_and_the_file_has_the_size_of_what_is_left(solved, tmp_path):
    run = Run(solved, "cpu", torch.float32)
    tokens = run.tokenizer.encode(TEXT)[:40]
    left = sum(tensor.numel() for name, tensor in run.backbone.state_dict().items() if not name.endswith(".kept"))
    zeros = sum(128 - rows[name] for rows in run.config.rows_left for name in ("k", "v")) * run.config.hidden_size
    for dtype, size, worst in ("f32", 4, 1e-3), ("bf16", 2, 0.1), ("q8_0", 34 / 32, 0.5):
        folder = exported(solved, dtype, tmp_path / dtype)
        theirs = LlamaCpp(folder, run.names)
        for module in None, "french":
            assert 0 < difference(run, theirs, tokens, module) < worst
        bytes = (folder / "backbone.gguf").stat().st_size
        tokenizer = (solved / "backbone/tokenizer.json").stat().st_size
        padding = 0.03 * left if dtype == "q8_0" else 0  # up to 31 neurons in a block of several hundred
        assert bytes < 1.02 * (left + zeros + padding) * size + tokenizer
    one = exported(solved, "q8_0", tmp_path / "one", "--module", "french")
    assert [path.name for path in one.iterdir()] == ["french.gguf"]
    assert (one / "french.gguf").read_bytes() == (folder / "french.gguf").read_bytes()


@torch.no_grad()
@pytest.mark.parametrize("dtype, group", [("f32", 1), ("bf16", 1), ("q8_0", 32)])
def test_closed_neurons_fill_an_empty_block_and_whole_groups(tiny, dtype, group):
    """Without neurons llama.cpp would leave out the attention of the block."""
    model = tiny(intermediate_size=96)
    mask = {name: torch.ones(2, channels, dtype=torch.bool) for name, channels in (("v", 16), ("neuron", 96))}
    mask["v"][:, :5] = mask["neuron"][0, :70] = mask["neuron"][1] = False
    kept = koff.kept_channels(mask, model.config, 1, "cpu")
    small = koff.materialise(model, kept)
    left = llamacpp.neurons_left(kept, model.config, dtype)
    narrow = koff.materialise(export.expand(small, kept), left)
    assert [len(layer.mlp.up_proj.weight) for layer in narrow.layers] == [96, max(26, group), group]
    tokens = torch.arange(12)[None]
    assert torch.allclose(narrow(tokens), small(tokens), atol=1e-5)


def refused(capsys, out, words, *more):
    assert evaluation.main(["export", str(out), "gguf", *more]) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1 and not (out / "export/gguf").exists()


@pytest.mark.parametrize("kind", ["qwen3, untied", "olmo2"])
def test_a_model_that_llama_cpp_cannot_express_is_refused(world, kind, capsys):  # noqa: F811
    out = finished(world, kind, sparsity=0.02)
    capsys.readouterr()
    refused(capsys, out, f"no {kind.split(',')[0]} with blocks of different widths")


def test_a_module_without_lora_is_refused(world, capsys):  # noqa: F811
    out = finished(world, rank=0)
    capsys.readouterr()
    refused(capsys, out, "french has no LoRA", "--module", "french")


def test_a_module_without_lora_gets_no_file_beside_one_that_has_it(world):  # noqa: F811
    out = finished(world)
    without_lora(out, "french")
    assert evaluation.main(["export", str(out), "gguf"]) == 0
    assert {path.name for path in (out / "export/gguf").iterdir()} == {"backbone.gguf", "german.gguf"}


def test_what_a_gguf_cannot_hold_is_refused(world, capsys, monkeypatch):  # noqa: F811
    out = finished(world)
    capsys.readouterr()
    refused(capsys, out, "no module 'dutch'", "--module", "dutch")
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "gguf", None)
        refused(capsys, out, "pip install gguf")
    with monkeypatch.context() as other:
        memories = {i: Scaled(memory.lora, scale=torch.ones(1)) for i, memory in Run(out).memories("french").items()}
        other.setattr(Run, "memories", lambda run, name: memories)
        refused(capsys, out, "the memories have a tensor 'scale'")
    with monkeypatch.context() as broken:
        add = gguf.GGUFWriter.add_tensor
        broken.setattr(gguf.GGUFWriter, "add_tensor", lambda self, name, x, **more: add(self, name, x * 2, **more))
        refused(capsys, out, "was not written as it is", "--dtype", "f32")
    path = out / "backbone/tokenizer.json"
    whole = path.read_text(encoding="utf-8")
    file = json.loads(whole)
    file["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\p{L}+|[^\p{L}]"
    path.write_text(json.dumps(file), encoding="utf-8")
    refused(capsys, out, "llama.cpp lacks its pre-tokenizer")
    path.write_text(whole, encoding="utf-8")
    assert evaluation.main(["export", str(out), "gguf"]) == 0
    assert evaluation.main(["export", str(out), "gguf"]) == 2 and "is there already" in capsys.readouterr().err


@pytest.mark.skipif("KOFF_SMOLLM2" not in os.environ, reason="set KOFF_SMOLLM2 to the folder of SmolLM2-135M")
def test_the_numbers_and_the_size_of_smollm2(tmp_path):
    (tmp_path / "base").symlink_to(os.environ["KOFF_SMOLLM2"])
    out = tmp_path / "run"
    given = dict(SHORT, model=tmp_path / "base", out=out, blocks=8, sparsity=0.1, domains="german", seq_len=64)
    assert train.main([x for name, value in given.items() for x in (f"--{name.replace('_', '-')}", str(value))]) == 0
    run = Run(out, "cpu", torch.float32)
    theirs = LlamaCpp(exported(out, "f32", tmp_path / "f32"), run.names)
    assert same_numbers(run, theirs, 40) and all(theirs.ids(text) == run.tokenizer.encode(text) for text in HARD[:2])
    left = sum(tensor.numel() for name, tensor in run.backbone.state_dict().items() if not name.endswith(".kept"))
    tokenizer = (out / "backbone/tokenizer.json").stat().st_size
    for dtype, size in ("bf16", 2), ("q8_0", 34 / 32):
        file = exported(out, dtype, tmp_path / dtype) / "backbone.gguf"
        assert file.stat().st_size < 1.02 * left * size + tokenizer
    assert (
        gguf.GGUFReader(file).get_field("tokenizer.chat_template").contents()
        == read_templates(out / "backbone")["default"]
    )


# Text that pre-tokenizers cut in different ways.
HARD = [
    "Hello  world 5 55 555 5555\n\n  12\t3 'S 'll I'LL don't\r\n\r\n x=[1,2]; ſs 中文字 ａ１２ ²½ \u00a0\u00a0 7",
    "<|endoftext|>a<|endoftext|> b <tool>c</tool>", "I'M 'Re \u200b\u2028 q\x85w", "🙂👩‍👩‍👧 z \x00\x04 (\x04)   ",
]  # fmt: skip
PATTERNS = {
    "shipped": (llamacpp.SPACES, False), "gpt-2": (GPT2, False), "smollm": (DIGITS, False),
    "qwen2": (llamacpp.QWEN2, False), "llama-bpe": (llamacpp.LLAMA3, True),
}  # fmt: skip


@pytest.mark.parametrize("name", PATTERNS)
def test_llama_cpp_makes_the_ids_of_our_tokenizer(world, name, capsys):  # noqa: F811
    """Also with added tokens, a bos and rows without a token. (A text in NFC: llama.cpp leaves that step out.)"""
    path = world / "base/tokenizer.json"
    file = json.loads(path.read_text(encoding="utf-8"))
    pattern, file["model"]["ignore_merges"] = PATTERNS[name]
    file["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = pattern
    size = len(file["model"]["vocab"])
    more = [("<s>", True), ("<tool>", False)]
    for i, (content, special) in enumerate(more):
        flags_of = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        file["added_tokens"].append({"id": size + i, "content": content, "special": special, **flags_of})
    if name == "qwen2":
        file["normalizer"] = {"type": "NFC"}
    if name != "gpt-2":
        bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
        file["post_processor"] = {
            "type": "TemplateProcessing", "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [], "special_tokens": {"<s>": {"id": "<s>", "ids": [size], "tokens": ["<s>"]}},
        }  # fmt: skip
    path.write_text(json.dumps(file), encoding="utf-8")
    (world / "base/tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "<|endoftext|>"}))
    config = json.loads((world / "base/config.json").read_text()) | {"vocab_size": size + 5}
    (world / "base/config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    model = Model(parse_config(config))
    state = {f"model.{n}": torch.randn_like(p) * 0.2 + (p.ndim == 1) for n, p in model.named_parameters()}
    save_file(state, world / "base/model.safetensors")
    assert train.main(flags(world)) == 0
    out = world / "runs/one"
    assert evaluation.main(["export", str(out), "gguf"]) == 0
    assert ("NFC" in capsys.readouterr().out) == (name == "qwen2")
    ours, theirs = Run(out, "cpu").tokenizer, LlamaCpp(out / "export/gguf")
    for text in [TEXT, *HARD]:
        assert theirs.ids(text) == ours.encode(text, bos=True)
