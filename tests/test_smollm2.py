"""A short run of the real SmolLM2-135M, taken to transformers and peft, and talked to."""

import io
import os
import sys

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import eval as evaluation
import train
from data.chat_template import ChatTemplate
from data.run import Run
from test_export import close, masked, whole_modules
from test_train import ROOT

pytestmark = pytest.mark.skipif(
    "KOFF_SMOLLM2" not in os.environ, reason="set KOFF_SMOLLM2 to the folder of SmolLM2-135M"
)
# In float32: in bfloat16 two tokens may be equally likely, and then a cache decides between them.
SHORT = dict(preset="best", steps=12, batch=1, seq_len=64, fisher_sequences=8, eval_windows=1, eval_len=64, kv_tokens=16,
             domains="english,german", lora_rate=0.01, solve_tokens=2048, kv_passages=1, dtype="float32")  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    where = tmp_path_factory.mktemp("smollm2")
    (where / "base").symlink_to(os.environ["KOFF_SMOLLM2"])
    given = SHORT | dict(model=where / "base", out=where / "run")
    assert train.main([x for n, v in given.items() for x in (f"--{n.replace('_', '-')}", str(v))]) == 0
    return where / "run"


@torch.no_grad()
def test_transformers_and_peft_give_its_logits(run):
    assert evaluation.main(["export", str(run), "hf"]) == 0 and evaluation.main(["export", str(run), "peft"]) == 0
    its, reference = masked(run.parent, run)
    text = (ROOT / "data/handbook/german.txt").read_text(encoding="utf-8")[-400:]
    tokens = torch.tensor([its.tokenizer.encode(text)])
    theirs = AutoModelForCausalLM.from_pretrained(run / "export/hf", dtype=torch.float32)
    assert close(theirs(tokens).logits, reference(tokens))
    for name, blocks in whole_modules(run.parent, its, lora_only=True).items():
        adapted = PeftModel.from_pretrained(theirs, run / "export/peft" / name)
        assert close(adapted(tokens).logits, reference(tokens, blocks)) and not close(
            adapted(tokens).logits, reference(tokens)
        )
        theirs = adapted.unload()


@torch.no_grad()
def test_a_conversation_whose_module_changes_in_the_middle_equals_a_fresh_run(run, monkeypatch, capsys):
    said = ["/domain german", "Was ist ein Paket?", "/domain english", "And in one sentence?"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(said) + "\n"))
    assert evaluation.main(["chat", str(run), "--tokens", "16"]) == 0
    shown, its, messages, answers = capsys.readouterr(), Run(run), [], []
    template = ChatTemplate.from_folder(os.environ["KOFF_SMOLLM2"])
    for line, module in ((said[1], "german"), (said[3], "english")):
        messages.append({"role": "user", "content": line})
        ids, memory = its.tokenizer.encode(template(messages, answer=True)), its.memories(module)
        text = []
        for _ in range(16):  # greedy without a cache: each token from the whole text so far
            new = its.backbone(torch.tensor([ids + text]), memories=memory)[0, -1].argmax().item()
            if new in its.backbone.config.eos_token_ids:
                break
            text.append(new)
        answers.append(its.tokenizer.decode(text))
        messages.append({"role": "assistant", "content": answers[-1]})
    assert shown.out == f"> > {answers[0]}\n> > {answers[1]}\n> " and any(answers)
    assert "the 2 messages so far will be encoded again" in shown.err
