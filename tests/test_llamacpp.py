"""llama.cpp reads what `eval.py export RUN gguf` writes: the run's token ids, log probabilities and text, with and without LoRA."""

import json
import shutil
import sys
import urllib.request

import pytest
import torch

gguf = pytest.importorskip("gguf", reason="export gguf needs the package gguf")
xl = pytest.importorskip("xllamacpp", reason="llama.cpp comes with the package xllamacpp")

import eval as evaluation
import train
from data.run import Run
from data.tokenizer import DIGITS, GPT2
from model import Memory, generate
from test_export import KINDS, Scaled, finished
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


@pytest.fixture(scope="module")
def solved(tmp_path_factory):
    """A short run of the shipped model."""
    out = tmp_path_factory.mktemp("solved") / "run"
    given = dict(preset="solved", out=out, device="cpu", dtype="float32", domains="german,french", fisher_sequences=4,
                 repair_tokens=1024, solve_tokens=1024, curvature_tokens=512, kv_passages=2, kv_places=4, eval_windows=1)  # fmt: skip
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
        ours = generate(run.backbone, torch.tensor([prompt]), 24, run.tokenizer.vocab_size, memories=lora_of(run, module))
        expected = [token.item() for token in ours]
        found = [id for id, _ in theirs.continued(prompt, 24, module, temperature=0.0, ignore_eos=True)]
        assert found == expected and texts.setdefault(module, found) == found
    assert len(set(map(tuple, texts.values()))) == 3


