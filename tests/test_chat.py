"""Conversations: as training text, and a chat."""

import io
import json
import sys
from types import SimpleNamespace

import pytest
import torch

import eval as evaluation
import model as decoder
import train
from data import BadInput, chat
from data.chat_template import ChatTemplate
from data.corpus import read_documents
from data.run import Run
from test_chat_template import SMOLLM2, TALK
from test_train import ROOT, flags, world  # noqa: F401 (a fixture)


def test_conversations_are_training_text(tmp_path):
    path = tmp_path / "talk.jsonl"
    path.write_text(json.dumps({"messages": TALK}) + "\n" + json.dumps({"text": "plain"}) + "\n")
    texts, stream = read_documents(path, ChatTemplate(SMOLLM2))
    assert texts == [ChatTemplate(SMOLLM2)(TALK), "plain"] and not stream
    with pytest.raises(BadInput, match=r"talk.jsonl:1 is a conversation, but the model has no chat template"):
        read_documents(path)
    path.write_text(json.dumps({"messages": [{"role": "user"}]}) + "\n")
    with pytest.raises(BadInput, match=r"talk.jsonl:1: the model's chat template refuses"):
        read_documents(path, ChatTemplate(SMOLLM2))
    dated = ChatTemplate("{{ strftime_now('%d %b %Y') }}")  # the same text on any day
    path.write_text(json.dumps({"messages": TALK}) + "\n")
    assert read_documents(path, dated)[0] == ["26 Jul 2024"] and dated(TALK) != "26 Jul 2024"


HALLO = [{"role": "user", "content": "Hallo"}]
NO_ROWS = ["{", "[]", '"x"', "null", "5", "{}", '{"text": 3}', '{"text": "a"} b', "[" * 100_000, '{"messages": [{"role": "user"]}']  # fmt: skip
NO_MESSAGES = [None, [], {}, "hello", 5, True, HALLO[0], ["a"], [None], [5], [HALLO], [{}], [{"from": "human", "value": "?"}]]  # fmt: skip
NO_ROLES = [None, 5, True, ["user"], {"user": 1}]
NO_CONTENTS = [None, 5, 0.5, ["a"], {"a": 1}]
NO_TOOLS = ["[]", 5, ["a"], {"a": 1}]


def test_a_line_without_a_conversation_is_refused_by_its_number(tmp_path):
    path = tmp_path / "talk.jsonl"
    template = ChatTemplate(SMOLLM2)

    def refused(row, why):
        path.write_text('{"text": "plain"}\n' + row + "\n")
        with pytest.raises(BadInput, match=rf"talk\.jsonl:2{why}.*[^.]\.$"):
            read_documents(path, template)

    for row in NO_ROWS:
        refused(row, " is not a JSON object with")
    for messages in NO_MESSAGES:
        refused(json.dumps({"messages": messages}), " is not a JSON object with")
    for role in NO_ROLES:
        refused(json.dumps({"messages": [*HALLO, {"role": role, "content": "?"}]}), " is not a JSON object with")
    for content in NO_CONTENTS:
        row = {"messages": [*HALLO, {"role": "assistant", "content": content}]}
        refused(json.dumps(row), ": the model's chat template refuses this conversation: ")
    for tools in NO_TOOLS:
        row = {"messages": HALLO, "tools": tools}
        refused(json.dumps(row), ": the model's chat template refuses this conversation: ")


