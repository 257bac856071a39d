"""Conversations: the templates against transformers' own rendering, conversations as training text, and a chat."""

import io
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import PreTrainedTokenizerFast

import eval as evaluation
import model as decoder
import train
from data import BadInput, chat
from data.chat_template import ChatTemplate
from data.corpus import read_documents
from data.run import Run
from test_train import ROOT, flags, world  # noqa: F401 (a fixture)

SMOLLM2 = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""
QWEN25 = r"""{%- if tools %}
    {{- '<|im_start|>system\n' }}{{- '# Tools\n<|im_end|>\n' }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant") %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""
LLAMA3 = r"""{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""
LLAMA31 = r"""{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\n" }}
{%- endif %}
{{- "Cutting Knowledge Date: December 2023\n" }}
{{- "Today Date: " + date_string + "\n\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""
TALK = [{"role": "user", "content": " Was ist ein Kernel?"}, {"role": "assistant", "content": "Der Kern.\n"},
        {"role": "user", "content": "Und {{ 7 * 7 }}?"}]  # fmt: skip
SYSTEM = [{"role": "system", "content": "Be brief."}]


@pytest.mark.parametrize("source", [SMOLLM2, QWEN25, LLAMA3, LLAMA31], ids=["smollm2", "qwen2.5", "llama3", "llama3.1"])
@pytest.mark.parametrize("messages", [TALK, SYSTEM + TALK, TALK[:1]], ids=["talk", "system", "one"])
@pytest.mark.parametrize("answer", [False, True])
def test_a_template_gives_what_transformers_renders_with_jinja_and_without(source, messages, answer, monkeypatch):
    about = {"bos_token": "<|begin_of_text|>"}
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(ROOT / "data/base/tokenizer.json"), **about)
    expected = theirs.apply_chat_template(messages, chat_template=source, tokenize=False, add_generation_prompt=answer)
    assert ChatTemplate(source, about)(messages, answer) == expected
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert ChatTemplate(source, about)(messages, answer) == expected


def test_another_family_needs_jinja_and_a_template_can_do_no_harm(monkeypatch):
    odd = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    assert ChatTemplate(odd)(TALK[1:]) == "[Der Kern.\n][Und {{ 7 * 7 }}?]"
    for harm in (
        "{{ ().__class__.__base__.__subclasses__() }}",
        "{{ raise_exception('no system here') }}",
        "{% nonsense %}",
    ):
        with pytest.raises(BadInput, match="refuses this conversation"):
            ChatTemplate(harm)(TALK)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(BadInput, match="pip install jinja2"):
        ChatTemplate(odd)(TALK)


def test_where_a_template_is_found(tmp_path):
    assert ChatTemplate.from_folder(tmp_path) is None
    bos = {"bos_token": {"content": "<s>", "lstrip": False}, "chat_template": [{"name": "default", "template": "old"}]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(bos))
    found = ChatTemplate.from_folder(tmp_path)
    assert found.source == "old" and found.special == {"bos_token": "<s>"}
    (tmp_path / "chat_template.jinja").write_text("new")
    assert ChatTemplate.from_folder(tmp_path).source == "new"
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(BadInput, match="is not valid"):
        ChatTemplate.from_folder(tmp_path)


def test_conversations_are_training_text(tmp_path):
    path = tmp_path / "talk.jsonl"
    path.write_text(json.dumps({"messages": TALK}) + "\n" + json.dumps({"text": "plain"}) + "\n")
    texts, stream = read_documents(path, ChatTemplate(SMOLLM2))
    assert texts == [ChatTemplate(SMOLLM2)(TALK), "plain"] and not stream
    with pytest.raises(BadInput, match=r"talk.jsonl:1 is a conversation, but the model has no chat template"):
        read_documents(path)
    for wrong in {"messages": []}, {"messages": [{"role": "user"}]}, {"messages": "hello"}, ["text"], {"text": 3}:
        path.write_text(json.dumps(wrong) + "\n")
        with pytest.raises(BadInput, match=r"talk.jsonl:1 is not a JSON object"):
            read_documents(path, ChatTemplate(SMOLLM2))


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
    assert train.main(flags(world, lora_rate=0.05)) == 0
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
    attached = whole.module(module)
    new = decoder.generate(whole.backbone, torch.tensor([ids]), 12, whole.tokenizer.vocab_size, module=attached)
    return whole.tokenizer.decode([token.item() for token in new])


def test_a_module_changed_in_the_middle_is_a_fresh_run_on_all_that_was_said(run, monkeypatch, capsys):
    said = ["/domain german", "Was ist ein Kernel?", "/domain french", "Et maintenant ?"]
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


def test_generate_answers_a_file_of_prompts(run, tmp_path, capsys):
    given, prompts = ["generate", str(run), "--tokens", "5", "--module", "german"], ["Der Kernel", "Le noyau"]
    single = []
    for prompt in prompts:
        capsys.readouterr()
        assert evaluation.main([*given, prompt]) == 0
        single.append(capsys.readouterr().out)
    for name, text in {
        "p.txt": "\n\n".join(prompts) + "\n",
        "p.jsonl": "\n".join(json.dumps({"prompt": p}) for p in prompts),
    }.items():
        (tmp_path / name).write_text(text)
        assert evaluation.main([*given, f"@{tmp_path / name}"]) == 0
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [line["prompt"] + line["text"] + "\n" for line in lines] == single
    for line in '{"text": 1}', '{"prompt": 3}', '["prompt"]', "{":
        (tmp_path / "p.jsonl").write_text('{"prompt": "Der Kernel"}\n' + line)
        assert evaluation.main([*given, f"@{tmp_path / 'p.jsonl'}"]) == 2
        shown = capsys.readouterr()
        assert "p.jsonl:2 has no" in shown.err and not shown.out  # nothing is answered before all prompts are read
    for wrong in "@nowhere", "":
        assert evaluation.main([*given, wrong]) == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith("eval.py: ")


class Bytes:
    """A tokenizer whose tokens are bytes."""

    vocab_size = 256

    def encode(self, text, bos=False):
        return list(text.encode())

    def decode_bytes(self, ids):
        return bytes(ids)


def test_a_character_is_shown_when_its_last_token_has_come(monkeypatch):
    ends = SimpleNamespace(eos_token_ids=(0,))
    written = [torch.tensor([byte]) for byte in [*"aé€".encode(), 0xC3, 0]]
    monkeypatch.setattr(chat, "generate", lambda *given: iter(written))
    run = SimpleNamespace(tokenizer=Bytes(), device="cpu", backbone=SimpleNamespace(config=ends))
    args = SimpleNamespace(seed=0, tokens=9, temperature=0.0, top_p=1.0)
    assert list(chat.stream(run, "x", None, args)) == ["a", "", "é", "", "", "€", "", "\N{REPLACEMENT CHARACTER}"]
    with pytest.raises(BadInput, match="the prompt is empty"):
        list(chat.stream(run, "", None, args))


def test_which_module_answers():
    router = SimpleNamespace(route=lambda ids: ["french"], best=lambda ids: ("french", 0.75))
    run = SimpleNamespace(tokenizer=Bytes(), router=router, names=["french"], module=lambda name: {0: name})
    assert chat.pick_module(run, "x") == ({0: "french"}, "french, the router's choice (75.0%)")
    assert chat.pick_module(run, "", "german") == ({0: "german"}, "german")
    with pytest.raises(BadInput, match="the prompt is empty"):
        chat.pick_module(run, "")
    unsure = (None, "none, the router is unsure (french would be the first choice)")
    run.names = ["german"]  # the module of the router's choice was deleted
    assert chat.pick_module(run, "x") == unsure
    router.route = lambda ids: [None]
    assert chat.pick_module(run, "x") == unsure
    run.names = []
    assert chat.pick_module(run, "x") == (None, "none in this run")


def test_without_jinja2_a_template_that_thinks_is_refused(monkeypatch):
    for name in "jinja2", "jinja2.sandbox":
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(BadInput, match="pip install jinja2"):  # Qwen3's puts <think> into what is plain in Qwen2's
        ChatTemplate("{{ '<|im_start|>' }}{{ '<think>' }}")([{"role": "user", "content": "Hallo"}])