# Talking ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(world):  # noqa: F811
    (world / "base/chat_template.jinja").write_text(SMOLLM2)
    for name in ("german", "french"):
        text = (world / f"data/{name}.txt").read_text(encoding="utf-8").split("\n")
        lines = [
            {"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]}
            for a, b in zip(text[::2], text[1::2], strict=False)
        ]
        (world / f"data/{name}.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
        (world / f"data/{name}.txt").unlink()
    assert train.main(flags(world, lora_rate=0.1)) == 0
    return world / "runs/one"


def talk(run, lines, monkeypatch, capsys, *more):
    capsys.readouterr()
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    assert evaluation.main(["chat", str(run), "--tokens", "12", *more]) == 0
    return capsys.readouterr()


def fresh(run, messages, module):
    """Greedy, in one call: the module on the whole conversation."""
    whole = Run(run)
    ids = whole.tokenizer.encode(ChatTemplate(SMOLLM2)(messages, answer=True))
    attached = whole.memories(module)
    new = decoder.generate(whole.backbone, torch.tensor([ids]), 12, whole.tokenizer.vocab_size, memories=attached)
    return whole.tokenizer.decode([token.item() for token in new])


def test_a_module_changed_in_the_middle_is_a_fresh_run_on_all_that_was_said(run, monkeypatch, capsys):
    said = ["/domain german", "Was ist ein Kernel?", "/domain french", "Comment installer un paquet ?"]
    shown = talk(run, said, monkeypatch, capsys)
    assert "[french: the 2 messages so far will be encoded again under it]" in shown.err
    first = fresh(run, [{"role": "user", "content": said[1]}], "german")
    messages = [{"role": "user", "content": said[1]}, {"role": "assistant", "content": first}]
    second = fresh(run, [*messages, {"role": "user", "content": said[3]}], "french")
    assert shown.out == f"> > {first}\n> > {second}\n> "
    assert second != fresh(run, [*messages, {"role": "user", "content": said[3]}], "german")


def test_routed_with_its_confidence_and_what_is_no_command(run, monkeypatch, capsys):
    german = (ROOT / "data/handbook/german.txt").read_text(encoding="utf-8")[2000:2400].replace("\n", " ")
    shown = talk(
        run, [german, "/domain klingon", "/reset", "/domain auto", "", "/quit", "never read"], monkeypatch, capsys
    )
    assert "german, the router's choice (" in shown.err and "/domain klingon is no command, or" in shown.err
    assert "auto: the 0 messages so far" in shown.err
    assert evaluation.main(["chat", str(run), "--module", "klingon"]) == 2
    shown = talk(run, [german * 4, "/reset", "Der Kernel"], monkeypatch, capsys, "--module", "german")
    assert "exceed the model's context" in shown.err and shown.out.startswith("> > > ") and len(shown.out) > 8


def test_generate_continues_a_prompt_and_says_on_stderr_who_wrote(run, capsys):
    capsys.readouterr()
    assert evaluation.main(["generate", str(run), "Der Kernel", "--tokens", "5", "--module", "german"]) == 0
    shown = capsys.readouterr()
    whole = Run(run)
    ids = torch.tensor([whole.tokenizer.encode("Der Kernel", bos=True)])
    new = decoder.generate(whole.backbone, ids, 5, whole.tokenizer.vocab_size, memories=whole.memories("german"))
    assert shown.out == f"Der Kernel{whole.tokenizer.decode([token.item() for token in new])}\n"
    assert shown.err == "[module: german]\n"
    assert evaluation.main(["generate", str(run), ""]) == 2
    assert capsys.readouterr().err == "eval.py: the prompt is empty; give some text.\n"


class Bytes:
    """A tokenizer whose tokens are bytes."""

    vocab_size = 256

    def encode(self, text, bos=False):
        return list(text.encode())

    def decode_bytes(self, ids):
        return bytes(ids)


def test_a_character_is_shown_when_its_last_token_has_come(monkeypatch):
    model = SimpleNamespace(config=SimpleNamespace(eos_token_ids=(0,)))
    written = [torch.tensor([byte]) for byte in [*"aé€".encode(), 0xC3, 0]]
    monkeypatch.setattr(chat, "generate", lambda *given: iter(written))
    run = SimpleNamespace(tokenizer=Bytes(), device="cpu")
    args = SimpleNamespace(seed=0, tokens=9, temperature=0.0, top_p=1.0)
    shown = list(chat.stream(run, "x", model, None, args))
    assert shown == ["a", "", "é", "", "", "€", "", "\N{REPLACEMENT CHARACTER}"]
    with pytest.raises(BadInput, match="the prompt is empty"):
        list(chat.stream(run, "", model, None, args))


def test_which_module_answers():
    router = SimpleNamespace(route=lambda ids: ["french"], best=lambda ids: ("french", 0.75))
    run = SimpleNamespace(tokenizer=Bytes(), router=router, names=["french"])
    assert chat.pick_module(run, "x") == ("french", "french, the router's choice (75.0%)")
    assert chat.pick_module(run, "", "german") == ("german", "german")
    with pytest.raises(BadInput, match="the prompt is empty"):
        chat.pick_module(run, "")
    unsure = (None, "none, the router is unsure (french would be the first choice)")
    run.names = ["german"]  # the module of the router's choice was left behind
    assert chat.pick_module(run, "x") == (None, "none, the router's choice is french (75.0%), which is not here")
    router.route = lambda ids: [None]
    assert chat.pick_module(run, "x") == unsure
    run.names = []
    assert chat.pick_module(run, "x") == (None, "none in this run")
